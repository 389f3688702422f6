"""The loss of VM-CPT and of SFT: masked mean negative log-likelihood. They differ by the mask only.

    L = - (1 / sum_t m_t) sum_t m_t log p(x_t | x_<t)

`loss_mask` marks targets: mask[b, t] counts token t, predicted from position t - 1.

Source: paper section 4.
Next: trimpi_jax/stages/loop.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_nll_sum(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """- sum m log p, in nats.

    Args:
        logprobs: float32 [B, T - 1], of tokens 1..T-1.
        mask: bool [B, T - 1], the loss mask of the same tokens.
    """
    return -jnp.sum(jnp.where(mask, logprobs, 0.0))


def masked_nll_mean(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """The equation above; 0 for an empty mask."""
    return masked_nll_sum(logprobs, mask) / jnp.maximum(jnp.sum(mask), 1)
