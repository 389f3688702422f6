"""Which suites run after a stage, and whose questions they are."""

import types

import pytest

from configs import nano
from data_pipelines.building import write_dataset
from tests.io.made_runs import make_examples
from trimpi_jax.io.progress import Progress
from trimpi_jax.stages import pipeline
from trimpi_jax.stages.suites import Context, Unavailable


def test_suites_are_checked_before_anything_is_written(tmp_path):
    config = nano.get_config("method=cot_sft")
    config.eval.suites = ("main", "refferal")
    with pytest.raises(ValueError, match=r"unknown \['refferal'\], missing \['in_context'\]"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_override_is_left_out_where_the_data_have_none(tmp_path, monkeypatch):
    config = nano.get_config("method=cot_sft")
    asked = []
    monkeypatch.setattr(
        pipeline, "run_suites", lambda context, names: (asked.append(names) or {}, {})
    )
    loaded = types.SimpleNamespace(load=lambda params: None, unload=lambda: None)
    for splits in (("test",), ("test", "override")):
        workdir = tmp_path / "-".join(splits)
        write_dataset(workdir / "data", dict.fromkeys(splits, make_examples()), {"dataset": "x"})
        this = types.SimpleNamespace(
            config=config, workdir=workdir, evaluator=loaded, progress=Progress()
        )
        names = ("main", "in_context", "override", "referral")
        pipeline.ask_suites(this, None, workdir / "out", {}, names)
    assert asked == [["main", "in_context", "referral"], list(names)]


def test_questions_are_those_of_the_split_that_the_config_names(tmp_path):
    config = nano.get_config("method=cot_sft")
    test, validation = make_examples(), make_examples(example_id="v")
    write_dataset(tmp_path / "d", {"test": test, "validation": validation}, {"dataset": "x"})
    context = Context(None, None, config, tmp_path / "d", tmp_path, 0, Progress())
    assert [e.example_id for e in context.questions()] == ["q0", "q1", "q2", "q3"]
    config.eval.split = "validation"
    assert [e.example_id for e in context.questions()] == ["q0v", "q1v", "q2v", "q3v"]
    config.eval.split = "validatoin"
    with pytest.raises(Unavailable, match="no questions in a split 'validatoin'"):
        context.questions()
