"""Exact referral: scores that a reader can check against the tree by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.clevr_policy.crops import Crop
from data_pipelines.example import Example, completion_text, encode_png
from tests.data_pipelines.policy_reader import RED_CUBE
from tests.evaluators.completions import ask_about, ask_call, gold, model_texts
from trimpi_jax.evaluators.referral import (
    can_check_exactly,
    score_referral,
    summarize_referral,
)

CROP = Crop("1.1", RED_CUBE, encode_png(np.full((28, 28, 3), 99, np.uint8)))
FIRST = "Condition 1: any color red? none. False: go to Condition 1.2\n"


def score(thought, example=None):
    return score_referral(example or ask_about(), completion_text(thought, "Case 3"))


def test_the_gold_thought_is_wholly_true():
    found = score_referral(ask_about(), gold(ask_about()))
    assert (found["score"], found["cited"], found["wrong"]) == (10.0, 2, [])
    assert found["parts"] == {
        "section": [2, 2], "question": [2, 2], "branch": [1, 1], "case": [1, 1], "answer": [2, 2],
    }  # fmt: skip


def test_what_does_not_fit_the_picture_may_still_be_true_of_the_policy():
    found = score(FIRST + "Condition 1.2: any size small? none. False: respond with Case 2")
    assert found["score"] == 10.0
    assert found["parts"]["answer"] == [0, 2]  # there is a red one, and a small one


@pytest.mark.parametrize(
    ("thought", "expected", "told"),
    [
        (
            FIRST.replace("red", "blue"),
            10 * 2 / 3,
            "Condition 1 asks any color red, not color blue",
        ),
        (FIRST.replace("1.2", "1.1"), 10 * 2 / 3, "Condition 1: False leads to Condition 1.2, not"),
        (
            FIRST.replace("go to Condition 1.2", "respond with Case 2"),
            10 * 2 / 3,
            "False leads to Condition 1.2, not to Case 2",
        ),
        (
            FIRST + "Condition 1.2: any size small? x. True: respond with Case 9",
            10 * (1 + 2 / 3) / 2,
            "True leads to Case 4, not to Case 9",
        ),
        (
            FIRST + "Condition 1.5: any size small? x. True: respond with Case 4",
            5.0,
            "no Condition",
        ),
        ("Condition 1: is it red", 10 / 3, "neither True nor False"),
        ("Condition 1: any color red? x. True: and so on", 10 * 2 / 3, "not to nowhere"),
        ("It is red.", 0.0, ""),
    ],
)
def test_what_is_not_true_lowers_the_score(thought, expected, told):
    found = score(thought)
    assert found["score"] == pytest.approx(expected)
    assert told in " ".join(found["wrong"])


def test_pictures_in_the_policy_are_told_beside_the_score():
    example = ask_about(crops=(CROP,))
    assert score_referral(example, gold(example))["parts"]["pictured"] == [2, 2]
    found = score_referral(example, gold(example).replace(" (pictured)", ""))
    assert (found["score"], found["parts"]["pictured"]) == (10.0, [1, 2])


def test_numbered_rules_are_held_against_the_text():
    example = ask_call()
    rule = "Rule 7: if 250 < credits <= 750 and account_type is A or B, call OCR_v4."
    assert rule in example.policy_text
    assert score(rule + " Credits 620 is above 250.", example)["score"] == 10.0
    assert score(rule.replace("250", "300"), example)["score"] == 5.0
    assert score(f"Rule 99: be kind.\n{rule}", example)["score"] == 5.0


def test_a_step_that_no_rule_decides_has_nothing_to_cite():
    example = ask_call("Calculator", expression="1+1")
    free = dataclasses.replace(example, meta=example.meta | {"gold_cot": "I add the numbers."})
    ruled = dataclasses.replace(example, meta=example.meta | {"gold_cot": "Rule 7: so."})
    assert score("I add.", free)["score"] is None
    assert score("Rule 99: I add.", free)["score"] == 0.0
    assert score("I add.", ruled)["score"] == score("I add.", example)["score"] == 0.0
    summary = summarize_referral([score("I add.", free), score("I add.", ruled)])
    assert (summary["count"], summary["nothing_to_cite"], summary["score"]) == (1, 1, 0.0)


def test_a_policy_of_another_kind_is_an_error_that_names_the_judge():
    plain = Example("e", (), "?", "yes", policy_text="Be kind.")
    assert not can_check_exactly(plain)
    with pytest.raises(ValueError, match="use the judge"):
        score_referral(plain, "x")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(model_texts)
def test_no_text_is_an_exception(text):
    for example in (ask_about(), ask_about(crops=(CROP,)), ask_call()):
        found = score_referral(example, text)
        assert 0 <= found["score"] <= 10
        for true, checked in found["parts"].values():
            assert 0 <= true <= checked


def test_the_summary_by_hand():
    scores = [score_referral(ask_about(), gold(ask_about())), score("It is red."), score(FIRST)]
    summary = summarize_referral(scores)
    assert summary["score"] == pytest.approx(20 / 3)
    assert (summary["count"], summary["cites_nothing"], summary["all_true"]) == (3, 1, 2)
    assert summary["parts"]["branch"] == [2, 2] and summary["parts"]["answer"] == [2, 3]
    assert summary["histogram"] == {0: 1, 10: 2}
    assert summarize_referral([])["score"] is None
