r"""What counts as an answer: a table of completions, and nothing that a model says is an error."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.answer_forms import normalize
from trimpi_jax.grading.answers import (
    FORMAT_REASONS,
    Grade,
    RewardWeights,
    grade_completion,
    reward,
)

GOLD = "Case 3"
RIGHT = "<think>red: yes</think>\\boxed{Case 3}"

# completion, accuracy, format, parsed, reason
TABLE = [
    (RIGHT, 1, 1, "Case 3", "ok"),
    ("<think></think>\\boxed{Case 3}", 1, 1, "Case 3", "ok"),
    (" \n<think>a\nb</think>\n\\boxed{ Case  3 }\n", 1, 1, "Case 3", "ok"),
    ("<think>x</think>\\boxed{Case 4}", 0, 1, "Case 4", "ok"),
    ("<think>x</think>\\boxed{case 3}", 0, 1, "case 3", "ok"),  # case matters
    ("<think>x</think>\\boxed{Case 30}", 0, 1, "Case 30", "ok"),
    ("<think>x</think>\\boxed{}", 0, 1, "", "ok"),
    # right answer, wrong form
    ("\\boxed{Case 3}", 1, 0, "Case 3", "no_think"),
    ("<think>x\\boxed{Case 3}", 1, 0, "Case 3", "no_think"),
    ("x</think>\\boxed{Case 3}", 1, 0, "Case 3", "no_think"),
    ("<think>a</think><think>b</think>\\boxed{Case 3}", 1, 0, "Case 3", "repeated_think"),
    ("<think>a</think></think>\\boxed{Case 3}", 1, 0, "Case 3", "repeated_think"),
    ("The answer: " + RIGHT, 1, 0, "Case 3", "text_around"),
    (RIGHT + " I am sure.", 1, 0, "Case 3", "text_around"),
    ("<think>x</think>so \\boxed{Case 3}", 1, 0, "Case 3", "text_around"),
    ("</think>x<think>\\boxed{Case 3}", 1, 0, "Case 3", "text_around"),
    ("<think>x</think>\\boxed{Case 3}\\boxed{Case 3}", 1, 0, "Case 3", "text_around"),
    # the last box is the answer
    ("<think>\\boxed{Case 1}</think>\\boxed{Case 3}", 1, 1, "Case 3", "ok"),
    ("<think>\\boxed{Case 3}</think>\\boxed{Case 1}", 0, 1, "Case 1", "ok"),
    # no answer at all
    ("<think>x</think>Case 3", 0, 0, None, "no_box"),
    ("<think>x</think>\\boxed{Case 3", 0, 0, None, "no_box"),
    ("<think>x</think>\\boxed{\\text{Case 3}}", 0, 1, "\\text{Case 3}", "ok"),
    ("<think>x</think>boxed{Case 3}", 0, 0, None, "no_box"),
    ("", 0, 0, None, "no_think"),
]


@pytest.mark.parametrize(("text", "accuracy", "form", "parsed", "reason"), TABLE)
def test_the_table_of_completions(text, accuracy, form, parsed, reason):
    grade = grade_completion(text, GOLD, stopped=True)
    assert grade == Grade(float(accuracy), float(form), parsed, reason)


def test_a_cut_off_completion_is_never_well_formed():
    assert grade_completion(RIGHT, GOLD, stopped=False) == Grade(1.0, 0.0, "Case 3", "cut_off")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\boxed{Case 3}", "ok"),
        (" \\boxed{Case 3}\n", "ok"),
        ("It is \\boxed{Case 3}", "text_around"),
        (RIGHT, "text_around"),
        ("Case 3", "no_box"),
    ],
)
def test_direct_answers_are_judged_without_a_chain_of_thought(text, reason):
    assert grade_completion(text, GOLD, stopped=True, needs_think=False).reason == reason


def test_every_reason_occurs_in_the_tables():
    reasons = {row[-1] for row in TABLE} | {"cut_off"}
    assert reasons == set(FORMAT_REASONS)


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "\\boxed{", "}", "{", "Case 3", " ", "\n"]) | st.text()
).map("".join)


@settings(max_examples=300, deadline=None)
@given(PIECES | st.text(), PIECES, st.booleans(), st.booleans())
def test_no_text_is_an_exception(text, gold, stopped, needs_think):
    grade = grade_completion(text, gold, stopped=stopped, needs_think=needs_think)
    assert grade.reason in FORMAT_REASONS
    assert grade.format == (grade.reason == "ok")
    assert grade.accuracy == (grade.parsed is not None and grade.parsed == normalize(gold))


def test_a_long_hostile_text_is_graded_too():
    # nested repetition would take for ever here
    text = "<think>" + " \\boxed{" * 20_000 + "</think>" + " " * 20_000
    assert grade_completion(text, GOLD, stopped=True).reason == "no_box"


def test_the_reward_is_the_weighted_sum():
    weights = RewardWeights()
    values = [
        reward(grade_completion(text, GOLD, stopped=True), weights)
        for text in (RIGHT, "\\boxed{Case 3}", "<think></think>\\boxed{Case 1}", "")
    ]
    assert values == pytest.approx([1.0, 0.9, 0.1, 0.0])
    only_accuracy = RewardWeights(accuracy=2.0, format=0.0)
    assert reward(grade_completion(RIGHT, GOLD, stopped=True), only_accuracy) == 2.0


@pytest.mark.parametrize(("accuracy", "form"), [(-0.1, 1.0), (1.0, -0.1), (0.0, 0.0)])
def test_senseless_weights_are_errors(accuracy, form):
    with pytest.raises(ValueError, match="must be >= 0 and not both 0"):
        RewardWeights(accuracy, form)
