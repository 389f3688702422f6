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


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_only_what_is_needed(chunk):
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.standard_normal((3, 7, 4)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((4, 9)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 9, (3, 7)))
    needed = jnp.asarray(rng.random((3, 7)) < 0.4).at[1].set(False)

    def total(weight, hidden, **options):
        size = chunk if options else 100
        found = chunked_logprobs(lambda h: h @ weight, hidden, targets, size, **options)
        assert options == {} or all(not x[~needed].any() for x in jax.device_get(found))
        return sum(jnp.sum(jnp.where(needed, x, 0.0) * (i + 1)) for i, x in enumerate(found))

    expected = total(weight, hidden)
    np.testing.assert_allclose(total(weight, hidden, needed=needed), expected, rtol=1e-6)

    def gradients(**options):
        def loss(weight, hidden):
            size = chunk if options else 100
            found = chunked_logprobs(lambda h: h @ weight, hidden, targets, size, **options)
            return sum(jnp.sum(jnp.where(needed, x, 0.0) * (i + 1)) for i, x in enumerate(found))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(weight, hidden)

    for mine, other in zip(gradients(needed=needed), gradients(), strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_a_chunk_without_targets_never_meets_the_matrix():
    seen = []

    def head(h):
        jax.debug.callback(lambda rows: seen.append(rows.shape), h)
        return h

    hidden = jnp.ones((2, 12, 5))
    needed = jnp.zeros((2, 12), bool).at[0, 9:].set(True)  # three, at the end of one row
    chunked_logprobs(head, hidden, jnp.zeros((2, 12), jnp.int32), 4, needed)
    jax.effects_barrier()
    assert seen == [(2, 2, 5)] * 2  # two columns of two rows at a time: two chunks hold the three
