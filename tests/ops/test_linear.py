"""The linear map: several axes, bias, low-rank addition, accumulation dtype."""

import jax.numpy as jnp
import numpy as np

from trimpi_jax.ops.linear import linear


def test_hand_numbers():
    x = jnp.array([[1.0, 2.0]])
    kernel = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    a, b = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, -1.0]])
    np.testing.assert_allclose(linear(x, kernel), [[1.0, 6.0]])
    np.testing.assert_allclose(linear(x, kernel, jnp.array([10.0, 20.0])), [[11.0, 26.0]])
    # x A = 3, times B and 0.5: (1.5, -1.5) on top
    np.testing.assert_allclose(linear(x, kernel, None, (a, b), lora_scale=0.5), [[2.5, 4.5]])


def test_axes():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)  # [B T N H]
    out = rng.standard_normal((4, 5, 6)).astype(np.float32)  # [N H D]
    into = rng.standard_normal((6, 4, 5)).astype(np.float32)  # [D N H]
    y = linear(jnp.asarray(x), jnp.asarray(out), input_axes=2)
    np.testing.assert_allclose(y, np.einsum("btnh,nhd->btd", x, out), atol=1e-5)
    z = linear(y, jnp.asarray(into))
    np.testing.assert_allclose(z, np.einsum("btd,dnh->btnh", y, into), atol=1e-4)


def test_low_precision_can_accumulate_in_float32():
    x, kernel = jnp.ones((1, 512), jnp.bfloat16), jnp.full((512, 1), 1.0 + 2**-7)
    y = linear(x, kernel, out_dtype=jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, [[516.0]])
    assert linear(x, kernel).dtype == jnp.bfloat16
