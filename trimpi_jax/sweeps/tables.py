"""Numbers of a sweep: rows with intervals over seeds, claims with verdicts.

    a row         mean of its seeds; Student's t interval over them; with one seed, or where all
                  seeds agree to the last digit, over the questions: Wilson's interval of the right
                  answers, a bootstrap where graders give parts of a point
    a claim       the paired difference of each seed (same data, same questions), and the same
                  intervals of their mean; with one seed a paired bootstrap over the questions
    holds         the interval lies above what is claimed
    does not hold the interval lies below it
    cannot tell   it does not

In: results of `sweeps/records.py`. Out: numbers in points (0 to 100).

Next: trimpi_jax/sweeps/page.py
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimpi_jax.evaluators.statistics import paired_bootstrap, t_interval, wilson_interval
from trimpi_jax.sweeps.plan import Claim, Column, Sweep

HOLDS, FAILS, UNKNOWN, NOT_RUN = "holds", "does not hold", "cannot tell", "not run"
VERDICTS = (HOLDS, FAILS, UNKNOWN, NOT_RUN)
OVER_SEEDS, OVER_QUESTIONS = "t over seeds", "over questions"

Results = Mapping[str, Mapping[str, Any]]  # run name -> result


@dataclasses.dataclass(frozen=True)
class Value:
    """A mean in points with its 95 % interval."""

    mean: float
    low: float
    high: float
    method: str  # of the interval
    seeds: tuple[int, ...]

    @property
    def text(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the numbers say about a claim in one column (or over the depths of a variant)."""

    claim: Claim
    where: str
    verdict: str
    value: Value | None
    why: str = ""  # why there is no value


def done_records(results: Results, row: str, column: str) -> list[Mapping[str, Any]]:
    """The finished runs of a cell, by seed."""
    found = [
        record
        for record in results.values()
        if record["status"] == "done" and record["row"] == row and record["column"] == column
    ]
    return sorted(found, key=lambda record: record["seed"])


def scores_of(record: Mapping[str, Any], suite: str) -> list[float] | None:
    """The answers' scores in [0, 1], in the order of the questions; None = not asked."""
    answers = record["answers"].get(suite)
    return list(answers["scores"]) if answers else None


def cell(results: Results, row: str, column: str, suite: str) -> Value | None:
    """A row's mean accuracy (or score) in a column; None where nothing was run."""
    records = done_records(results, row, column)
    by_seed = {r["seed"]: found for r in records if (found := scores_of(r, suite))}
    if not by_seed:
        return None
    means = [100 * statistics.fmean(scores) for scores in by_seed.values()]
    seeds = tuple(by_seed)
    if _differ(means):
        low, high = t_interval(means)
        low, high = max(low, 0.0), min(high, 100.0)
        return Value(statistics.fmean(means), low, high, OVER_SEEDS, seeds)
    low, high = _over_questions([score for scores in by_seed.values() for score in scores])
    return Value(statistics.fmean(means), low, high, OVER_QUESTIONS, seeds)


def _over_questions(scores: Sequence[float]) -> tuple[float, float]:
    if all(score in (0.0, 1.0) for score in scores):
        low, high = wilson_interval(int(sum(scores)), len(scores))
    else:
        low, high = paired_bootstrap(scores, [0.0] * len(scores), seed=0)
    return 100 * low, 100 * high


def difference(
    results: Results, claim: Claim, column: str
) -> tuple[Value | None, dict[int, float], str]:
    """(mean paired difference in points, that of each seed, why there is none)."""
    suites = claim.suite, claim.second_suite or claim.suite
    first = {r["seed"]: r for r in done_records(results, claim.first, column)}
    second = {r["seed"]: r for r in done_records(results, claim.second, column)}
    seeds = sorted(first.keys() & second.keys()) if claim.second else sorted(first)
    pairs: dict[int, tuple[list[float], list[float]]] = {}
    for seed in seeds:
        a = scores_of(first[seed], suites[0])
        b = scores_of(second[seed], suites[1]) if claim.second else [0.0] * len(a or [])
        if a and b and len(a) == len(b):
            pairs[seed] = a, b
    if not pairs:
        missing = [row for row in (claim.first, claim.second) if row]
        missing = [row for row in missing if not done_records(results, row, column)]
        return None, {}, f"not run: {', '.join(missing)}" if missing else "no seed has both"
    by_seed = {
        seed: 100 * (statistics.fmean(a) - statistics.fmean(b)) for seed, (a, b) in pairs.items()
    }
    return _mean_of(by_seed, pairs), by_seed, ""


