"""A linear map over several axes, with an optional bias and an optional low-rank addition.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), for the addition.
Next: trimpi_jax/ops/rotary.py
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def linear(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    lora: tuple[jax.Array, jax.Array] | None = None,
    *,
    input_axes: int = 1,
    lora_scale: float = 1.0,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """y = x W + b + lora_scale (x A) B, summed over the last `input_axes` axes of x.

    Args:
      x: [..., *inputs].
      kernel: W [*inputs, *outputs]; cast to the dtype of x.
      bias: b [*outputs], or None.
      lora: (A [*inputs, R], B [R, *outputs]), or None.
      input_axes: how many axes `inputs` is.
      lora_scale: alpha / R.
      out_dtype: dtype in which products are accumulated and returned; that of x by default.

    Returns:
      [..., *outputs].
    """
    out_dtype = out_dtype or x.dtype
    y = _contract(x, kernel, input_axes, out_dtype)
    if lora is not None:
        low_rank = _contract(x, lora[0], input_axes, x.dtype)
        y = y + _contract(low_rank, lora[1], 1, out_dtype) * lora_scale
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(out_dtype), y.shape)
    return y


def _contract(x: jax.Array, kernel: jax.Array, axes: int, out_dtype: jnp.dtype) -> jax.Array:
    """As a product of two matrices: a sum over rows that are two axes is a slow one on CPUs."""
    rows, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    width = math.prod(kernel.shape[:axes])
    y = jax.lax.dot_general(
        x.reshape(-1, width),
        kernel.astype(x.dtype).reshape(width, -1),
        dimension_numbers=(((1,), (0,)), ((), ())),
        preferred_element_type=out_dtype,
    )
    return y.reshape(*rows, *outputs)
