"""Rewards that cannot stop a run by surprise: a grader that raises, or a reward that is no number.

Each such completion is counted, scored 0 and kept with its text and the reason; when more than a
set share fails, the grader itself is broken and the run ends with the reasons.

Source: paper section 4 (format and accuracy reward).
Next: trimpi_jax/objectives/advantages.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.example import Example
from trimpi_jax.grading.answers import GRADER_ERROR, Grade, RewardWeights, reward
from trimpi_jax.grading.grader import grade_completions

FAILED = "grader_failed"  # the reason of a Grade that could not be made
MAX_TEXT = 2000  # characters of a completion kept with a failure


class Failure(NamedTuple):
    """A completion that could not be graded."""

    example_id: str
    text: str
    why: str


class Rewarded(NamedTuple):
    """Grades and rewards of some completions, in their order."""

    grades: list[Grade]
    rewards: list[float]
    failures: list[Failure]


def reward_completions(
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    weights: RewardWeights,
    *,
    needs_think: bool = True,
) -> Rewarded:
    """Grade and reward; a completion whose grading fails gets 0 and a `Failure`.

    All are graded together first; only when that raises, one by one.
    """
    failures: list[Failure] = []

    def fail(i: int, why: str) -> Grade:
        failures.append(Failure(examples[i].example_id, texts[i][:MAX_TEXT], why))
        return Grade(0.0, 0.0, None, FAILED)

    try:
        grades = grade_completions(texts, examples, stopped, needs_think=needs_think)
    except Exception:  # a user's grading function may raise anything
        grades = []
        for i, (text, example, ended) in enumerate(zip(texts, examples, stopped, strict=True)):
            try:
                one = grade_completions([text], [example], [ended], needs_think=needs_think)
                grades.append(one[0])
            except Exception as error:
                grades.append(fail(i, f"{type(error).__name__}: {error}"))
    rewards = []
    for i, grade in enumerate(grades):
        if why := grade.details.get(GRADER_ERROR):  # a user's function in its own process
            grades[i] = grade = fail(i, why)
        value = reward(grade, weights)
        if not math.isfinite(value):
            grades[i] = fail(i, f"reward {value} of accuracy {grade.accuracy}")
            value = 0.0
        rewards.append(value)
    return Rewarded(grades, rewards, failures)


def check_failures(
    failures: Sequence[Failure], count: int, max_share: float, stage: str = "rl"
) -> None:
    """Raise when more than `max_share` of `count` completions could not be graded.

    Raises:
        RuntimeError: with the first reasons.
    """
    if len(failures) > max_share * count:
        reasons = "\n  ".join(f"{one.example_id}: {one.why}" for one in failures[:4])
        raise RuntimeError(
            f"{len(failures)} of {count} completions could not be graded, more than the share of"
            f" {max_share} that is allowed (--config.{stage}.max_failed_grades). The first:\n "
            f" {reasons}"
        )