def _mean_of(
    by_seed: Mapping[int, float], pairs: Mapping[int, tuple[list[float], list[float]]]
) -> Value:
    values = list(by_seed.values())
    if _differ(values):
        return Value(statistics.fmean(values), *t_interval(values), OVER_SEEDS, tuple(by_seed))
    first = [score for a, _ in pairs.values() for score in a]
    second = [score for _, b in pairs.values() for score in b]
    low, high = paired_bootstrap(first, second, seed=0)
    return Value(statistics.fmean(values), 100 * low, 100 * high, OVER_QUESTIONS, tuple(by_seed))


def _differ(values: Sequence[float]) -> bool:
    """Whether seeds have a spread that an interval can be made of."""
    return max(values) - min(values) > 1e-9


def judge(low: float, high: float, more_than: float) -> str:
    """The verdict on `value > more_than` from the value's interval."""
    if low > more_than:
        return HOLDS
    return FAILS if high < more_than else UNKNOWN


def judge_claims(sweep: Sweep, results: Results) -> list[Verdict]:
    """Every claim in every column that it is about."""
    verdicts = []
    for claim in sweep.claims:
        columns = [c for c in sweep.columns if not claim.columns or c.name in claim.columns]
        if claim.grows:
            verdicts += _judge_growth(claim, columns, results)
            continue
        for column in columns:
            value, _, why = difference(results, claim, column.name)
            verdict = judge(value.low, value.high, claim.more_than) if value else NOT_RUN
            verdicts.append(Verdict(claim, column.label, verdict, value, why))
    return verdicts


def _judge_growth(claim: Claim, columns: Sequence[Column], results: Results) -> list[Verdict]:
    """The slope of the difference over depth, for the columns of each variant.

    Each seed has its own slope (least squares, points a question); their mean has a t interval.
    """
    variants: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        if column.depth:
            variants.setdefault(column.paper[:2], []).append(column)
    verdicts = []
    for parts in variants.values():
        where = f"{parts[0].label} to {parts[-1].label}"
        gains = {c.name: difference(results, claim, c.name)[1] for c in parts}
        run = [column for column in parts if gains[column.name]]
        if len(run) < 2:
            verdicts.append(Verdict(claim, where, NOT_RUN, None, "needs two depths"))
            continue
        seeds = sorted(set.intersection(*(set(gains[column.name]) for column in run)))
        slopes = [
            float(np.polyfit([c.depth for c in run], [gains[c.name][seed] for c in run], 1)[0])
            for seed in seeds
        ]
        if len(slopes) < 2:
            verdicts.append(Verdict(claim, where, UNKNOWN, None, "a trend needs two seeds"))
            continue
        low, high = t_interval(slopes)
        value = Value(statistics.fmean(slopes), low, high, OVER_SEEDS, tuple(seeds))
        verdicts.append(Verdict(claim, where, judge(low, high, claim.more_than), value))
    return verdicts


def mean_over_seeds(results: Results, row: str, column: str, path: Sequence[str]) -> float | None:
    """The mean of a number somewhere in the results of a cell; None where no seed has it."""
    values = []
    for record in done_records(results, row, column):
        found: Any = record
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, int | float):
            values.append(float(found))
    return statistics.fmean(values) if values else None


def interval_note(value: Value | None) -> str:
    """How many seeds, and of what kind the interval is."""
    if value is None:
        return "–"
    count = len(value.seeds)
    return f"{count} seed{'s' if count > 1 else ''}, {value.method}"
