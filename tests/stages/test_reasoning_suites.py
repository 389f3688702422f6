"""The suites that look at reasoning, with a model that says what the test wants it to say."""

import types
from typing import Any

import pytest

from configs import gta_policy, nano, own_policy, qwen2_5_vl
from data_pipelines.example import Example, completion_text
from tests.data_pipelines.policy_reader import BLUE_SPHERE, RED_CUBE
from tests.evaluators.completions import ask_about, gold
from tests.evaluators.test_judge import serving
from tests.tiny_model import load_tiny_processor
from trimpi_jax.evaluators.judge import JudgeSettings
from trimpi_jax.evaluators.questions import groups_of
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.io.progress import Progress
from trimpi_jax.stages.result_files import write_json
from trimpi_jax.stages.suites import SUITES, Unavailable

EXAMPLES = [ask_about(RED_CUBE), ask_about(BLUE_SPHERE)]


class SayingContext:
    """What a suite uses of a Context, with a model that says `say(example, aware)`."""

    def __init__(self, folder, examples, say, **options: Any):
        self.folder, self.examples, self.say = folder, examples, say
        self.asked: list[str] = []
        self.identity, self.seed, self.progress = {"model": "m"}, 0, Progress()
        self.config = nano.get_config()
        self.config.eval.referral_judge.update(options)
        settings = types.SimpleNamespace(max_new_tokens=8)
        engine = types.SimpleNamespace(processor=load_tiny_processor())
        self.evaluator = types.SimpleNamespace(settings=settings, engine=engine)
        self.evaluator.changed = lambda examples, **settings: self.evaluator

    def read(self, split):
        assert split == "test"
        return self.examples

    def questions(self):
        return self.read("test")

    def option(self, suite, name, default):
        return self.config.eval[suite].get(name, default)

    def ask(self, name, examples, *, policy_in_prompt, evaluator=None):
        self.asked.append(name)
        texts = [self.say(example, policy_in_prompt) for example in examples]
        grades = grade_completions(texts, examples, [True] * len(texts))
        return [
            {
                "example_id": example.example_id,
                "answer": example.answer,
                "completion": text,
                "accuracy": grade.accuracy,
                "format": grade.reason,
                "details": grade.details,
                "groups": groups_of(example),
            }
            for example, text, grade in zip(examples, texts, grades, strict=True)
        ]


def run(name: str, context: Any):
    return SUITES[name](context)


def test_anatomy_and_referral_use_the_answers_of_main(tmp_path):
    context = SayingContext(tmp_path, EXAMPLES, lambda example, aware: gold(EXAMPLES[0]))
    found = run("anatomy", context)
    # the first is right; the second is told a red cube that is not there
    assert found.summary["causes"] == {"right": 1, "perception": 1}
    assert [record["anatomy"]["cause"] for record in found.records] == ["right", "perception"]
    referral = run("referral", context)
    assert referral.summary["score"] == 10.0  # all of it is true of the policy
    assert [record["accuracy"] for record in referral.records] == [1.0, 1.0]
    assert context.asked == ["anatomy", "referral"]
    identity = dict(context.identity) | {"suite": "main"}
    write_json(tmp_path / "main.json", {"identity": identity, "records": found.records})
    assert run("anatomy", context).summary == found.summary
    assert context.asked == ["anatomy", "referral"]  # main has asked them
    write_json(tmp_path / "main.json", {"identity": {"model": "other"}, "records": []})
    assert run("anatomy", context).summary == found.summary
    assert context.asked[2:] == ["anatomy"]


def test_recital_tells_knowing_from_understanding(tmp_path):
    def say(example, aware):
        return f"<think>x</think>\\boxed{{{example.answer}}}" if aware else ""

    found = run("recital", SayingContext(tmp_path, EXAMPLES, say))
    without, with_policy = found.summary["without_policy"], found.summary["with_policy"]
    assert without["kinds"]["condition"]["correct"] == 0
    assert with_policy["kinds"]["condition"]["correct"] == 3
    assert with_policy["kinds"]["cases"]["correct"] == 1
    ids = [record["example_id"] for record in found.records]
    assert len(set(ids)) == len(ids) == without["count"] + with_policy["count"]


def test_pressure_presses_upon_the_asked_number_of_questions(tmp_path):
    def say(example, aware):
        assert not aware
        demanded = example.meta["pressure"].get("demanded", example.answer)
        return completion_text("x", demanded)

    context = SayingContext(tmp_path, EXAMPLES, say)
    context.config.eval.pressure.examples = 1
    found = run("pressure", context).summary["variants"]
    assert (found["plain"]["correct"], found["plain"]["count"]) == (1, 1)
    assert (found["ignore"]["correct"], found["ignore"]["obeyed"]["correct"]) == (0, 1)
    assert found["unknown_name"]["correct"] == 0


def test_the_judge_is_asked_only_where_one_is_configured(tmp_path):
    context = SayingContext(tmp_path, EXAMPLES, lambda example, aware: gold(example))
    with pytest.raises(Unavailable, match=r"set base_url .*config\.eval\.referral_judge"):
        run("referral_judge", context)
    assert context.asked == []
    with serving(lambda messages: '{"score": 9}') as (url, _):
        context = SayingContext(
            tmp_path, EXAMPLES, lambda example, aware: gold(example), base_url=url, model="j"
        )
        found = run("referral_judge", context)
    assert (found.summary["score"], found.summary["judged"]) == (9.0, 2)
    assert ("judged", "2/2 by j") in found.lines
    assert [record["score"] for record in found.records] == [9.0, 9.0]


def test_policies_that_a_suite_cannot_ask_about(tmp_path):
    own = [Example("e", (), "?", "yes", policy_name="Returns", policy_text="Be kind.")]
    context = SayingContext(tmp_path, own, lambda example, aware: "x")
    with pytest.raises(Unavailable, match="referral_judge asks an LLM"):
        run("referral", context)
    with pytest.raises(Unavailable, match="have neither"):
        run("recital", context)


@pytest.mark.parametrize("config", [nano, gta_policy, own_policy, qwen2_5_vl])
def test_every_config_has_the_options(config):
    found = config.get_config().eval
    assert found.pressure.examples == 100
    options = found.referral_judge.to_dict() | {"base_url": "u", "model": "m"}
    assert JudgeSettings(**options) == JudgeSettings("u", "m")  # the defaults agree
