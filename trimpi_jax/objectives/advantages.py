"""Group-normalised advantages over the joint group of PolicyRollout.

    A_i = (R_i - mean(R)) / (std(R) + eps),    mean and std over all 2G rollouts of a prompt

Why one joint group: free rewards (0, 0) alone give (0, 0), no signal; joined with aware rewards
(1, 1) they give about (-1, -1, +1, +1).

Source: paper section 4; GRPO, arXiv:2402.03300.
Next: trimpi_jax/objectives/grpo.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

ADVANTAGE_EPS = 1e-6  # the paper writes epsilon without a value; rewards are of order 1


def group_advantages(rewards: jax.Array, eps: float = ADVANTAGE_EPS) -> jax.Array:
    """The equation above, with the population standard deviation.

    Args:
        rewards: float32 [Q, R], one row per prompt, R = all its rollouts (2G).
        eps: added to the standard deviation.

    Returns:
        float32 [Q, R]; zero-mean rows; a row of equal rewards gives zeros.
    """
    rewards = rewards.astype(jnp.float32)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    std = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    # rounding of the mean leaves about 1e-8 where all are equal; that is no signal
    return jnp.where(std > eps, centred / (std + eps), 0.0)
