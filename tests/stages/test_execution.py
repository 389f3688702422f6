"""What a config says about execution, on the platform at hand."""

import pytest

from configs import nano
from tests.tiny_model import tiny_config
from trimpi_jax.stages.run_settings import execution


@pytest.mark.parametrize(
    ("platform", "wanted", "pack_tokens", "found"),
    [
        ("gpu", "auto", 0, "cudnn"),
        ("gpu", "auto", 656, "xla"),
        ("gpu", "xla", 656, "xla"),
        ("tpu", "auto", 656, "splash"),
        ("cpu", "auto", 656, "xla"),
    ],
)
def test_packed_rows_get_a_kernel_that_knows_segments(platform, wanted, pack_tokens, found):
    config = nano.get_config("method=cot_sft")
    config.dtype, config.attention = "bfloat16", wanted
    config.cot_sft.pack_tokens = pack_tokens
    assert execution(tiny_config(), config, platform).attention == found


def test_a_kernel_that_does_not_is_refused_before_anything_is_done():
    config = nano.get_config("method=cot_sft")
    config.dtype, config.attention, config.cot_sft.pack_tokens = "bfloat16", "cudnn", 656
    with pytest.raises(ValueError, match=r"packed rows apart: set .* of \['cot_sft'\] to 0"):
        execution(tiny_config(), config, "gpu")
