"""How sure a result is: intervals, and two models on the same questions.

    one model     k of n right: Wilson score interval
    several seeds mean of the seeds' results: Student's t interval
    two models    n10 questions that only the first gets right, n01 that only the second does:
                  McNemar's exact test; the difference of mean scores with a paired bootstrap

In: records of `evaluators/questions.py`. Out: plain numbers. 95 % wherever nothing else is said.

Source: Wilson 1927; Student 1908; McNemar 1947, exact form; Efron & Tibshirani 1993, chapter 13
(percentiles).
Next: trimpi_jax/stages/suites.py
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, t

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = 250  # resamples in memory at a time


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson score interval at 95 %; (0, 1) without data."""
    if count == 0:
        return 0.0, 1.0
    interval = binomtest(correct, count).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def rate(correct: int, count: int) -> dict[str, Any]:
    """`{"correct", "count", "accuracy", "accuracy_low", "accuracy_high"}`."""
    low, high = wilson_interval(correct, count)
    return {
        "correct": correct,
        "count": count,
        "accuracy": correct / max(count, 1),
        "accuracy_low": low,
        "accuracy_high": high,
    }


def format_rate(found: Mapping[str, Any]) -> str:
    """`93.3 % (280/300) [89.9, 95.6]`: of what `rate` gives."""
    low, high = 100 * found["accuracy_low"], 100 * found["accuracy_high"]
    return (
        f"{100 * found['accuracy']:.1f} % ({found['correct']}/{found['count']})"
        f" [{low:.1f}, {high:.1f}]"
    )


def score_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rate` of the right answers, and `score`: the mean, where graders give parts of a point."""
    correct = sum(record["accuracy"] == 1.0 for record in records)
    total = sum(record["accuracy"] for record in records)
    return rate(correct, len(records)) | {"score": total / max(len(records), 1)}


def break_down(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per kind of group (policy, depth, leaf, family, ...) and group: `score_records`.

    What a record belongs to is `record["groups"]`, kind -> name. Groups are in natural order
    ("Case 2" before "Case 10").
    """
    members: dict[str, dict[str, list[Mapping[str, Any]]]] = collections.defaultdict(dict)
    for record in records:
        for kind, name in record["groups"].items():
            members[kind].setdefault(str(name), []).append(record)
    return {
        kind: {name: score_records(groups[name]) for name in sorted(groups, key=_natural)}
        for kind, groups in members.items()
    }


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of independent values: mean -+ t(0.975, n - 1) s / sqrt(n).

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a t interval needs at least two values, got {len(values)}")
    numbers = np.asarray(values, np.float64)
    reach = t.ppf((1 + LEVEL) / 2, len(numbers) - 1) * numbers.std(ddof=1) / len(numbers) ** 0.5
    return float(numbers.mean() - reach), float(numbers.mean() + reach)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p value that two models are right equally often on the same questions.

    Under the hypothesis each question that only one of them gets right is a fair coin, so
    p = P(|X - n/2| >= |n10 - n/2|) with X ~ Binomial(n, 1/2), n = n10 + n01. 1 without any.
    """
    count = only_first + only_second
    return float(binomtest(only_first, count, 0.5).pvalue) if count else 1.0


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of mean(first) - mean(second), resampling questions.

    Args:
        first, second: scores of the same questions in the same order; at least one.
        seed: of the resampling; equal seeds give equal intervals.
        resamples: how often.

    Raises:
        ValueError: the lengths differ, or there is no question.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"paired scores are needed, got {len(first)} and {len(second)}")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    # questions with equal differences are alike: draw how often each kind occurs
    values, counts = np.unique(differences, return_counts=True)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = rng.multinomial(len(differences), counts / len(differences), size=size)
        means.append(drawn @ values / len(differences))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def compare_records(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Any]:
    """Two models on the questions that both were asked, matched by `example_id`.

    Raises:
        ValueError: they share no question, one occurs twice, or its gold answers differ.
    """
    by_id = [_by_id(records) for records in (first, second)]
    shared = [name for name in by_id[0] if name in by_id[1]]
    if not shared:
        raise ValueError("no question was asked to both models; evaluate both on the same data")
    pairs = [(by_id[0][name], by_id[1][name]) for name in shared]
    if other := [a["example_id"] for a, b in pairs if a["answer"] != b["answer"]]:
        raise ValueError(
            f"{len(other)} questions have other gold answers in the two results, e.g. {other[:3]}:"
            " the datasets differ"
        )
    right = [(a["accuracy"] == 1.0, b["accuracy"] == 1.0) for a, b in pairs]
    scores = [[record["accuracy"] for record in side] for side in zip(*pairs, strict=True)]
    only_first, only_second = right.count((True, False)), right.count((False, True))
    low, high = paired_bootstrap(*scores, seed=seed)
    return {
        "count": len(shared),
        "only_in_first": len(by_id[0]) - len(shared),  # questions
        "only_in_second": len(by_id[1]) - len(shared),
        "both_right": right.count((True, True)),
        "first_right_only": only_first,
        "second_right_only": only_second,
        "both_wrong": right.count((False, False)),
        "mcnemar_p": mcnemar(only_first, only_second),
        "score_difference": float(np.mean(scores[0]) - np.mean(scores[1])),
        "score_difference_low": low,
        "score_difference_high": high,
    }


def _by_id(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found = {record["example_id"]: record for record in records}
    if len(found) < len(records):
        names = collections.Counter(record["example_id"] for record in records)
        twice = [name for name, times in names.items() if times > 1]
        raise ValueError(f"questions occur twice: {twice[:3]}")
    return found


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Numbers within a text in order of size."""
    parts = []
    for word in text.replace("-", " ").split():
        parts.append((0, int(word), "") if word.isdecimal() else (1, 0, word))
    return parts
