"""A grader that raises, or a reward that is no number: counted, scored 0, kept; too many end it."""

import pytest

from data_pipelines.example import Example
from trimpi_jax.grading import rewards
from trimpi_jax.grading.answers import Grade, RewardWeights
from trimpi_jax.grading.rewards import FAILED, Failure, check_failures, reward_completions

EXAMPLES = [Example(f"e{i}", (), "q", "Case 1") for i in range(3)]
TEXTS = ["<think>a</think>\\boxed{Case 1}", "boom", "\\boxed{Case 1}"]


def run():
    return reward_completions(TEXTS, EXAMPLES, [True] * 3, RewardWeights())


def test_without_failures_all_are_graded_together():
    found = run()
    assert found.rewards == pytest.approx([1.0, 0.0, 0.9])
    assert found.failures == []


def test_a_grader_that_raises_for_one_completion_costs_only_that_one(monkeypatch):
    plain = rewards.grade_completions

    def grade(texts, *args, **options):
        if "boom" in texts:
            raise KeyError("no such tool")
        return plain(texts, *args, **options)

    monkeypatch.setattr(rewards, "grade_completions", grade)
    found = run()
    assert found.rewards == pytest.approx([1.0, 0.0, 0.9])
    assert found.failures == [Failure("e1", "boom", "KeyError: 'no such tool'")]
    assert [grade.reason for grade in found.grades] == ["ok", FAILED, "no_think"]


def test_a_reward_that_is_no_number_counts_as_nothing(monkeypatch):
    grades = [Grade(1.0, 1.0, "x", "ok"), Grade(float("nan"), 1.0, "x", "ok")]
    grades.append(Grade(0, 0, None, "ok"))
    monkeypatch.setattr(rewards, "grade_completions", lambda *args, **options: list(grades))
    found = run()
    assert found.rewards == [1.0, 0.0, 0.0]
    assert found.failures[0].example_id == "e1"
    assert "reward nan" in found.failures[0].why
    assert found.grades[1].accuracy == 0.0


def test_too_many_failures_end_the_run_with_their_reasons():
    failures = [Failure("e1", "boom", "KeyError: 'x'")] * 2
    check_failures(failures, 40, 0.05)
    with pytest.raises(RuntimeError, match=r"2 of 39 completions could not be graded[^$]*e1: Key"):
        check_failures(failures, 39, 0.05)
