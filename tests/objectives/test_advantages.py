"""Joint-group advantages: numbers on paper, and what must not change them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimpi_jax.objectives.advantages import ADVANTAGE_EPS, group_advantages

REWARDS = st.sampled_from([2, 4, 16]).flatmap(
    lambda count: st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0]), min_size=count, max_size=count)
)


def advantages(*rewards, **options):
    return np.asarray(group_advantages(jnp.array([rewards], jnp.float32), **options))[0]


def test_policy_rollout_makes_a_signal_where_free_rollouts_have_none():
    assert advantages(0, 0).tolist() == [0, 0]
    # joined with aware (1, 1): mean 1/2, std 1/2
    np.testing.assert_allclose(advantages(0, 0, 1, 1), [-1, -1, 1, 1], atol=1e-5)


def test_one_right_rollout_of_four():
    # mean 1/4; std = sqrt((3 * (1/4)^2 + (3/4)^2) / 4) = sqrt(3)/4; -1/sqrt(3) and sqrt(3)
    np.testing.assert_allclose(advantages(0, 0, 0, 1), [-(3**-0.5)] * 3 + [3**0.5], rtol=1e-4)


def test_the_standard_deviation_is_the_population_one():
    # 0, 1: mean 1/2, population std 1/2 (the sample std would be 0.707, giving +-0.707)
    np.testing.assert_allclose(advantages(0, 1), [-1, 1], atol=1e-5)


def test_eps_is_added_to_the_standard_deviation():
    # std 1/2, eps 1/2: +-(1/2) / 1
    np.testing.assert_allclose(advantages(0, 1, eps=0.49999), [-0.5, 0.5], atol=1e-4)
    assert ADVANTAGE_EPS < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, 1.0, 1 / 3])
@pytest.mark.parametrize("count", [3, 16])
def test_equal_rewards_are_no_signal_whatever_the_rounding(value, count):
    assert advantages(*[value] * count).tolist() == [0.0] * count


def test_groups_do_not_see_each_other():
    together = group_advantages(jnp.array([[0.0, 0, 1, 1], [5.0, 7, 7, 5]]))
    np.testing.assert_array_equal(together[0], advantages(0, 0, 1, 1))
    np.testing.assert_array_equal(together[1], advantages(5, 7, 7, 5))


def test_integer_rewards_give_float32():
    assert group_advantages(jnp.array([[0, 1]])).dtype == jnp.float32


@settings(max_examples=50, deadline=None)
@given(REWARDS)
def test_rows_have_mean_zero_and_spread_one_or_zero(rewards):
    found = advantages(*rewards)
    assert abs(found.mean()) < 1e-5
    expected = 1.0 if len(set(rewards)) > 1 else 0.0
    assert found.std() == pytest.approx(expected, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(REWARDS, st.integers(-3, 3), st.sampled_from([0.5, 2.0, 4.0]))
def test_shifting_and_scaling_rewards_changes_nothing(rewards, shift, scale):
    moved = advantages(*[scale * value + shift for value in rewards])
    # eps is not scaled: with the smallest spread here, 0.1 once in 16, that is 2e-4
    np.testing.assert_allclose(moved, advantages(*rewards), atol=5e-4)


@settings(max_examples=50, deadline=None)
@given(REWARDS, st.randoms(use_true_random=False))
def test_another_order_of_rollouts_gives_the_same_in_that_order(rewards, random):
    order = list(range(len(rewards)))
    random.shuffle(order)
    shuffled = advantages(*[rewards[i] for i in order])
    np.testing.assert_allclose(shuffled, advantages(*rewards)[order], atol=1e-5)
