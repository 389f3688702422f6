"""Log-probabilities and entropies of targets, without the logits of all tokens at once.

In: hidden states and the output matrix. Out: two float32 numbers per token. The logits of `chunk`
tokens live at a time, also in the backward pass, where they are computed again; tokens that do not
count never meet the matrix.

Next: trimpi_jax/models/layers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def target_logprobs(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p_v = z_v - logsumexp(z), and the entropy -sum_v p_v log p_v, both in nats.

    Args:
      logits: float32 [..., V].
      targets: int [...].

    Returns:
      (logprobs float32 [...], entropy float32 [...]).
    """
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - peak
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1)
    log_total = jnp.log(total)
    # a masked sum instead of a gather: its gradient is no scatter, and V may be sharded
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(is_target == targets[..., None], shifted, 0.0), axis=-1)
    entropy = log_total - jnp.sum(exponentials * shifted, axis=-1) / total
    return chosen - log_total, entropy


def chunked_logprobs(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    chunk: int,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`target_logprobs(head(hidden), targets)`, `chunk` tokens at a time, where they are needed.

    Rows are cut into columns, so that a batch that lies over a mesh stays where it is. With more
    than one chunk the logits are not kept for the backward pass; with `needed`, the tokens of each
    row that count go first, and a chunk without any is skipped:

        needed  . . 1 1 1 . 1 .      tokens 2 3 4 6 | 0 1 5 7
                . 1 . . . . 1 .             1 6 0 2 | 3 4 5 7     second chunk: no head

    Args:
      head: [..., D] -> float32 [..., V].
      hidden: [..., D]; the first axis is rows.
      targets: int [...].
      chunk: tokens per piece, at least 1 and rounded up to a whole column; the last is padded.
      needed: bool [...], or None for all; elsewhere the results are 0.

    Returns:
      (logprobs float32 [...], entropy float32 [...]), nats.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}.")
    shape = targets.shape
    if targets.size <= chunk:
        logprobs, entropy = target_logprobs(head(hidden), targets)
        if needed is not None:
            logprobs, entropy = (jnp.where(needed, x, 0.0) for x in (logprobs, entropy))
        return logprobs, entropy

    rows = shape[0] if len(shape) > 1 else 1
    count = math.prod(shape) // rows
    x, targets = hidden.reshape(rows, count, hidden.shape[-1]), targets.reshape(rows, count)
    wanted = jnp.ones((rows, count), bool) if needed is None else needed.reshape(rows, count)
    order = None
    if needed is not None:
        order = jnp.argsort(~wanted, axis=1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
        targets, wanted = (jnp.take_along_axis(a, order, axis=1) for a in (targets, wanted))

    width = -(-chunk // rows)
    pieces = -(-count // width)

    def cut(a):  # [R, T, ...] -> [pieces, R, width, ...]
        padding = ((0, 0), (0, pieces * width - count), *((0, 0),) * (a.ndim - 2))
        a = jnp.pad(a, padding).reshape(rows, pieces, width, *a.shape[2:])
        return jnp.swapaxes(a, 0, 1)

    @jax.checkpoint
    def piece(carry, xs):
        x, targets, wanted = xs

        def compute():
            found = target_logprobs(head(x), targets)
            return tuple(jnp.where(wanted, number, 0.0) for number in found)

        def skip():
            return (jnp.zeros(targets.shape, jnp.float32),) * 2

        if order is None:
            return carry, compute()
        return carry, jax.lax.cond(jnp.any(wanted), compute, skip)

    _, results = jax.lax.scan(piece, None, (cut(x), cut(targets), cut(wanted)))

    def uncut(a):  # [pieces, R, width] -> the shape of targets
        a = jnp.swapaxes(a, 0, 1).reshape(rows, pieces * width)[:, :count]
        if order is not None:
            a = jnp.take_along_axis(a, jnp.argsort(order, axis=1), axis=1)
        return a.reshape(shape)

    logprobs, entropy = results
    return uncut(logprobs), uncut(entropy)
