"""Intervals and verdicts on hand-made numbers."""

import dataclasses

import pytest

from tests.sweeps.made_sweep import make_sweep
from trimpi_jax.evaluators.statistics import t_interval
from trimpi_jax.sweeps.plan import AWARE, CHANGED, Claim
from trimpi_jax.sweeps.tables import (
    FAILS,
    HOLDS,
    NOT_RUN,
    OVER_QUESTIONS,
    OVER_SEEDS,
    UNKNOWN,
    cell,
    difference,
    judge,
    judge_claims,
)


def record(row, seed, right, count=100, column="T4", **suites):
    """A finished run with so many right answers; `suites` are others than Main."""
    answers = {"main": right, **suites}
    return {
        "status": "done",
        "row": row,
        "column": column,
        "seed": seed,
        "answers": {
            suite: {"scores": [1.0] * n + [0.0] * (count - n)} for suite, n in answers.items()
        },
    }


def make_results(*records):
    return {f"{r['column']}-s{r['seed']}-{r['row']}": r for r in records}


def verdict_of(claim, results, **changes):
    sweep = make_sweep(claims=(claim,), **changes)
    return judge_claims(sweep, results)


def test_t_interval_by_hand():
    # mean 2, s = 1, t(0.975, 2) = 4.302653, reach = 4.302653 / sqrt(3)
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    with pytest.raises(ValueError, match="at least two values, got 1"):
        t_interval([1.0])


def test_a_cell_is_the_mean_of_its_seeds_with_students_interval():
    results = make_results(*(record("cot_sft", seed, 50 + seed) for seed in (1, 2, 3)))
    value = cell(results, "cot_sft", "T4", "main")
    assert value is not None and value.seeds == (1, 2, 3) and value.method == OVER_SEEDS
    assert (value.mean, value.low, value.high) == pytest.approx((52, 49.515862, 54.484138))
    assert value.text == "52.0 [49.5, 54.5]"
    assert cell(results, "cot_sft", "T6", "main") is None
    assert cell(results, "cot_sft", "T4", CHANGED) is None


def test_an_interval_of_accuracies_stays_between_0_and_100():
    results = make_results(record("cot_sft", 0, 90), record("cot_sft", 1, 100))
    value = cell(results, "cot_sft", "T4", "main")
    assert value is not None and (value.low, value.high) == (pytest.approx(31.47, abs=0.01), 100.0)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_one_seed_or_equal_seeds_fall_back_on_the_questions(seeds):
    results = make_results(*(record("cot_sft", seed, 90) for seed in seeds))
    value = cell(results, "cot_sft", "T4", "main")
    assert value is not None and value.method == OVER_QUESTIONS and value.mean == 90
    if len(seeds) == 1:  # Wilson: (0.9 + z²/200 -+ z sqrt(0.09 / 100 + z²/40000)) / (1 + z²/100)
        assert (value.low, value.high) == pytest.approx((82.563, 94.477), abs=1e-3)
    else:
        assert 82.6 < value.low < 90 < value.high < 94.4  # twice the questions


def test_scores_that_are_parts_of_a_point_get_a_bootstrap():
    results = make_results(record("cot_sft", 0, 2))
    results["T4-s0-cot_sft"]["answers"]["main"]["scores"] = [0.5, 0.7] * 50
    value = cell(results, "cot_sft", "T4", "main")
    assert value is not None and value.mean == pytest.approx(60)
    assert 57 < value.low < 60 < value.high < 63


def test_the_three_verdicts_by_hand():
    """Differences of (1, 2, 3), (-1, -2, -3) and (-1, 0, 4) points over three seeds, t 4.302653."""
    claim = Claim("rl", "RL improves on SFT", "cot_sft_grpo", "cot_sft")
    reach = 2.484138
    for gains, verdict, ends in (
        ((4, 5, 6), HOLDS, (5 - reach, 5 + reach)),
        ((-4, -5, -6), FAILS, (-5 - reach, -5 + reach)),
        ((1, 2, 3), UNKNOWN, (2 - reach, 2 + reach)),
    ):
        results = make_results(
            *(record("cot_sft", seed, 50 + 10 * seed) for seed in range(3)),
            *(record("cot_sft_grpo", s, 50 + 10 * s + gain) for s, gain in enumerate(gains)),
        )
        first, second = verdict_of(claim, results)  # depth 4 was run, depth 6 was not
        assert first.verdict == verdict and first.value is not None
        assert (first.value.low, first.value.high) == pytest.approx(ends)
        assert (second.verdict, second.why) == (NOT_RUN, "not run: cot_sft_grpo, cot_sft")


