"""Attention against loops in numpy, which say what it means."""

import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.ops.attention import causal_attention, segment_attention


def arrays(rng, *shapes):
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def one_query(q, keys, values):
    """[H], [S, H], [S, H] -> [H]."""
    logits = keys @ q / np.sqrt(q.size)
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum()) @ values


@pytest.mark.parametrize("length", [1, 5, 64, 65, 150])
def test_causal_with_shared_heads(length):
    rng = np.random.default_rng(length)
    q, k, v = arrays(rng, (2, length, 6, 4), (2, length, 2, 4), (2, length, 2, 4))
    out = causal_attention(*map(jnp.asarray, (q, k, v)))
    expected = np.empty_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        expected[b, t, n] = one_query(q[b, t, n], k[b, : t + 1, n // 3], v[b, : t + 1, n // 3])
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("length", [6, 130])
def test_causal_inside_segments(length):
    rng = np.random.default_rng(length)
    q, k, v = arrays(rng, (2, length, 4, 4), (2, length, 2, 4), (2, length, 2, 4))
    segment = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    segment[1, -2:] = 0  # padding
    out = np.asarray(causal_attention(*map(jnp.asarray, (q, k, v)), jnp.asarray(segment)))
    assert np.isfinite(out).all()
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(segment[b, : t + 1] == segment[b, t])
        expected = one_query(q[b, t, n], k[b, seen, n // 2], v[b, seen, n // 2])
        np.testing.assert_allclose(out[b, t, n], expected, atol=2e-6)


def test_segments():
    rng = np.random.default_rng(0)
    q, k, v = arrays(rng, *[(1, 7, 2, 4)] * 3)
    segment = np.array([[1, 1, 2, 0, 2, 2, 0]])
    out = np.asarray(segment_attention(*map(jnp.asarray, (q, k, v)), jnp.asarray(segment)))
    assert np.isfinite(out).all()
    for s in np.flatnonzero(segment[0]):
        same = segment[0] == segment[0, s]
        for n in range(2):
            expected = one_query(q[0, s, n], k[0, same, n], v[0, same, n])
            np.testing.assert_allclose(out[0, s, n], expected, atol=2e-6)
