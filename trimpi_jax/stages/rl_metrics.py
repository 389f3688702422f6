"""What an RL step tells of everything that it sampled.

Next: trimpi_jax/stages/policy_update.py
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trimpi_jax.grading.answers import Grade
from trimpi_jax.grading.rewards import Failure
from trimpi_jax.rollouts.sampled import (
    SPREAD,
    Group,
)
from trimpi_jax.stages.rl_settings import RLSettings


class Drawn(NamedTuple):
    """Graded groups of one attempt, and what is told of them."""

    groups: list[Group]
    grades: list[list[Grade]]
    texts: list[list[str]]
    failures: list[Failure]
    dropped: list[str]


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
    drawn: Sequence[Drawn], settings: RLSettings, attempts: int, used: int, laps: dict[str, float]
) -> dict[str, Any]:
    """Rates, lengths and failures of a step.

    Args:
        drawn: every batch of prompts that was sampled and graded.
        settings: of the step.
        attempts: batches of prompts that were asked for.
        used: groups that are trained on.
        laps: seconds of the step so far, "time/prefill_s" and "time/decode_s" among them.
    """
    free = settings.free_rollouts
    grades = [row for part in drawn for row in part.grades]
    groups = [group for part in drawn for group in part.groups]
    metrics: dict[str, Any] = {
        "rollouts/groups": used,
        "rollouts/attempts": attempts,
        "rollouts/failed_grades": sum(len(part.failures) for part in drawn),
        "inputs/dropped_too_long": sum(len(part.dropped) for part in drawn),
    }
    if not groups:
        return metrics
    accuracy = np.asarray([[grade.accuracy for grade in row] for row in grades])
    rewards = np.stack([group.rewards for group in groups])
    lengths = np.stack([group.lengths for group in groups])
    stopped = np.stack([group.stopped for group in groups])
    spread = np.ptp(rewards, axis=1) > SPREAD
    free_spread = np.ptp(rewards[:, :free], axis=1) > SPREAD
    reasons = collections.Counter(grade.reason for row in grades for grade in row)
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
