"""Log-probabilities and entropies of targets, without the logits of all tokens at once.

In: hidden states and the output matrix. Out: two float32 numbers per token. The logits of `chunk`
tokens live at a time, also in the backward pass, where they are computed again.

Next: trimpi_jax/models/layers.py
"""

from __future__ import annotations

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
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`target_logprobs(head(hidden), targets)`, `chunk` tokens at a time.

    With more than one chunk the logits are not kept for the backward pass.

    Args:
      head: [C, D] -> float32 [C, V].
      hidden: [..., D].
      targets: int [...].
      chunk: tokens per piece, at least 1; the last piece is padded.

    Returns:
      (logprobs float32 [...], entropy float32 [...]), nats.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}.")
    shape = targets.shape
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = flat_targets.shape[0]
    if count <= chunk:
        logprobs, entropy = target_logprobs(head(flat), flat_targets)
        return logprobs.reshape(shape), entropy.reshape(shape)

    pieces = -(-count // chunk)
    padding = pieces * chunk - count
    flat = jnp.pad(flat, ((0, padding), (0, 0))).reshape(pieces, chunk, -1)
    flat_targets = jnp.pad(flat_targets, (0, padding)).reshape(pieces, chunk)

    @jax.checkpoint
    def piece(carry, xs):
        return carry, target_logprobs(head(xs[0]), xs[1])

    _, (logprobs, entropy) = jax.lax.scan(piece, None, (flat, flat_targets))
    return logprobs.reshape(-1)[:count].reshape(shape), entropy.reshape(-1)[:count].reshape(shape)
