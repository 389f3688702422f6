"""Suites, their files and what they refuse, with an evaluator that needs no model."""

import dataclasses
import io
import json

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from data_pipelines.building import write_dataset
from data_pipelines.example import Example
from trimpi_jax.evaluators.questions import EvaluationSettings, groups_of, summarize_override
from trimpi_jax.io.progress import Progress
from trimpi_jax.stages.evaluate_folder import (
    NEEDED,
    choose_config,
    choose_suites,
    evaluate_folder,
)
from trimpi_jax.stages.evaluate_model import (
    compare_results,
    read_results,
    result_table,
    run_suites,
)
from trimpi_jax.stages.open_model import find_model
from trimpi_jax.stages.result_files import make_identity
from trimpi_jax.stages.suites import SUITES, Context, Unavailable


@dataclasses.dataclass
class FakeEngine:
    sizes: tuple = (64,)


class FakeEvaluator:
    """Answers "Case 1" to everything, two questions at a time; breaks after `breaks_after`."""

    def __init__(self, breaks_after=None):
        self.settings, self.engine = EvaluationSettings(2, 8), FakeEngine()
        self.seconds = {"total": 0.0, "grading": 0.0}
        self.asked, self.breaks_after = [], breaks_after

    def ask(self, examples, *, policy_in_prompt, on_progress, on_records):
        for start in range(0, len(examples), 2):
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise KeyboardInterrupt
            part = examples[start : start + 2]
            self.asked += [(example.example_id, policy_in_prompt) for example in part]
            on_records({start + i: record(example) for i, example in enumerate(part)})
            on_progress(start + len(part))


def record(example, said="Case 1"):
    return {
        "example_id": example.example_id,
        "answer": example.answer,
        "completion": f"<think>x</think>\\boxed{{{said}}}",
        "accuracy": float(example.answer == said),
        "format": "ok",
        "prompt_tokens": 5,
        "details": {},
        "groups": groups_of(example),
    }


def question(number, answer="Case 1", **meta):
    meta = {"task": "toy", "depth": 2} | meta
    return Example(f"q{number}", (), f"Question {number}?", answer, policy_name="L2-A", meta=meta)


@pytest.fixture
def data(tmp_path):
    test = [question(i, f"Case {1 + i % 3}") for i in range(6)]
    override = [question(9, "Case 2", trained_answer="Case 1")]
    splits = {"test": iter(test), "override": iter(override), "train": iter([question(100)])}
    write_dataset(tmp_path / "data", splits, {"dataset": "toy"})
    return tmp_path / "data"


def make_context(data, folder, evaluator=None, **config):
    settings = ConfigDict({"seed": 0, "eval": {"examples": 100} | config})
    said = []
    progress = Progress(Console(quiet=True))
    progress.say = said.append
    context = Context(
        evaluator or FakeEvaluator(),
        None,
        settings,
        data,
        folder,
        0,
        progress,
        identity=make_identity(settings, data) | {"model_sha256": "m"},
    )
    return context, said


