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
        scale = h**-0.5
        on_trunk = jnp.where(see_trunk, on_trunk * scale, MASKED)
        on_own = jnp.where(causal[None, None, None, None], on_own * scale, MASKED)
        trunk_weights, own_weights = _joint_softmax((on_trunk, on_own), q.dtype)
        out = jnp.einsum("qkjrst,qtkh->qrskjh", trunk_weights, trunk_v)
        out = out + jnp.einsum("qkjrsu,qrukh->qrskjh", own_weights, own_v)
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
    s = own.k.shape[3]
    scale = h**-0.5
    grouped = q.reshape(prompts, completions, kv_heads, n // kv_heads, h)  # N -> K J
    # the queries of a prompt are rows of one matrix per key/value head: [Q K (G J) H]
    rows = grouped.transpose(0, 2, 1, 3, 4).reshape(prompts, kv_heads, -1, h)
    on_trunk = jnp.einsum("qkxh,qkth->qkxt", rows, trunk.k, preferred_element_type=jnp.float32)
    see_trunk = (jnp.arange(t)[None] < trunk_lengths[:, None])[:, None, None]
    parts = [_to_rows(jnp.where(see_trunk, on_trunk * scale, MASKED), completions)]
    on_own = jnp.einsum("qgkjh,qgksh->qgkjs", grouped, own.k, preferred_element_type=jnp.float32)
    see_own = (jnp.arange(s) <= step)[None, None, None, None]
    parts.append(jnp.where(see_own, on_own * scale, MASKED))
    if prefix is not None:
        assert prefix_lengths is not None
        # all queries behind a document are one matrix
        many = _to_prefix(rows, prefix.k.shape[0])
        on_prefix = jnp.einsum(
            "zkxh,zkph->zkxp", many, prefix.k, preferred_element_type=jnp.float32
        )
        see = (jnp.arange(prefix.k.shape[2])[None] < prefix_lengths[:, None])[:, None, None]
        on_prefix = jnp.where(see, on_prefix * scale, MASKED)
        parts.append(_to_rows(_from_prefix(on_prefix, prompts), completions))
    weights = _joint_softmax(parts, q.dtype)
    on_trunk = _to_matrix(weights[0])
    out = _to_rows(jnp.einsum("qkxt,qkth->qkxh", on_trunk, trunk.v), completions)
    out = out + jnp.einsum("qgkjs,qgksh->qgkjh", weights[1], own.v)
    if prefix is not None:
        many = _to_prefix(_to_matrix(weights[2]), prefix.k.shape[0])
        said = jnp.einsum("zkxp,zkph->zkxh", many, prefix.v)
        out = out + _to_rows(_from_prefix(said, prompts), completions)
    return out.reshape(prompts, completions, n, h)  # K J -> N


def _joint_softmax(parts, dtype) -> list[jax.Array]:
    """Softmax over the last axes of all parts together, in float32; weights cast to `dtype`."""
    peak = parts[0].max(axis=-1, keepdims=True)
    for part in parts[1:]:
        peak = jnp.maximum(peak, part.max(axis=-1, keepdims=True))
    exponentials = [jnp.exp(part - jax.lax.stop_gradient(peak)) for part in parts]
    total = sum(part.sum(axis=-1, keepdims=True) for part in exponentials)
    return [(part / total).astype(dtype) for part in exponentials]


def _to_rows(x: jax.Array, completions: int) -> jax.Array:
    """[Q, K, (G J), E] -> [Q, G, K, J, E]."""
    q, k, _, e = x.shape
    return x.reshape(q, k, completions, -1, e).transpose(0, 2, 1, 3, 4)


def _to_matrix(x: jax.Array) -> jax.Array:
    """[Q, G, K, J, E] -> [Q, K, (G J), E]."""
    q, _, k, _, e = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(q, k, -1, e)


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
