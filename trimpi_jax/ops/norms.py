"""Root-mean-square normalisation.

Source: Zhang and Sennrich 2019 (arXiv:1910.07467); the order of casts of transformers'
`Qwen2RMSNorm`.
Next: trimpi_jax/ops/linear.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """y = scale * (x / sqrt(mean(x^2) + eps)), statistics in float32.

    The normalised x is cast to its own dtype before it meets the scale, as the reference does; in
    bfloat16 casting last would round differently.

    Args:
      x: [..., D].
      scale: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in the dtype of x.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normal = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normal * jnp.broadcast_to(scale.astype(x.dtype), x.shape)
