"""The masked mean negative log-likelihood, with numbers on paper."""

import jax
import jax.numpy as jnp
import numpy as np

from trimpi_jax.objectives.cross_entropy import masked_nll_mean, masked_nll_sum

LOGPROBS = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
MASK = jnp.array([[True, False, True], [False, True, False]])


def test_the_sum_and_the_mean_by_hand():
    assert masked_nll_sum(LOGPROBS, MASK) == 1 + 4 + 16
    assert masked_nll_mean(LOGPROBS, MASK) == 7  # 21 / 3: one mean over all targets, not per row


def test_nothing_to_predict_is_zero_not_nan():
    nothing = jnp.zeros_like(MASK)
    assert masked_nll_mean(LOGPROBS, nothing) == 0
    gradient = jax.grad(lambda x: masked_nll_mean(x, nothing))(LOGPROBS)
    assert (gradient == 0).all()


def test_what_is_masked_has_no_say_however_wild():
    wild = jnp.where(MASK, LOGPROBS, -jnp.inf)
    assert masked_nll_mean(wild, MASK) == 7
    gradient = jax.grad(masked_nll_mean)(wild, MASK)
    np.testing.assert_allclose(gradient, -MASK.astype(jnp.float32) / 3, rtol=1e-6)


def test_padding_changes_nothing():
    padded = jnp.pad(LOGPROBS, ((0, 3), (0, 5)), constant_values=-7.0)
    mask = jnp.pad(MASK, ((0, 3), (0, 5)))
    assert masked_nll_mean(padded, mask) == masked_nll_mean(LOGPROBS, MASK)


def test_parts_over_the_denominator_of_the_whole_add_up():
    whole = masked_nll_mean(LOGPROBS, MASK)
    parts = [masked_nll_sum(LOGPROBS[i : i + 1], MASK[i : i + 1]) / 3 for i in range(2)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
