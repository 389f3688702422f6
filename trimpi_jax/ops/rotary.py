"""Rotary position embeddings: 1-D, 2-D for vision patches, and M-RoPE for mixed rows.

All three turn pairs (x_i, x_{i + H/2}) of a head by an angle; they differ only in the position that
frequency i looks at. For a head of width 8 (four frequencies f0..f3):

    1-D      p f0  p f1  p f2  p f3      p position of the token
    2-D      r f0  r f1  c f0  c f1      r, c row and column of the patch; half as many frequencies
    M-RoPE   t f0  h f1  h f2  w f3      mrope_section (1, 2, 1): one axis per frequency

Source: RoPE, Su et al. 2021 (arXiv:2104.09864); M-RoPE, Qwen2-VL (arXiv:2409.12191), as
transformers' `Qwen2_5_VLRotaryEmbedding` and `Qwen2_5_VisionRotaryEmbedding` compute them.
Next: trimpi_jax/ops/attention.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_width: int, theta: float) -> np.ndarray:
    """f_i = theta^(-2 i / H), float32 [H / 2], radians per position."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def text_angles(positions: jax.Array, head_width: int, theta: float) -> jax.Array:
    """Angles where all three axes agree: position times frequency.

    Args:
      positions: int [...].

    Returns:
      float32 [..., H / 2], radians.
    """
    wide = positions.astype(jnp.float32)
    return jnp.einsum("...,f->...f", wide, frequencies(head_width, theta))


def mrope_angles(
    positions: jax.Array, head_width: int, theta: float, section: tuple[int, int, int]
) -> jax.Array:
    """Angles of M-RoPE: frequency i follows axis `repeat((T, H, W), section)[i]`.

    Args:
      positions: int [B, 3, T], axes in the order temporal, height, width.
      section: frequencies per axis, adding up to head_width / 2.

    Returns:
      float32 [B, T, H / 2], radians.
    """
    axis_of_frequency = np.repeat(np.arange(3), section)
    followed = positions[:, axis_of_frequency, :].astype(jnp.float32)
    return jnp.einsum("bft,f->btf", followed, frequencies(head_width, theta))


def vision_angles(patch_hw: jax.Array, head_width: int, theta: float) -> jax.Array:
    """Angles of the 2-D embedding: half of the frequencies follow the row, half the column.

    Args:
      patch_hw: int [..., 2], patch row and column inside the image.

    Returns:
      float32 [..., H / 2], radians.
    """
    per_axis = jnp.einsum(
        "...a,f->...af", patch_hw.astype(jnp.float32), frequencies(head_width // 2, theta)
    )
    return per_axis.reshape(*patch_hw.shape[:-1], head_width // 2)  # [.., 2, H/4] -> [.., H/2]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each head: (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of a head.

    Args:
      x: [..., N, H].
      cos, sin: [..., H / 2], the same for all heads; cast to the dtype of x, in which it runs.

    Returns:
      [..., N, H] in the dtype of x.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos = jnp.broadcast_to(cos[..., None, :].astype(x.dtype), first.shape)
    sin = jnp.broadcast_to(sin[..., None, :].astype(x.dtype), first.shape)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
