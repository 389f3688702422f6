"""Rotary embeddings: numbers on paper, and the properties that define them."""

import jax.numpy as jnp
import numpy as np

from trimpi_jax.ops.rotary import frequencies, mrope_angles, rotate, text_angles, vision_angles


def test_frequencies():
    np.testing.assert_allclose(frequencies(8, 10000.0), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_mrope_follows_one_axis_per_frequency():
    positions = jnp.array([[[5], [7], [9]]])  # temporal, height, width of one token
    angles = mrope_angles(positions, 8, 10000.0, (1, 2, 1))
    np.testing.assert_allclose(angles, [[[5.0, 0.7, 0.07, 0.009]]], rtol=1e-6)


def test_mrope_of_text_is_one_dimensional():
    positions = jnp.broadcast_to(jnp.arange(9), (1, 3, 9))
    np.testing.assert_array_equal(
        mrope_angles(positions, 16, 1e6, (2, 3, 3)), text_angles(jnp.arange(9)[None], 16, 1e6)
    )


def test_vision_angles_row_then_column():
    angles = vision_angles(jnp.array([[3, 4]]), 8, 10000.0)
    np.testing.assert_allclose(angles, [[3.0, 0.03, 4.0, 0.04]], rtol=1e-6)


def test_rotate_quarter_turn():
    # a quarter turn sends (a, b) to (-b, a)
    x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
    quarter = jnp.full((1, 2), np.pi / 2)
    y = rotate(x, jnp.cos(quarter), jnp.sin(quarter))
    np.testing.assert_allclose(y, [[[-3.0, -4.0, 1.0, 2.0]]], atol=1e-6)


def test_products_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 16)), jnp.float32) for _ in range(2))

    def product(at_q, at_k):
        angles = [text_angles(jnp.array(at), 16, 100.0) for at in (at_q, at_k)]
        turned = [rotate(x, jnp.cos(a), jnp.sin(a)) for x, a in zip((q, k), angles, strict=True)]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(product(3, 1) - product(13, 11)) < 1e-4
    assert abs(product(3, 1) - product(3, 2)) > 1e-3
