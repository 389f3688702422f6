"""Every row of the paper's table builds its config; a wrong name or key is told, not ignored."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import nano, nano_base
from configs.methods import (
    COT_QUESTIONS,
    DAPO,
    METHODS,
    POLICY_ROLLOUT,
    TITLES,
    parse_method,
    rl_rollouts,
)
from data_pipelines.build import make_settings
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.objectives import grpo
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.stages.run_settings import optimizer_settings, rl_objective
from trimpi_jax.stages.train_state import TRAINABLE

STAGES = ("vm_cpt", "direct_sft", "cot_sft", "rl", "distillation")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_its_config(method):
    config = nano.get_config(f"method={method}")
    assert config.method == method
    assert config.stages == METHODS[method]
    assert [stage for stage in STAGES if stage in config] == list(config.stages)  # no other section
    options = config.data.to_dict()
    make_settings(options.pop("dataset"), options)
    for stage in config.stages:
        assert optimizer_settings(config[stage], 10).learning_rate > 0
        assert config[stage].trainable in TRAINABLE
    assert config.name == f"nano-{method}"


@pytest.mark.parametrize("method", [m for m, stages in METHODS.items() if "rl" in stages])
def test_the_rl_section_is_what_its_parts_take(method):
    config = nano.get_config(f"method={method}")
    section = config.rl
    assert section.policy_rollout == (method in POLICY_ROLLOUT) == ("poro" in method)
    assert (section.data == "cot") == (method in COT_QUESTIONS)
    assert rl_objective(config) == (grpo.dapo() if method in DAPO else grpo.grpo())
    assert ("kl_beta" in section) == (method not in DAPO)
    assert ("max_attempts" in section) == (method in DAPO)
    assert ("policy_chunk" in section) == section.policy_rollout
    weights = RewardWeights(section.accuracy_weight, section.format_weight)
    assert weights == RewardWeights()
    SamplerSettings(section.group_size, 1, section.temperature, section.top_k, section.top_p)
    assert section.prompts % section.update_prompts == 0


def test_every_method_has_a_title_of_its_own():
    assert list(TITLES) == list(METHODS)
    assert len(set(TITLES.values())) == len(TITLES)


def test_rows_without_cot_sft():
    """What readers of the paper asked for: is the supervised stage needed?"""
    without = {m: stages for m, stages in METHODS.items() if stages and "cot_sft" not in stages}
    assert {stages for stages in without.values() if "rl" in stages} == {("rl",), ("vm_cpt", "rl")}
    for stages in (("rl",), ("vm_cpt", "rl")):
        rows = {method for method, found in without.items() if found == stages}
        assert len(rows) == 2 and len(rows & POLICY_ROLLOUT) == 1


def test_distillation_samples_as_much_as_rl():
    for method in ("distillation", "trimpi_distillation"):
        section = nano.get_config(f"method={method}").distillation
        assert section.rollouts == rl_rollouts(nano.get_config().rl) == 100 * 8 * 16
        assert section.rollouts % section.samples == 0


def test_a_method_without_rl_has_no_rl_section():
    config = nano.get_config("method=cot_sft")
    assert "rl" not in config
    assert "vm_cpt" not in config
    assert config.cot_sft.trainable == "lora"


def test_in_context_trains_nothing():
    assert nano.get_config("method=in_context").stages == ()


def test_the_default_is_the_papers_method():
    assert parse_method(None) == parse_method("") == "trimpi_poro_grpo"
    assert METHODS["trimpi_poro_grpo"] == ("vm_cpt", "cot_sft", "rl")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=trimpi_poro_grop", "did you mean trimpi_poro_grpo"),
        ("method=cot_stf", "did you mean cot_sft"),
        ("method=xyzzy", "unknown method 'xyzzy'"),
        ("cot_sft", "the config argument is method=NAME, got 'cot_sft'"),
        ("metod=cot_sft", "the config argument is method=NAME"),
        ("method=", "the config argument is method=NAME"),
    ],
)
def test_a_wrong_argument_is_told(argument, message):
    with pytest.raises(ValueError, match=message):
        nano.get_config(argument)


def parse(monkeypatch, *arguments):
    """The config as the command line would make it."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    command = ["train", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    values(command)
    return holder.value


FILE = nano.__file__


def test_an_override_reaches_its_key(monkeypatch):
    config = parse(monkeypatch, f"--config={FILE}", "--config.rl.group_size=4")
    assert config.rl.group_size == 4
    assert config.rl.prompts == nano.get_config().rl.prompts


@pytest.mark.parametrize(
    ("argument", "override"),
    [
        ("", "--config.rl.grup_size=4"),  # no such key
        ("", "--config.seeed=1"),
        ("", "--config.direct_sft.batch=4"),  # no such stage in this method
        (":method=cot_sft", "--config.rl.group_size=4"),
    ],
)
def test_an_unknown_key_is_refused(monkeypatch, argument, override):
    with pytest.raises((AttributeError, KeyError)):
        parse(monkeypatch, f"--config={FILE}{argument}", override)


def test_a_value_of_another_type_is_refused(monkeypatch):
    with pytest.raises((flags.IllegalFlagValueError, TypeError, ValueError)):
        parse(monkeypatch, f"--config={FILE}", "--config.rl.group_size=many")


def test_the_base_models_config_is_consistent():
    config = nano_base.get_config()
    assert config.kind == "nano_base"
    for leg in (config.reading, config.joint):
        ends = [phase.until for phase in leg.phases]
        assert ends == sorted(ends)
        assert ends[-1] == 1.0
        for phase in leg.phases:
            assert sum(phase.shares) == pytest.approx(1.0)
            assert {f"policy_{depth}" for depth in phase.depths} <= set(config.shapes)
    assert config.scenes.width * config.scenes.height <= config.model.max_pixels
    assert 2 * sum(config.model.mrope_section) == config.model.head_width
