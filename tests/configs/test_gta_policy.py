"""The nano config of GTAPolicy builds for every method, and asks for the paper's sizes."""

import pytest

from configs import gta_policy, qwen2_5_vl
from configs.methods import METHODS
from data_pipelines.build import make_settings
from data_pipelines.gta_policy.dataset import GTAPolicySettings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds(method):
    config = gta_policy.get_config(f"method={method}")
    assert config.stages == METHODS[method]
    assert config.name == f"gta_policy-{method}"


@pytest.mark.parametrize("make", [gta_policy.get_config, lambda: qwen2_5_vl.get_config("task=gta")])
def test_every_option_is_in_the_config_with_its_default(make):
    """An option that a config leaves out could not be set on the command line."""
    options = make().data.to_dict()
    settings = make_settings(options.pop("dataset"), options)
    assert settings == GTAPolicySettings()
    assert set(options) == set(GTAPolicySettings.__dataclass_fields__)
