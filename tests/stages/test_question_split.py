"""Which questions RL and distillation ask: all of training, or those with a chain of thought."""

import dataclasses
import types

import jax
import pytest
from ml_collections import ConfigDict

from configs import nano
from data_pipelines.building import write_dataset
from tests.tiny_model import (
    load_tiny_processor,
    make_png,
    make_question,
    tiny_config,
    tiny_params,
)
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages import pipeline
from trimpi_jax.stages.auto_sizes import fill_auto_sizes
from trimpi_jax.stages.pipeline import Run, run, run_rl
from trimpi_jax.stages.run_settings import check_sampling

TRAIN, COT = [f"q{i}" for i in range(9)], ["q0/cot", "q1/cot", "q2/cot"]


@pytest.fixture
def workdir(tmp_path):
    plain = [make_question(i, cot="", images=(make_png(i),)) for i in range(9)]
    cot = [make_question(i, example_id=COT[i], images=(make_png(i),)) for i in range(3)]
    test = [make_question(20, images=(make_png(20),))]
    write_dataset(tmp_path / "data", {"train": plain, "cot": cot, "test": test}, {})
    return tmp_path


@pytest.mark.parametrize(
    ("method", "expected"),
    [("trimpi_poro_grpo", TRAIN), ("trimpi_poro_grpo_on_cot", COT), ("cot_sft_dapo", TRAIN)],
)
def test_rl_streams_one_split_only(method, expected, workdir, monkeypatch):
    """What the loop fetches, and what dynamic sampling draws beside it."""
    config = nano.get_config(f"method={method}")
    config.rl.prompts = config.rl.update_prompts = 2
    seen, drawn = [], []

    def stand_in(*arguments, fetch_more, **more):
        drawn.append(fetch_more)
        return types.SimpleNamespace(is_finished=False)

    def loop_run(settings, state, source, take_step, *more, **named):
        for number in range(10):
            seen.extend(source.fetch(number) if number % 2 else drawn[0]())
        return state

    monkeypatch.setattr(pipeline, "RLStep", stand_in)
    monkeypatch.setattr(pipeline.loop, "run", loop_run)
    monkeypatch.setattr(pipeline, "loop_settings", lambda *arguments: None)
    this: Run = types.SimpleNamespace(
        config=config,
        workdir=workdir,
        engine=object(),
        mesh=make_mesh(1, 1, 1, jax.devices()[:1]),
        progress=types.SimpleNamespace(say=print),
    )  # type: ignore[assignment]
    run_rl(this, jax.tree.map(jax.numpy.asarray, tiny_params(tiny_config())), workdir / "3_rl")
    assert len(seen) == 20
    assert {example.example_id for example in seen} == set(expected)


def test_another_value_is_told_before_anything_is_written(tmp_path):
    for method, stage in (("trimpi_grpo", "rl"), ("distillation", "distillation")):
        config = nano.get_config(f"method={method}")
        config[stage].data = "half"
        with pytest.raises(ValueError, match=rf"{stage}\.data is one of \['all', 'cot'\], got 'ha"):
            run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_a_late_stage_would_refuse_is_told_first():
    config = nano.get_config("method=trimpi_poro_grpo")
    config.rl.update_prompts = 3
    with pytest.raises(ValueError, match=r"rl\.prompts 8 is not a multiple"):
        check_sampling(config)
    config = nano.get_config("method=trimpi_distillation")
    config.distillation.rollouts = 17
    with pytest.raises(ValueError, match="17 is not a multiple of samples 16"):
        check_sampling(config)


def test_cot_questions_where_there_are_none_is_told():
    config = ConfigDict({"stages": ("rl",), "rl": {"data": "cot"}, "windows": "auto"})
    config.update({"max_new_tokens": 8, "prompt_buckets": "auto", "row_buckets": "auto"})
    splits = {"train": [dataclasses.replace(make_question(0), cot="")], "cot": []}
    with pytest.raises(ValueError, match=r"stages \['rl'\] train on examples with a chain"):
        fill_auto_sizes(config, splits, load_tiny_processor())
