"""Attention in plain array maths: the reference every faster kernel must equal.

Letters beyond the house's: J = N / K query heads that share a key/value head. Logits and softmax
are float32. A masked logit is a large finite number, so a row without any key gives finite junk
(an average of all values) and never NaN; such rows are padding and masked later.

Source: scaled dot-product attention (arXiv:1706.03762) with grouped queries (arXiv:2305.13245).
Next: trimpi_jax/ops/kernels.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # exp(MASKED - max) is exactly 0 in float32 for any max a model produces
MIN_CAUSAL_BLOCK = 64  # queries; smaller matrices cost more to start than they save
MAX_CAUSAL_BLOCKS = 8  # unrolled in the compiled program; saves 7/16 of the dense work


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over keys s <= t; key/value heads are shared by N / K queries.

    Right padding needs no mask of its own: a real query never looks to the right. Queries go in up
    to eight blocks, each with only the keys it may see, which saves almost half of the work:

        T = 4, two blocks     block 0  # .        block 1  # # # .
                                       # #                 # # # #

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H].
      segment: int [B, T] of rows packed of several; a query sees its own segment only.

    Returns:
      [B, T, N, H] in the dtype of q.
    """
    t = q.shape[1]
    block = max(MIN_CAUSAL_BLOCK, -(-t // MAX_CAUSAL_BLOCKS))
    pieces = []
    for start in range(0, t, block):
        end = min(start + block, t)
        visible = np.arange(end)[None, :] <= np.arange(start, end)[:, None]
        visible = visible[None]
        if segment is not None:
            visible = visible & (segment[:, start:end, None] == segment[:, None, :end])
        pieces.append(_attend(q[:, start:end], k[:, :end], v[:, :end], visible))
    return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
    """Attention in both directions inside each segment.

    Args:
      q, k, v: [B, S, N, H].
      segment: int [B, S]; 0 is an empty slot, which no query sees.

    Returns:
      [B, S, N, H] in the dtype of q.
    """
    same = segment[:, :, None] == segment[:, None, :]
    visible = same & (segment > 0)[:, None, :]
    return _attend(q, k, v, visible)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | np.ndarray) -> jax.Array:
    """Dense attention; `visible` is bool [B, T, S] or [1, T, S]."""
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    shared = n // kv_heads
    # the J queries of a key/value head become rows of one matrix: [B T N H] -> [B K (J T) H]
    q = q.reshape(b, t, kv_heads, shared, h).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b, kv_heads, shared * t, h)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B S K H] -> [B K S H]
    logits = jnp.einsum("bkxh,bksh->bkxs", q, k, preferred_element_type=jnp.float32)
    visible = jnp.tile(visible, (1, shared, 1))[:, None]  # [B T S] -> [B 1 (J T) S]
    logits = jnp.where(visible, logits * h**-0.5, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkxs,bksh->bkxh", weights, v).reshape(b, kv_heads, shared, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)  # [B K J T H] -> [B T N H]