def test_only_seeds_that_both_rows_have_are_paired():
    claim = Claim("rl", "x", "cot_sft_grpo", "cot_sft")
    results = make_results(
        *(record("cot_sft", seed, 50) for seed in (0, 1)),
        *(record("cot_sft_grpo", seed, 60 + seed) for seed in (1, 2)),
    )
    value, by_seed, _ = difference(results, claim, "T4")
    assert by_seed == pytest.approx({1: 11.0}) and value is not None
    assert value.method == OVER_QUESTIONS  # a paired bootstrap of one seed's questions
    assert 4 < value.low < 11 < value.high < 18
    results.pop("T4-s1-cot_sft")
    assert difference(results, claim, "T4") == (None, {}, "no seed has both")


def test_a_claim_may_compare_two_prompts_and_ask_for_a_margin():
    keeps = Claim("keeps", "x", "trimpi_poro_grpo", "in_context", AWARE, more_than=-5.0)
    beats = Claim("beats", "x", "trimpi_poro_grpo", "in_context", "main", AWARE)
    results = make_results(
        *(record("in_context", seed, 0, in_context=60 + seed) for seed in range(3)),
        *(record("trimpi_poro_grpo", s, 80 + 2 * s, in_context=59 + s) for s in range(3)),
    )
    assert [v.verdict for v in verdict_of(keeps, results)] == [HOLDS, NOT_RUN]
    value = verdict_of(beats, results)[0].value
    assert value is not None and value.mean == pytest.approx(21)
    # the same seeds lose 1, 1 and 1 point: no spread, so the questions decide about "none at all"
    stricter = dataclasses.replace(keeps, more_than=0.0)
    found = verdict_of(stricter, results)[0]
    assert found.verdict == UNKNOWN and found.value is not None
    assert found.value.signed.startswith("-1.0 [-2.")


def test_a_target_has_no_second_row():
    target = Claim("target", "x", "cot_sft", more_than=85.0, columns=("T6",))
    for rights, verdict in (((95, 96, 97), HOLDS), ((50, 51, 52), FAILS), ((80, 86, 92), UNKNOWN)):
        results = make_results(
            *(record("cot_sft", s, right, column="T6") for s, right in enumerate(rights))
        )
        (found,) = verdict_of(target, results)
        assert found.verdict == verdict and found.where == "Clevr-T, depth 6"


def test_growth_is_the_slope_over_depth_of_each_seed():
    grows = Claim("grows", "x", "trimpi_poro_grpo", "cot_sft_grpo", grows=True)

    def results_of(gains):
        return make_results(
            *(record("cot_sft_grpo", s, 50, column=c) for s in range(3) for c in ("T4", "T6")),
            *(
                record("trimpi_poro_grpo", s, 50 + gain, column=c)
                for s, pair in enumerate(gains)
                for c, gain in zip(("T4", "T6"), pair, strict=True)
            ),
        )

    (found,) = verdict_of(grows, results_of([(2, 10), (4, 14), (0, 12)]))
    # slopes 4, 5, 6 points a question of depth
    assert found.value is not None and found.value.mean == pytest.approx(5)
    assert found.value.low == pytest.approx(5 - 2.484138)
    assert found.verdict == HOLDS and found.where == "Clevr-T, depth 4 to Clevr-T, depth 6"
    assert verdict_of(grows, results_of([(10, 2), (14, 4), (12, 0)]))[0].verdict == FAILS
    assert verdict_of(grows, results_of([(2, 10), (10, 2), (4, 4)]))[0].verdict == UNKNOWN
    only = {n: r for n, r in results_of([(2, 10), (4, 14), (0, 12)]).items() if "T4" in n}
    assert verdict_of(grows, only)[0].verdict == NOT_RUN


def test_a_bound_on_the_claim_itself_cannot_be_told():
    assert judge(0.0, 1.0, 0.0) == judge(-1.0, 0.0, 0.0) == UNKNOWN
    assert (judge(0.1, 1.0, 0.0), judge(-1.0, -0.1, 0.0)) == (HOLDS, FAILS)


def test_failed_runs_count_for_nothing():
    results = make_results(record("cot_sft", 0, 50))
    results["T4-s0-cot_sft"]["status"] = "failed"
    assert cell(results, "cot_sft", "T4", "main") is None
