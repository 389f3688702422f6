"""Log-probabilities: numbers on paper, chunks, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.ops.logprobs import chunked_logprobs, target_logprobs


def test_hand_numbers():
    # logits (0, log 3): probabilities (1/4, 3/4); entropy log 4 - 3/4 log 3 = 0.562335
    logits = jnp.array([[0.0, np.log(3.0)], [1e4, 0.0]])
    logprobs, entropy = target_logprobs(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(logprobs, [np.log(0.75), 0.0], atol=1e-6)
    np.testing.assert_allclose(entropy, [0.562335, 0.0], atol=1e-6)


def test_gradient_is_one_hot_minus_softmax():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    targets = jnp.array([0, 4, 2])
    gradient = jax.grad(lambda z: target_logprobs(z, targets)[0].sum())(logits)
    np.testing.assert_allclose(
        gradient, jax.nn.one_hot(targets, 5) - jax.nn.softmax(logits), atol=1e-6
    )


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_chunks_change_nothing(chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((8, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 3)))

    def chunked(weight, hidden):
        logprobs, entropy = chunked_logprobs(lambda h: h @ weight, hidden, targets, chunk)
        return jnp.sum(logprobs) + 0.3 * jnp.sum(entropy * entropy)

    def whole(weight, hidden):
        logprobs = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, weight))
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)
        return jnp.sum(chosen) + 0.3 * jnp.sum(entropy * entropy)

    (value, grads), (expected, expected_grads) = (
        jax.value_and_grad(f, argnums=(0, 1))(weight, hidden) for f in (chunked, whole)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for mine, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_no_chunk_of_nothing():
    with pytest.raises(ValueError, match="at least 1 token"):
        chunked_logprobs(lambda h: h, jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), 0)
