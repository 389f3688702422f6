"""Attention of completions that continue one prompt, without a copy of the prompt for each.

    row of a tree    p p p p | a a a | b b b | c c c      one prompt, R completions (branches)
    a key is seen    by everyone    only inside its own completion, causally

The softmax runs over all keys that a query may see, in whatever pieces they lie: a common policy
document (`prefix`), the prompt (`trunk`), the completion itself. It equals attention over R full
rows exactly; nothing is approximated.

Letters beyond the house's: R completions of a prompt, J = N / K query heads that share a key/value
head, Z policy documents (each the prefix of Q / Z neighbouring prompts).

Source: tree attention as in Qwen2.5-VL's grouped queries (arXiv:2305.13245); online softmax,
arXiv:1805.02867.
Next: trimpi_jax/ops/logprobs.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trimpi_jax.ops.attention import MASKED

MIN_BLOCK = 64  # queries of a completion that are worked on together
MAX_BLOCKS = 8  # unrolled in the compiled program


@flax.struct.dataclass
class Shared:
    """Keys and values that many queries share, laid out for decoding: heads before tokens."""

    k: jax.Array  # [Q or Z, K, T, H]
    v: jax.Array  # [Q or Z, K, T, H]


def share(kv: tuple[jax.Array, jax.Array]) -> Shared:
    """(k, v) [Q, T, K, H] as `Shared`."""
    return Shared(*(leaf.transpose(0, 2, 1, 3) for leaf in kv))


def branch_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    trunk_k: jax.Array,
    trunk_v: jax.Array,
    trunk_lengths: jax.Array,
) -> jax.Array:
    """softmax over the trunk and over the own keys s <= t, for every branch.

    Args:
      q: [Q, R, S, N, H].
      k, v: [Q, R, S, K, H].
      trunk_k, trunk_v: [Q, T, K, H].
      trunk_lengths: int [Q]; trunk keys from there on are padding.

    Returns:
      [Q, R, S, N, H] in the dtype of q.
    """
    _, _, s, _, h = q.shape
    if not s:  # completions of one token: nothing is fed back
        return q
    t = trunk_k.shape[1]
    block = max(MIN_BLOCK, -(-s // MAX_BLOCKS))
    see_trunk = (jnp.arange(t)[None] < trunk_lengths[:, None])[:, None, None, None, None]
    pieces = []
    for start in range(0, s, block):
        end = min(start + block, s)
        # [Q R S N H] -> [Q R S K J H]
        grouped = q[:, :, start:end].reshape(*q.shape[:2], end - start, k.shape[3], -1, h)
        on_trunk = jnp.einsum(
            "qrskjh,qtkh->qkjrst", grouped, trunk_k, preferred_element_type=jnp.float32
        )
        own_k, own_v = k[:, :, :end], v[:, :, :end]
        on_own = jnp.einsum(
            "qrskjh,qrukh->qkjrsu", grouped, own_k, preferred_element_type=jnp.float32
        )
        causal = np.arange(end)[None, :] <= np.arange(start, end)[:, None]
        parts = []
        for logits, see, values, axes in (
            (on_trunk, see_trunk, trunk_v, "qkjrst,qtkh->qkjrsh"),
            (on_own, causal[None, None, None, None], own_v, "qkjrsu,qrukh->qkjrsh"),
        ):
            weights, total, peak = _exponentials(logits, see, h, q.dtype)
            parts.append((jnp.einsum(axes, weights, values), total, peak))
        out = _merge(parts, q.dtype).transpose(0, 3, 4, 1, 2, 5)  # [Q K J R S H] -> [Q R S K J H]
        pieces.append(out.reshape(*q.shape[:2], end - start, -1, h))  # K J -> N
    return jnp.concatenate(pieces, axis=2) if len(pieces) > 1 else pieces[0]


def decode_attention(
    q: jax.Array,
    own: Shared,
    step: jax.Array,
    trunk: Shared,
    trunk_lengths: jax.Array,
    prefix: Shared | None = None,
    prefix_lengths: jax.Array | None = None,
) -> jax.Array:
    """One decoding step of G completions of Q prompts; `Z` prefixes serve Q / Z prompts each.

    Args:
      q: [Q, G, N, H], one query per completion.
      own: [Q, G, K, S, H] keys and values of the completions, slot `step` already written.
      step: int scalar; own slots up to it are seen.
      trunk: [Q, K, T, H] of the prompts.
      trunk_lengths: int [Q].
      prefix: [Z, K, P, H] of what stands before the prompts, or None.
      prefix_lengths: int [Z].

    Returns:
      [Q, G, N, H] in the dtype of q.
    """
    prompts, completions, n, h = q.shape
    kv_heads, t = trunk.k.shape[1:3]
    grouped = q.reshape(prompts, completions, kv_heads, n // kv_heads, h)  # N -> K J
    # the queries of a prompt are rows of one matrix per key/value head: [Q K (G J) H]
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(prompts, kv_heads, -1, h)

    see_own = (jnp.arange(own.k.shape[3]) <= step)[None, None, None, None]
    logits = jnp.einsum("qgkjh,qgksh->qgkjs", grouped, own.k, preferred_element_type=jnp.float32)
    weights, total, peak = _exponentials(logits, see_own, h, q.dtype)
    parts = [(jnp.einsum("qgkjs,qgksh->qgkjh", weights, own.v), total, peak)]

    see_trunk = (jnp.arange(t)[None] < trunk_lengths[:, None])[:, None, None]
    said = _attend_shared(rows, trunk, see_trunk, q.dtype)
    parts.append(_each(said, lambda leaf: _to_rows(leaf, completions)))
    if prefix is not None:
        assert prefix_lengths is not None
        # all queries behind a document are one matrix
        many = _to_prefix(rows, prefix.k.shape[0])
        see = (jnp.arange(prefix.k.shape[2])[None] < prefix_lengths[:, None])[:, None, None]
        said = _attend_shared(many, prefix, see, q.dtype)
        parts.append(_each(said, lambda leaf: _to_rows(_from_prefix(leaf, prompts), completions)))
    return _merge(parts, q.dtype).reshape(prompts, completions, n, h)  # K J -> N


Part = tuple[jax.Array, jax.Array, jax.Array]  # (sum of e^(z - peak) v, sum of e^(z - peak), peak)


def _attend_shared(rows: jax.Array, shared: Shared, see: jax.Array, dtype) -> Part:
    """Unnormalised attention of [Z, K, X, H] queries to keys that all of a Z share."""
    logits = jnp.einsum("zkxh,zkth->zkxt", rows, shared.k, preferred_element_type=jnp.float32)
    weights, total, peak = _exponentials(logits, see, rows.shape[-1], dtype)
    return jnp.einsum("zkxt,zkth->zkxh", weights, shared.v), total, peak


def _exponentials(logits: jax.Array, see: Any, width: int, dtype) -> Part:
    """(e^((z - peak) / sqrt(width)) in `dtype`, its sum and the scaled peak in float32)."""
    masked = jnp.where(see, logits, MASKED)
    peak = jax.lax.stop_gradient(masked.max(axis=-1, keepdims=True))
    weights = jnp.exp((masked - peak) * width**-0.5)
    return weights.astype(dtype), weights.sum(axis=-1, keepdims=True), peak * width**-0.5


def _merge(parts: Sequence[Part], dtype) -> jax.Array:
    """One softmax over the keys of all parts, from what each made alone."""
    peak = functools.reduce(jnp.maximum, (part[2] for part in parts))
    scales = [jnp.exp(part[2] - peak) for part in parts]
    said = [part[0].astype(jnp.float32) * scale for part, scale in zip(parts, scales, strict=True)]
    total = [part[1] * scale for part, scale in zip(parts, scales, strict=True)]
    return (functools.reduce(jnp.add, said) / functools.reduce(jnp.add, total)).astype(dtype)


def _each(part: Part, change: Callable[[jax.Array], jax.Array]) -> Part:
    return change(part[0]), change(part[1]), change(part[2])


def _to_rows(x: jax.Array, completions: int) -> jax.Array:
    """[Q, K, (G J), E] -> [Q, G, K, J, E]."""
    q, k, _, e = x.shape
    return x.reshape(q, k, completions, -1, e).transpose(0, 2, 1, 3, 4)


def _to_prefix(x: jax.Array, prefixes: int) -> jax.Array:
    """[(Z c), K, X, E] -> [Z, K, (c X), E]."""
    q, k, _, e = x.shape
    x = x.reshape(prefixes, q // prefixes, k, -1, e)
    return x.transpose(0, 2, 1, 3, 4).reshape(prefixes, k, -1, e)


def _from_prefix(x: jax.Array, prompts: int) -> jax.Array:
    """[Z, K, (c X), E] -> [(Z c), K, X, E]."""
    z, k, _, e = x.shape
    x = x.reshape(z, k, prompts // z, -1, e)
    return x.transpose(0, 2, 1, 3, 4).reshape(prompts, k, -1, e)
