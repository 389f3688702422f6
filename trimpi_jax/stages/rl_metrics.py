"""What an RL step tells of everything that it sampled.

Next: trimpi_jax/stages/policy_update.py
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trimpi_jax.grading.answers import Grade
from trimpi_jax.rollouts.sampled import (
    SPREAD,
    Group,
)
from trimpi_jax.stages.rl_settings import RLSettings

# where a prompt stands among all of a step: attempt, number in its share's batch, share
Place = tuple[int, int, int]


class Outcome(NamedTuple):
    """What all processes know of a group that one has sampled: numbers and reasons, no text."""

    place: Place
    accuracy: list[float]  # [R], like the rest
    rewards: list[float]
    lengths: list[int]
    stopped: list[bool]
    reasons: list[str]


class Drawn(NamedTuple):
    """Graded groups of some prompts, and what is told of them."""

    places: list[Place]
    groups: list[Group]
    grades: list[list[Grade]]
    texts: list[list[str]]
    dropped: list[str]


def outcomes_of(part: Drawn) -> list[Outcome]:
    return [
        Outcome(
            place,
            [grade.accuracy for grade in grades],
            group.rewards.tolist(),
            group.lengths.tolist(),
            group.stopped.tolist(),
            [grade.reason for grade in grades],
        )
        for place, group, grades in zip(part.places, part.groups, part.grades, strict=True)
    ]


def as_records(part: Drawn, free: int) -> list[dict[str, Any]]:
    return [
        {
            "example_id": group.example.example_id,
            "answer": group.example.answer,
            "view": "policy_free" if i < free else "policy_aware",
            "completion": text,
            "accuracy": grade.accuracy,
            "reward": float(group.rewards[i]),
            "format": grade.reason,
        }
        for group, row, row_grades in zip(part.groups, part.texts, part.grades, strict=True)
        for i, (text, grade) in enumerate(zip(row, row_grades, strict=True))
    ]


def rollout_metrics(
    outcomes: Sequence[Outcome],
    failed: int,
    dropped: int,
    settings: RLSettings,
    attempts: int,
    used: int,
    laps: dict[str, float],
) -> dict[str, Any]:
    """Rates, lengths and failures of a step.

    Args:
        outcomes: of every prompt that was sampled and graded.
        failed: completions that could not be graded.
        dropped: prompts that fit no bucket.
        settings: of the step.
        attempts: batches of prompts that were asked for.
        used: groups that are trained on.
        laps: seconds of the step so far, "time/prefill_s" and "time/decode_s" among them.
    """
    free = settings.free_rollouts
    metrics: dict[str, Any] = {
        "rollouts/groups": used,
        "rollouts/attempts": attempts,
        "rollouts/failed_grades": failed,
        "inputs/dropped_too_long": dropped,
    }
    if not outcomes:
        return metrics
    accuracy = np.asarray([one.accuracy for one in outcomes])
    rewards = np.asarray([one.rewards for one in outcomes], np.float32)
    lengths = np.asarray([one.lengths for one in outcomes], np.int32)
    stopped = np.asarray([one.stopped for one in outcomes])
    spread = np.ptp(rewards, axis=1) > SPREAD
    free_spread = np.ptp(rewards[:, :free], axis=1) > SPREAD
    reasons = collections.Counter(reason for one in outcomes for reason in one.reasons)
    seconds = laps.get("time/prefill_s", 0.0) + laps.get("time/decode_s", 0.0)
    metrics |= {
        "rollouts/reward_mean": float(rewards.mean()),
        "rollouts/accuracy_free": float(accuracy[:, :free].mean()),
        "rollouts/zero_variance_share": float(1 - spread.mean()),
        "rollouts/completion_tokens": float(lengths.mean()),
        "rollouts/cut_off_share": float(1 - stopped.mean()),
        "rollouts/empty_share": float(((lengths <= 1) & stopped).mean()),
        "rollouts/format_share": reasons["ok"] / lengths.size,
        "rollouts/format_failures": {k: v for k, v in reasons.items() if k != "ok"},
        "rollouts/tokens_per_s": float(lengths.sum()) / max(seconds, 1e-9),
    }
    if settings.policy_rollout:
        aware = float(accuracy[:, free:].mean())
        metrics["rollouts/accuracy_aware"] = aware
        metrics["rollouts/accuracy_gap"] = aware - metrics["rollouts/accuracy_free"]
        metrics["rollouts/rescued_share"] = float((spread & ~free_spread).mean())
    return metrics