def test_a_stopped_suite_goes_on_and_a_finished_one_is_skipped(data, tmp_path):
    context, _ = make_context(data, tmp_path / "out", FakeEvaluator(breaks_after=4))
    with pytest.raises(KeyboardInterrupt):
        run_suites(context, ["main"])
    assert not (tmp_path / "out" / "main.json").exists()
    with (tmp_path / "out" / "main.records.jsonl").open("a") as file:
        file.write('{"example_id": "q5", "accur')  # cut short by a kill
    again, said = make_context(data, tmp_path / "out")
    results, left_out = run_suites(again, ["main"])
    assert said == ["main: going on behind 4 answers of an earlier start"] and not left_out
    assert again.evaluator.asked == [("q4", False), ("q5", False)]
    summary = results["main"]["summary"]
    assert (summary["correct"], summary["count"]) == (2, 6)
    assert {name: (g["correct"], g["count"]) for name, g in summary["groups"]["leaf"].items()} == {
        "Case 1": (2, 2),
        "Case 2": (0, 2),
        "Case 3": (0, 2),
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["main.json"]
    third, said = make_context(data, tmp_path / "out")
    assert run_suites(third, ["main"])[0] == json.loads(json.dumps(results))
    assert third.evaluator.asked == [] and "evaluated before, skipped" in said[0]


def test_another_model_or_config_is_asked_anew(data, tmp_path):
    context, _ = make_context(data, tmp_path / "out", FakeEvaluator(breaks_after=4))
    with pytest.raises(KeyboardInterrupt):
        run_suites(context, ["main"])
    other, _ = make_context(data, tmp_path / "out", examples=4)
    results, _ = run_suites(other, ["main"])
    assert len(other.evaluator.asked) == results["main"]["summary"]["count"] == 4
    trained, _ = make_context(data, tmp_path / "out", examples=4)
    trained = dataclasses.replace(trained, identity=trained.identity | {"model_sha256": "n"})
    run_suites(trained, ["main"])
    assert len(trained.evaluator.asked) == 4


def test_a_suite_without_questions_is_left_out_with_its_reason(tmp_path):
    write_dataset(tmp_path / "data", {"test": iter([question(0)]), "override": iter([])}, {})
    context, said = make_context(tmp_path / "data", tmp_path / "out")
    results, left_out = run_suites(context, ["override", "main"])
    assert set(results) == {"main"}
    assert "no questions in a split 'override'" in left_out["override"]
    assert said[0].startswith("override: left out; ")
    with pytest.raises(Unavailable, match="the set of questions nothing is empty"):
        context.ask("nothing", [], policy_in_prompt=False)


def test_override_tells_whom_the_answers_follow(data, tmp_path):
    """One answer of the prompt's policy, two of the trained one, one of neither; one no contest."""
    examples = [question(i, "Case 2", trained_answer="Case 1") for i in range(4)]
    examples.append(question(4, "Case 2", trained_answer="Case 2"))
    said = ["Case 2", "Case 1", "Case 1", "Case 7", "Case 2"]
    records = [record(*pair) for pair in zip(examples, said, strict=True)]
    found = summarize_override(records, examples, needs_think=True)
    assert {name: (part["correct"], part["count"]) for name, part in found.items()} == {
        "prompt": (1, 4),
        "trained": (2, 4),
        "neither": (1, 4),
    }
    context, _ = make_context(data, tmp_path / "out")
    results, _ = run_suites(context, ["override"])
    assert context.evaluator.asked == [("q9", True)]  # the policy is in the prompt
    assert results["override"]["summary"]["follows"]["trained"]["correct"] == 1


def test_two_models_are_compared_on_the_same_data(data, tmp_path):
    context, _ = make_context(data, tmp_path / "out")
    results, _ = run_suites(context, ["main", "in_context"])
    results["main"]["lines"].append(["policy [red]", "as it is"])  # no markup of rich's
    other = read_results(tmp_path / "out")
    del other["in_context"]
    compared = compare_results(results, other, seed=0)
    assert set(compared) == {"main"} and compared["main"]["mcnemar_p"] == 1.0
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(result_table(results, compared))
    said = console.export_text()
    assert "33.3 % (2/6) [9.7, 70.0]" in said and "policy [red]" in said
    assert "+0.0 points [+0.0, +0.0] on 6" in said
    other["main"]["identity"]["data_sha256"] = "x"
    with pytest.raises(ValueError, match="main: the two models were asked about other datasets"):
        compare_results(results, other, seed=0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_results(results, {"override": {}}, seed=0)
    with pytest.raises(ValueError, match="holds no results of an evaluation"):
        read_results(tmp_path)


def test_what_the_door_refuses(tmp_path):
    assert choose_suites([]) == ["main", "in_context", "override"]
    assert choose_suites(["all"]) == list(SUITES)
    assert choose_suites(["override", "main", "main"]) == ["override", "main"]
    with pytest.raises(ValueError, match=r"no suite 'overide' \(did you mean override\?\), 'zz'"):
        choose_suites(["overide", "zz"])
    with pytest.raises(FileNotFoundError, match=r"--model .*absent is not a folder"):
        evaluate_folder(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    plain = find_model(tmp_path)
    with pytest.raises(ValueError, match="lies in no run, so --config must say"):
        choose_config(plain, None, None)
    with pytest.raises(ValueError, match="trains a base model"):
        choose_config(plain, ConfigDict({"name": "nano_base"}), None)
    config = ConfigDict({"stages": [], "eval": {"examples": 5}})
    with pytest.raises(ValueError, match=r"lacks \['attention', .*give a present one"):
        choose_config(plain, config, None)
    config.update(dict.fromkeys(NEEDED, 0))
    with pytest.raises(ValueError, match="--examples must be at least 1, got 0"):
        choose_config(plain, config, 0)
    assert choose_config(plain, config, 3).eval.examples == 3 and config.eval.examples == 5
