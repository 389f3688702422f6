"""Recital: questions and scores by hand, and texts that no parser expects."""

import dataclasses

import pytest
from hypothesis import given, settings

from data_pipelines.gta_policy.catalogue import PAPER_RULES, Profile
from tests.data_pipelines.policy_reader import BLUE_SPHERE, RED_CUBE
from tests.evaluators.completions import ask_about, ask_call, model_texts
from tests.tiny_model import load_tiny_processor, make_question
from trimpi_jax.evaluators.recital import make_recital, score_recital, summarize_recital
from trimpi_jax.inputs.encode import encode_behind_policy, encode_policy_prefix, encode_prompt
from trimpi_jax.inputs.sizes import SizeReader
from trimpi_jax.models.processor import decode_completion, encode_completion

SCENES = [
    dataclasses.replace(ask_about(thing), example_id=str(i))
    for i, thing in enumerate((RED_CUBE, BLUE_SPHERE))
]
ALL = {q.example_id.rpartition("/")[2]: q for q in make_recital(SCENES)}
QUESTIONS = {name: question for name, question in ALL.items() if question.images == ()}
BEGUN = ALL["jumped-1.2-0"]


def gta_questions():
    example = ask_call()
    example.meta["task"] = "gta_policy"
    return make_recital([example], seed=3)


VERSION = gta_questions()[0]


def score(name, said):
    return score_recital(QUESTIONS[name], f"<think>x</think>\\boxed{{{said}}}")


def test_every_condition_is_asked_once_and_the_cases():
    assert list(QUESTIONS) == ["condition-1", "condition-1.1", "condition-1.2", "cases"]
    question = QUESTIONS["condition-1"]
    assert "policy L2-Karitu" in question.query and "Condition 1 say" in question.query
    assert "\\boxed{}" in question.query and question.images == ()
    assert question.answer == (
        "any color red? True: go to Condition 1.1. False: go to Condition 1.2"
    )
    assert question.policy_text not in question.query
    assert QUESTIONS["cases"].answer == "Case 1, Case 2, Case 3, Case 4"


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_the_gold_answer_is_wholly_right(name):
    assert score(name, QUESTIONS[name].answer)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("condition-1", "Any color RED? true: Condition 1.1 False: Condition 1.2", 1.0),
        ("condition-1", "any color blue? True: go to Condition 1.1", 0.5),
        ("condition-1", "any color red? True: Condition 1.2. False: Condition 1.1", 0.5),
        ("condition-1", "any color red? False: Condition 1.2. True: Condition 1.1", 1.0),
        ("condition-1.2", "any size small? True: respond with Case 4. False: Case 3", 0.75),
        ("condition-1.2", "any size small? True: respond with Case 44. False: Case 2", 0.75),
        ("condition-1", "I do not know", 0.0),
        ("cases", "Case 1, Case 2", 0.5),
        ("cases", "Case 1, Case 2, Case 3, Case 4, Case 5", 0.8),
        ("cases", "", 0.0),
    ],
)
def test_parts_are_scored(name, said, expected):
    assert score(name, said)["accuracy"] == expected


def test_every_section_is_begun_behind_what_is_seen():
    begun = [name for name, question in ALL.items() if question.images]
    assert begun == [
        "continued-1-0", "continued-1-1", "continued-1.1-0", "jumped-1.1-0",
        "continued-1.2-0", "jumped-1.2-0",
    ]  # fmt: skip
    assert BEGUN.query == SCENES[1].query and BEGUN.images == SCENES[1].images
    seen = "<think>I see: blue large rubber sphere A.\n"
    assert BEGUN.meta["answer_begins"] == seen + "Condition 1.2: any"
    assert ALL["continued-1.2-0"].meta["answer_begins"] == (
        seen + "Condition 1: any color red? none. False: go to Condition 1.2\nCondition 1.2: any"
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" size small? red small metal cube. True: respond with Case 4</think>", 1.0),
        (" size small (pictured)? none. False: respond with Case 2", 1.0),
        (" size small? none. False: respond with Case 4\nCondition 1: any color red?", 2 / 3),
        (" size large? none. False: respond with Case 2", 2 / 3),
        (" size small?", 2 / 3),
        ("", 0.0),
    ],
)
def test_what_is_continued_is_scored(said, expected):
    for question in (BEGUN, ALL["continued-1.2-0"]):
        assert score_recital(question, said)["accuracy"] == pytest.approx(expected)


def test_a_begun_answer_follows_the_header_in_every_prompt():
    processor = load_tiny_processor()
    begun = "<think>I see: red small metal cube.\nCondition 1.2: any"
    plain, question = make_question(), make_question(meta={"answer_begins": begun})
    for aware in (False, True):
        rows = [encode_prompt(e, processor, policy_in_prompt=aware) for e in (plain, question)]
        added = rows[1].tokens[len(rows[0].tokens) :]
        assert rows[1].tokens.tolist() == [*rows[0].tokens, *added]
        assert decode_completion(processor, added) == begun
        sizes = SizeReader(processor).measure(question)
        size = sizes.aware if aware else sizes.free
        assert size is not None and size.tokens == len(rows[1].tokens)
    # what a model was trained on: the same tokens, whether begun or said
    whole = encode_completion(processor, begun + " size small?")
    assert whole[: len(added)].tolist() == added.tolist()
    prefix = encode_policy_prefix(question, processor)
    assert prefix is not None
    free = encode_prompt(question, processor, policy_in_prompt=False)
    behind = encode_behind_policy(question, processor, prefix, free)
    assert behind.tokens[-len(added) :].tolist() == added.tolist()


def test_versions_of_tools_follow_the_rules():
    questions = gta_questions()
    assert len(questions) == 7 * 20 and len({q.example_id for q in questions}) == 140
    question = questions[0]
    text = question.query
    user = Profile(
        int(text.partition("of age ")[2].split()[0]),
        int(text.partition(" credits and")[0].split()[-1]),
        text.partition("account_type ")[2][0],
    )
    tool = text.partition("version of ")[2].split()[0]
    assert question.answer == PAPER_RULES.versioned_name(tool, user)
    right = score_recital(question, f"\\boxed{{ {question.answer} }}")
    wrong = score_recital(question, "\\boxed{OCR}")
    assert (right["accuracy"], wrong["accuracy"]) == (1.0, 0.0)
    summary = summarize_recital([question, question], [right, wrong])
    assert summary["kinds"]["version"]["correct"] == 1
    versions = question.meta["recital"]["versions"]
    assert summary["kinds"]["version"]["by_guessing"] == pytest.approx(1 / versions)


def test_the_summary_by_hand():
    pairs = [("condition-1", "any color blue? True: go to Condition 1.1"), ("cases", "Case 1")]
    examples = [QUESTIONS[name] for name, _ in pairs]
    summary = summarize_recital(examples, [score(*pair) for pair in pairs])
    assert (summary["count"], summary["correct"], summary["score"]) == (2, 0, 0.375)
    assert summary["kinds"]["condition"]["parts"] == {
        "attribute": 1.0, "value": 0.0, "if_true": 1.0, "if_false": 0.0,
    }  # fmt: skip


def test_other_policies_cannot_be_recited():
    assert make_recital([ask_call()]) == []  # neither a tree nor GTAPolicy's task


@settings(max_examples=100, deadline=None, derandomize=True)
@given(model_texts)
def test_no_text_is_an_exception(text):
    for question in (*ALL.values(), VERSION):
        assert 0 <= score_recital(question, text)["accuracy"] <= 1
