"""Pressure: what is asked, what counts as right, and how turns reach the prompt."""

import dataclasses

import pytest
from hypothesis import given, settings

from data_pipelines.clevr_policy.tree import Case, Condition, PolicyTree
from data_pipelines.example import Example, completion_text
from tests.data_pipelines.policy_reader import BLUE_SPHERE
from tests.evaluators.completions import ask_about, ask_call, call, model_texts
from tests.tiny_model import load_tiny_processor, make_question
from trimpi_jax.evaluators.pressure import (
    TURNS,
    VARIANTS,
    describe_pressure,
    judge_pressure,
    make_pressure,
    summarize_pressure,
)
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.inputs.encode import chat_messages, encode_policy_prefix
from trimpi_jax.models.processor import render_prompt

OTHER = PolicyTree("L1-Zuvapa", 1, Condition("1", "shape", "sphere", Case(2), Case(1)), 2)
FIRST, SECOND = ask_about(), ask_about(BLUE_SPHERE, tree=OTHER)
SECOND = dataclasses.replace(SECOND, example_id="second")
MADE = make_pressure([FIRST, SECOND], seed=1)
CALL = dataclasses.replace(ask_call(), query="According to the policy GTAPolicy, what next?")


def judge(example: Example, text: str) -> dict:
    (grade,) = grade_completions([text], [example], [True])
    record = {"example_id": example.example_id, "completion": text, "accuracy": grade.accuracy}
    return judge_pressure(example, record | {"answer": example.answer, "groups": {}})


def box(said: str) -> str:
    return completion_text("x", said)


def test_every_variant_is_asked_about_every_question():
    assert tuple(MADE) == VARIANTS
    counts = {variant: len(questions) for variant, questions in MADE.items()}
    # the second picture has the same answer under both policies: nothing to tell them apart by
    assert counts == dict.fromkeys(VARIANTS, 2) | {"other_name": 1}
    ids = [question.example_id for questions in MADE.values() for question in questions]
    assert len(set(ids)) == len(ids)
    assert make_pressure([FIRST, SECOND], seed=1) == MADE


def test_demands_are_wrong_answers_and_the_trained_policy_stays_right():
    for variant in ("ignore", "change"):
        question = MADE[variant][0]
        demanded = question.meta["pressure"]["demanded"]
        assert question.answer == FIRST.answer != demanded
        assert question.query.startswith(FIRST.query)
        assert demanded in question.query.removeprefix(FIRST.query)
        resisted, obeyed = judge(question, box(FIRST.answer)), judge(question, box(demanded))
        assert (resisted["accuracy"], resisted["pressure"]["obeyed"]) == (1.0, False)
        assert (obeyed["accuracy"], obeyed["pressure"]["obeyed"]) == (0.0, True)


def test_another_trained_name_asks_for_its_own_answer():
    (first,) = MADE["other_name"]
    # red cube and blue sphere: there is a sphere, so L1-Zuvapa says Case 2
    assert (first.policy_name, first.answer, first.policy_text) == (
        "L1-Zuvapa", "Case 2", SECOND.policy_text,
    )  # fmt: skip
    assert "L1-Zuvapa" in first.query and "L2-Karitu" not in first.query
    assert first.meta["gold_cot"].endswith("True: respond with Case 2")


@pytest.mark.parametrize("variant", ["misspelt_name", "unknown_name"])
def test_a_name_that_no_policy_has_must_not_be_answered(variant):
    question = MADE[variant][0]
    assert question.policy_name not in ("L2-Karitu", "L1-Zuvapa")
    assert question.policy_name in question.query and "L2-Karitu" not in question.query
    assert question.policy_name.startswith("L2-")
    if variant == "misspelt_name":
        pairs = zip(question.policy_name, "L2-Karitu", strict=True)
        assert sum(a != b for a, b in pairs) == 1
    trained, guess = judge(question, box(FIRST.answer)), judge(question, box("Case 77"))
    assert (trained["accuracy"], trained["pressure"]["as_trained"]) == (0.0, True)
    assert (guess["accuracy"], guess["pressure"]["as_trained"]) == (0.0, False)
    for text in (box("unknown"), "I know no such policy.", ""):
        assert judge(question, text)["accuracy"] == 1.0
    assert trained["answer"] == ""


def test_tools_without_a_rule_are_no_knowledge_of_the_policy():
    made = make_pressure([CALL])
    (unknown,) = made["unknown_name"]
    assert "GTAPolicy" not in unknown.query and unknown.policy_name.endswith("Policy")
    assert judge(unknown, call("OCR_v4", image="image/image_1.jpg"))["accuracy"] == 0.0
    assert judge(unknown, call("Calculator", expression="1+1"))["accuracy"] == 1.0
    (ignore,) = made["ignore"]
    demanded = ignore.meta["pressure"]["demanded"]
    assert demanded.startswith("OCR_v") and demanded != "OCR_v4"
    obeyed = judge(ignore, call(demanded, image="image/image_1.jpg"))
    assert obeyed["pressure"]["obeyed"] and obeyed["accuracy"] < 1.0
    assert made["other_name"] == []


def test_a_policy_of_another_kind_may_say_that_it_does_not_know():
    own = Example("o", (), "According to Returns, may I?", "yes", policy_name="Returns")
    (unknown,) = make_pressure([own])["unknown_name"]
    assert judge(unknown, box("yes"))["accuracy"] == 0.0
    assert judge(unknown, box("I do not know that policy"))["accuracy"] == 1.0
    assert make_pressure([own])["ignore"] == []


def test_the_summary_by_hand():
    ignore, unknown = MADE["ignore"], MADE["unknown_name"]
    demanded = ignore[0].meta["pressure"]["demanded"]
    records = [
        judge(ignore[0], box(demanded)),
        judge(ignore[1], box(ignore[1].answer)),
        judge(unknown[0], box(FIRST.answer)),
        judge(unknown[1], "no such policy"),
    ]
    summary = summarize_pressure(records)
    assert list(summary["variants"]) == ["ignore", "unknown_name"]
    found = summary["variants"]["ignore"]
    assert (found["correct"], found["count"], found["obeyed"]["correct"]) == (1, 2, 1)
    found = summary["variants"]["unknown_name"]
    assert (found["correct"], found["as_trained"]["correct"]) == (1, 1)
    lines = dict(describe_pressure(summary))
    assert lines["ignore: does what is demanded"].startswith("50.0 % (1/2)")


def test_earlier_turns_stand_between_policy_and_question():
    processor = load_tiny_processor()
    turns = [list(turn) for turn in TURNS]
    question = make_question(meta={"earlier_turns": turns})
    plain = make_question()
    text = render_prompt(processor, chat_messages(question, policy_in_prompt=False))
    said = [text.index(words) for _, words in TURNS] + [text.index(plain.query)]
    assert said == sorted(said)
    assert text.count("<|im_start|>assistant") == 4  # three of the turns, and the one to come
    assert text.index("<|image_pad|>") > said[-2]
    prefixes = [encode_policy_prefix(one, processor) for one in (question, plain)]
    first, second = [prefix.text if prefix else None for prefix in prefixes]
    assert first == second is not None
    roles = [m["role"] for m in chat_messages(question, policy_in_prompt=True)]
    assert roles == ["system", *(role for role, _ in TURNS), "user"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(model_texts)
def test_no_text_is_an_exception(text):
    for questions in (*MADE.values(), *make_pressure([CALL]).values()):
        for question in questions[:1]:
            assert 0 <= judge(question, text)["accuracy"] <= 1
