"""RMS norm: numbers on paper, eps where it matters, the order of casts."""

import jax.numpy as jnp
import numpy as np

from trimpi_jax.ops.norms import rms_norm


def test_hand_numbers():
    # mean square of (3, 4) is 12.5; 3 / sqrt(12.5) = 0.848528, 4 / sqrt(12.5) = 1.131371
    y = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(y, [[0.848528, 2.262742]], rtol=1e-6)


def test_eps_shows_in_tiny_activations():
    # x = 1e-3: mean square 1e-6 equals eps, so y = 1 / sqrt(2); with eps 1e-5 it would be 0.3015
    x = jnp.full((1, 8), 1e-3)
    np.testing.assert_allclose(rms_norm(x, jnp.ones(8), 1e-6), np.full((1, 8), 0.5**0.5), rtol=1e-5)
    np.testing.assert_allclose(rms_norm(x, jnp.ones(8), 1e-5), np.full((1, 8), 0.301511), rtol=1e-5)


def test_bfloat16_rounds_before_the_scale():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.bfloat16)
    scale = jnp.asarray(np.random.default_rng(1).standard_normal(64), jnp.float32)
    wide = np.asarray(x, np.float32)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    expected = jnp.asarray(normal).astype(jnp.bfloat16) * jnp.tile(
        scale.astype(jnp.bfloat16), (4, 1)
    )
    y = rms_norm(x, scale, 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))
