"""Intervals and comparisons with numbers a reader can check on paper."""

import pytest

from trimpi_jax.evaluators.statistics import (
    break_down,
    compare_records,
    format_rate,
    mcnemar,
    paired_bootstrap,
    rate,
    wilson_interval,
)


def record(name, accuracy, answer="Case 1", **groups):
    return {"example_id": name, "accuracy": accuracy, "answer": answer, "groups": groups}


def test_wilson_by_hand():
    """k = 8 of n = 10, z = 1.96: (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10)."""
    low, high = wilson_interval(8, 10)
    centre, half = (0.8 + 0.19207) / 1.38415, 1.95996 * (0.016 + 0.0096036) ** 0.5 / 1.38415
    assert (low, high) == (
        pytest.approx(centre - half, abs=1e-4),
        pytest.approx(centre + half, abs=1e-4),
    )
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert format_rate(rate(8, 10)) == "80.0 % (8/10) [49.0, 94.3]"


def test_mcnemar_by_hand():
    """Six coins, five or more heads or tails: 2 (6 + 1) / 64."""
    assert mcnemar(5, 1) == mcnemar(1, 5) == pytest.approx(14 / 64)
    assert mcnemar(3, 3) == 1.0 and mcnemar(0, 0) == 1.0


def test_bootstrap_of_equal_differences_has_no_width_and_follows_the_seed():
    assert paired_bootstrap([1.0, 0.75], [0.5, 0.25], seed=0) == (0.5, 0.5)
    first, second = [1.0] * 30 + [0.0] * 10, [0.0] * 10 + [1.0] * 10 + [0.0] * 20
    low, high = paired_bootstrap(first, second, seed=3)
    # mean 0.5; of one difference 1 or 0 with p = 0.5 the standard error is sqrt(0.25/40) = 0.079
    assert low == pytest.approx(0.5 - 1.96 * 0.079, abs=0.03)
    assert high == pytest.approx(0.5 + 1.96 * 0.079, abs=0.03)
    assert paired_bootstrap(first, second, seed=3) == (low, high)
    with pytest.raises(ValueError, match="paired scores"):
        paired_bootstrap([], [], seed=0)


def test_models_are_compared_on_the_questions_that_both_answered():
    first = [record("a", 1.0), record("b", 0.5), record("c", 1.0), record("only", 1.0)]
    second = [record("c", 0.0), record("a", 1.0), record("b", 1.0)]
    found = compare_records(first, second)
    assert (found["count"], found["only_in_first"], found["only_in_second"]) == (3, 1, 0)
    assert (found["both_right"], found["both_wrong"]) == (1, 0)
    assert (found["first_right_only"], found["second_right_only"]) == (1, 1)
    assert found["score_difference"] == pytest.approx((0 - 0.5 + 1) / 3)
    with pytest.raises(ValueError, match="other gold answers"):
        compare_records([record("a", 1.0)], [record("a", 1.0, answer="Case 2")])
    with pytest.raises(ValueError, match="no question was asked to both"):
        compare_records([record("a", 1.0)], [record("b", 1.0)])
    with pytest.raises(ValueError, match="occur twice"):
        compare_records([record("a", 1.0)] * 2, [record("a", 1.0)])


def test_groups_are_counted_in_natural_order():
    records = [
        record("a", 1.0, leaf="Case 10", policy="L2-A"),
        record("b", 0.5, leaf="Case 2", policy="L2-A"),
        record("c", 1.0, leaf="Case 2"),
    ]
    groups = break_down(records)
    assert list(groups["leaf"]) == ["Case 2", "Case 10"]
    assert (groups["leaf"]["Case 2"]["correct"], groups["leaf"]["Case 2"]["count"]) == (1, 2)
    assert groups["leaf"]["Case 2"]["score"] == 0.75
    assert groups["policy"]["L2-A"]["count"] == 2
