"""GRPO and DAPO: every term with numbers on paper, and what must not change the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimpi_jax.objectives.grpo import (
    ObjectiveSettings,
    clipped_surrogate,
    dapo,
    denominator_of,
    grpo,
    kl_k3,
    overlong_penalty,
    policy_rollout_loss,
    sequence_means,
    truncated_importance,
)

NO_KL = ObjectiveSettings(kl_beta=0.0)
BOTH = pytest.mark.parametrize("settings", [grpo(), dapo()], ids=["grpo", "dapo"])


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),  # inside: r A
        (1.25, 2.0, 2.5, 2.0),
        (1.5, 2.0, 2.6, 0.0),  # good and already 1.3 times as likely: no more, 1.3 * 2
        (0.5, 2.0, 1.0, 2.0),  # good and less likely than before: pull, unclipped
        (0.9, -2.0, -1.8, -2.0),
        (0.5, -2.0, -1.6, 0.0),  # bad and already below 0.8: no more, 0.8 * -2
        (1.5, -2.0, -3.0, -2.0),  # bad and more likely: push, unclipped
    ],
)
def test_the_clipped_surrogate_on_both_sides(ratio, advantage, value, slope):
    def surrogate(r):
        return clipped_surrogate(r, jnp.float32(advantage), 0.2, 0.3)

    found, gradient = jax.value_and_grad(surrogate)(jnp.float32(ratio))
    assert found == pytest.approx(value, rel=1e-6)
    assert gradient == pytest.approx(slope, rel=1e-6)


def test_k3_by_hand():
    # reference twice as likely: d = ln 2, e^d - d - 1 = 1 - 0.6931 = 0.3069
    # half as likely: d = -ln 2, 1/2 + 0.6931 - 1 = 0.1931
    logprobs = jnp.log(jnp.array([0.25, 0.5, 0.5]))
    reference = jnp.log(jnp.array([0.5, 0.25, 0.5]))
    np.testing.assert_allclose(kl_k3(logprobs, reference), [0.306853, 0.193147, 0], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k3_is_never_negative(logprob, reference):
    assert kl_k3(jnp.float32(logprob), jnp.float32(reference)) >= 0


def test_k3_keeps_its_square_for_the_smallest_differences():
    # d^2 / 2; in float32 exp(d) - d - 1 would be rounding noise of 1e-7
    assert kl_k3(jnp.float32(-1e-3), jnp.float32(0.0)) == pytest.approx(5e-7, rel=0.1)


def test_the_mean_of_a_rollout_is_over_its_own_tokens():
    values = jnp.array([[[2.0, 4.0, 99.0], [6.0, 99.0, 99.0], [99.0, 99.0, 99.0]]])
    mask = jnp.array([[[1, 1, 0], [1, 0, 0], [0, 0, 0]]], bool)
    assert sequence_means(values, mask).tolist() == [[3.0, 6.0, 0.0]]


def make_case(seed=0, prompts=4, rollouts=4, tokens=5):
    """Random log-probs, rewards and lengths."""
    rng = np.random.default_rng(seed)
    shape = (prompts, rollouts, tokens)
    logprobs, behavior, reference = (
        jnp.asarray(-rng.exponential(1.0, shape), jnp.float32) for _ in range(3)
    )
    rewards = jnp.asarray(rng.choice([0.0, 0.1, 1.0], shape[:2]), jnp.float32)
    lengths = rng.integers(1, tokens + 1, shape[:2])
    return (
        logprobs,
        behavior,
        reference,
        rewards,
        jnp.asarray(np.arange(tokens) < lengths[..., None]),
    )


@functools.partial(jax.jit, static_argnums=5)
def loss_and_gradient(logprobs, behavior, reference, rewards, mask, settings, denominator=None):
    if denominator is None:
        denominator = denominator_of(mask, jnp.ones(mask.shape[:1], bool), settings.loss_mean)

    def loss_of(x):
        anchor = reference if settings.kl_beta else None
        return policy_rollout_loss(x, behavior, anchor, None, rewards, mask, settings, denominator)

    (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(logprobs)
    return loss, metrics, gradient


def test_the_loss_of_one_group_by_hand():
    # free (0, 0) and aware (1, 1): advantages -1, -1, 1, 1. One token each, except the last: two.
    # ratios          1      0.5        2          1, 2
    # surrogate      -1     -0.8       1.3        (1 + 1.3) / 2 = 1.15
    #          (A = -1, r = 0.5: clipped at 0.8; A = 1, r = 2: clipped at 1.3)
    # loss = -(-1 - 0.8 + 1.3 + 1.15) / 4 = -0.1625
    ratios = jnp.array([[[1.0, 1], [0.5, 1], [2.0, 1], [1.0, 2.0]]])
    mask = jnp.array([[[1, 0], [1, 0], [1, 0], [1, 1]]], bool)
    behavior = jnp.full((1, 4, 2), -3.0)
    rewards = jnp.array([[0.0, 0, 1, 1]])
    loss, metrics, _ = loss_and_gradient(
        behavior + jnp.log(ratios), behavior, behavior, rewards, mask, NO_KL
    )
    assert loss == pytest.approx(-0.1625, abs=1e-5)
    assert metrics["train/clip_low_fraction"] == pytest.approx(1 / 4)
    assert metrics["train/clip_high_fraction"] == pytest.approx((1 + 0.5) / 4)


def test_the_kl_term_by_hand():
    # no reward differs, so only beta * KL is left: token KLs 0.306853 (d = ln 2) and 0
    logprobs = jnp.log(jnp.array([[[0.25, 0.5], [0.5, 0.5]]]))
    reference = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]]))
    rewards, mask = jnp.ones((1, 2)), jnp.ones((1, 2, 2), bool)
    loss, metrics, gradient = loss_and_gradient(
        logprobs, logprobs, reference, rewards, mask, ObjectiveSettings(kl_beta=0.1)
    )
    mean = 0.306853 / 2 / 2  # over the two tokens of the first rollout, then over two rollouts
    assert metrics["train/kl"] == pytest.approx(mean, rel=1e-5)
    assert loss == pytest.approx(0.1 * mean, rel=1e-5)
    # d KL / d logprob = 1 - e^d = -1: the token is made more likely
    np.testing.assert_allclose(gradient[0, 0], [-0.1 / 4, 0], atol=1e-7)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logprobs, _, _, _, mask = make_case(prompts=1)
    rewards = jnp.array([[0.0, 0, 1, 1]])
    _, _, gradient = loss_and_gradient(logprobs, logprobs, logprobs, rewards, mask, NO_KL)
    # - A_i / (2G |o_i|) on each of its tokens
    lengths = np.asarray(mask.sum(axis=-1, keepdims=True))
    advantages = np.array([-1, -1, 1, 1], np.float32)[None, :, None]
    expected = np.where(mask, -advantages / (4 * lengths), 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_a_group_without_spread_and_without_kl_moves_nothing():
    logprobs, behavior, reference, _, mask = make_case()
    loss, _, gradient = loss_and_gradient(
        logprobs, behavior, reference, jnp.ones((4, 4)), mask, NO_KL
    )
    assert loss == 0
    assert (gradient == 0).all()


def test_no_gradient_reaches_behavior_or_reference():
    logprobs, behavior, reference, rewards, mask = make_case()

    def loss_of(old, anchor):
        count = jnp.float32(16)
        return policy_rollout_loss(logprobs, old, anchor, None, rewards, mask, grpo(), count)[0]

    for gradient in jax.grad(loss_of, argnums=(0, 1))(behavior, reference):
        assert (gradient == 0).all()


def test_the_dapo_loss_of_one_group_by_hand():
    # the group above, but each of the five tokens counts the same and the upper clip is 1.28:
    # surrogates -1, -0.8, 1.28, 1, 1.28; loss = -1.76 / 5
    ratios = jnp.array([[[1.0, 1], [0.5, 1], [2.0, 1], [1.0, 2.0]]])
    mask = jnp.array([[[1, 0], [1, 0], [1, 0], [1, 1]]], bool)
    behavior = jnp.full((1, 4, 2), -3.0)
    rewards = jnp.array([[0.0, 0, 1, 1]])
    loss, metrics, _ = loss_and_gradient(
        behavior + jnp.log(ratios), behavior, behavior, rewards, mask, dapo()
    )
    assert loss == pytest.approx(-1.76 / 5, abs=1e-5)
    assert metrics["train/clip_low_fraction"] == pytest.approx(1 / 5)
    assert metrics["train/clip_high_fraction"] == pytest.approx(2 / 5)
    assert "train/kl" not in metrics


def test_dapo_weighs_tokens_and_grpo_weighs_rollouts():
    # one prompt, one short wrong and one long right answer: advantages -1 and 1
    rewards = jnp.array([[0.0, 1.0]])
    mask = jnp.array([[[1, 0, 0, 0], [1, 1, 1, 1]]], bool)
    logprobs = jnp.full((1, 2, 4), -1.0)
    by_rollout = loss_and_gradient(logprobs, logprobs, logprobs, rewards, mask, NO_KL)[2]
    by_token = loss_and_gradient(logprobs, logprobs, logprobs, rewards, mask, dapo())[2]
    np.testing.assert_allclose(by_rollout[0, :, 0], [1 / 2, -1 / 8], atol=1e-5)
    np.testing.assert_allclose(by_token[0, :, 0], [1 / 5, -1 / 5], atol=1e-5)


@BOTH
def test_without_behavior_the_actor_is_its_own(settings):
    logprobs, _, reference, rewards, mask = make_case()
    anchor = reference if settings.kl_beta else None
    count = denominator_of(mask, jnp.ones((4,), bool), settings.loss_mean)

    def loss_of(x, old):
        return policy_rollout_loss(x, old, anchor, None, rewards, mask, settings, count)[0]

    expected = jax.value_and_grad(loss_of)(logprobs, logprobs)
    found = jax.value_and_grad(lambda x: loss_of(x, None))(logprobs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


def test_truncated_importance_by_hand():
    # the sampler gave 1/2, the training graph 1/4, 1/2 and 7/8: ratios 1/2, 1, 1.75, capped at 1.5
    sampled = jnp.log(jnp.full((3,), 0.5))
    behavior = jnp.log(jnp.array([0.25, 0.5, 0.875]))
    found = truncated_importance(behavior, sampled, 1.5)
    np.testing.assert_allclose(found, [0.5, 1, 1.5], rtol=1e-6)


def test_importance_weights_scale_the_gradient_of_their_token():
    logprobs, _, _, _, mask = make_case(prompts=1)
    rewards = jnp.array([[0.0, 0, 1, 1]])
    settings = ObjectiveSettings(kl_beta=0.0, importance_cap=2.0)
    sampled = logprobs + jnp.log(2.0)  # the sampler believed twice as much: weight 1/2

    def loss_of(x, drawn, how):
        return policy_rollout_loss(x, None, None, drawn, rewards, mask, how, jnp.float32(4))

    half, metrics = jax.grad(loss_of, has_aux=True)(logprobs, sampled, settings)
    full, _ = jax.grad(loss_of, has_aux=True)(logprobs, None, NO_KL)
    np.testing.assert_allclose(half, 0.5 * full, rtol=1e-5, atol=1e-8)
    assert metrics["train/importance_mean"] == pytest.approx(0.5, rel=1e-5)
    assert metrics["train/importance_cut_fraction"] == 0


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1), (500, -1)],
)
def test_the_soft_overlong_punishment_counts_tokens(tokens, penalty):
    # at most 100 tokens, a ramp of 20
    assert overlong_penalty(jnp.int32(tokens), 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(jnp.int32(tokens), 100, 0) == 0


@BOTH
def test_what_stands_in_the_padding_changes_nothing(settings):
    logprobs, behavior, reference, rewards, mask = make_case()
    clean = loss_and_gradient(logprobs, behavior, reference, rewards, mask, settings)
    wild = [jnp.where(mask, x, fill) for x, fill in ((logprobs, -50.0), (behavior, -1e4))]
    wild_reference = jnp.where(mask, reference, 1e4)
    longer = [
        jnp.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=-9) for x in (*wild, wild_reference)
    ]
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 3)))
    loss, metrics, gradient = loss_and_gradient(*longer, rewards, mask, settings)
    np.testing.assert_allclose(loss, clean[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :-3], clean[2], rtol=1e-6)
    assert (gradient[..., -3:] == 0).all()
    for name, value in clean[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_of_prompts_add_up(parts, settings):
    case = make_case()
    loss, metrics, gradient = loss_and_gradient(*case, settings)
    whole = denominator_of(case[-1], jnp.ones((4,), bool), settings.loss_mean)
    pieces = [
        loss_and_gradient(*(leaf[i : i + 4 // parts] for leaf in case), settings, whole)
        for i in range(0, 4, 4 // parts)
    ]
    np.testing.assert_allclose(sum(piece[0] for piece in pieces), loss, rtol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([piece[2] for piece in pieces]), gradient, rtol=1e-5, atol=1e-8
    )
    for name in metrics:
        total = sum(piece[1][name] for piece in pieces)
        np.testing.assert_allclose(total, metrics[name], rtol=1e-5, atol=1e-8)


@BOTH
def test_the_order_of_rollouts_and_prompts_does_not_matter(settings):
    case = make_case()
    loss, _, gradient = loss_and_gradient(*case, settings)
    shuffled = [leaf[jnp.array([2, 0, 3, 1])][:, jnp.array([1, 3, 0, 2])] for leaf in case]
    other, _, moved = loss_and_gradient(*shuffled, settings)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    expected = np.asarray(gradient)[[2, 0, 3, 1]][:, [1, 3, 0, 2]]
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-8)


@BOTH
def test_a_group_that_only_fills_the_batch_changes_nothing(settings):
    case = make_case()
    loss, _, gradient = loss_and_gradient(*case, settings)
    # two more groups, all padding: no token counts, and they are not valid
    padded = [jnp.concatenate([leaf, leaf[:2]]) for leaf in case]
    mask = padded[-1].at[4:].set(False)
    valid = jnp.array([True] * 4 + [False] * 2)
    count = denominator_of(mask, valid, settings.loss_mean)
    other, _, moved = loss_and_gradient(*padded[:-1], mask, settings, count)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    np.testing.assert_allclose(moved[:4], gradient, rtol=1e-6)
    assert (moved[4:] == 0).all()


def test_denominators_by_hand():
    mask = jnp.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]], bool)
    both, first = jnp.array([True, True]), jnp.array([True, False])
    assert denominator_of(mask, both, "sequence") == 4
    assert denominator_of(mask, both, "token") == 9
    assert denominator_of(mask, first, "sequence") == 2
    assert denominator_of(mask, first, "token") == 3
    nothing = jnp.array([False, False])
    assert denominator_of(mask, nothing, "token") == denominator_of(mask, nothing, "sequence") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_low": 0.0}, "0 < clip_low < 1"),
        ({"clip_low": 1.0}, "0 < clip_low < 1"),
        ({"clip_high": 0.0}, "clip_high > 0"),
        ({"kl_beta": -0.1}, "kl_beta >= 0"),
        ({"loss_mean": "prompt"}, "loss_mean is one of"),
        ({"loss_mean": "token"}, "DAPO .* has no KL term"),  # kl_beta is 0.01 by default
        ({"importance_cap": 0.5}, "importance_cap is 0"),
    ],
)
def test_senseless_settings_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**changes)


def test_the_papers_constants():
    assert grpo() == ObjectiveSettings("sequence", 0.2, 0.3, kl_beta=0.01)
    assert dapo() == ObjectiveSettings("token", 0.2, 0.28, kl_beta=0.0)
