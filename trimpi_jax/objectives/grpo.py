"""GRPO with PolicyRollout: rewards of the joint group in, loss out.

    r_it = pi(o_it | Q, I, o_i<t) / pi_old(o_it | Q, I, o_i<t)        policy-free prompt, for all 2G
    s_it = min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i)
    k_it = exp(d) - d - 1,   d = log pi_ref - log pi                   (k3 estimator of the KL)
    J    = mean over prompts (1 / 2G) sum_i (1 / |o_i|) sum_t [ s_it - beta k_it ];   loss = -J

Policy-aware completions differ from policy-free ones only in where they were sampled: every
log-probability here is under the policy-free prompt, so the gradient never sees the policy.

Source: paper section 4; GRPO, arXiv:2402.03300; k3, joschu.net/blog/kl-approx.html; clip-higher,
arXiv:2503.14476.
Next: trimpi_jax/stages/rl.py
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trimpi_jax.objectives.advantages import group_advantages

CLIP_LOW = 0.2  # paper section 4, epsilon_l
CLIP_HIGH = 0.3  # paper section 4, epsilon_h of GRPO
KL_BETA = 0.01  # paper section 4


@dataclasses.dataclass(frozen=True)
class GRPOSettings:
    """The constants of the objective."""

    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    kl_beta: float = KL_BETA

    def __post_init__(self):
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.kl_beta < 0:
            raise ValueError(f"0 < clip_low < 1, clip_high > 0, kl_beta >= 0; got {self}")


def clipped_surrogate(
    ratios: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> jax.Array:
    """min(r A, clip(r, 1 - low, 1 + high) A), per token; same shapes."""
    clipped = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.minimum(ratios * advantages, clipped * advantages)


def kl_k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = reference - current, per token, in nats; never negative."""
    difference = reference_logprobs - logprobs
    return jnp.expm1(difference) - difference


def sequence_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the tokens of each rollout: [Q, R, S] -> [Q, R]; 0 for an empty completion."""
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def grpo_loss(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array,
    reference_logprobs: jax.Array,
    rewards: jax.Array,
    mask: jax.Array,
    settings: GRPOSettings,
    num_prompts: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of (a part of) a batch of prompt groups.

    Args:
        logprobs: float32 [Q, R, S] of the actor being trained, policy-free prompt, nats.
        behavior_logprobs: float32 [Q, R, S] of the actor that the batch was sampled from,
            recomputed under the policy-free prompt.
        reference_logprobs: float32 [Q, R, S] of the KL anchor, policy-free prompt.
        rewards: float32 [Q, R] of the whole joint group.
        mask: bool [Q, R, S], True = a completion token.
        settings: clip range and beta.
        num_prompts: prompts of the whole update; the losses of its parts add up.

    Returns:
        (loss, metrics), metrics as sums that add up to the means of the update.
    """
    advantages = group_advantages(rewards)[..., None]
    behavior_logprobs = jax.lax.stop_gradient(behavior_logprobs)
    reference_logprobs = jax.lax.stop_gradient(reference_logprobs)
    log_ratios = jnp.where(mask, logprobs - behavior_logprobs, 0.0)
    ratios = jnp.exp(log_ratios)
    surrogate = clipped_surrogate(ratios, advantages, settings.clip_low, settings.clip_high)
    kl = kl_k3(logprobs, jnp.where(mask, reference_logprobs, logprobs))
    rollouts = rewards.shape[1]
    scale = 1.0 / (num_prompts * rollouts)
    loss = -jnp.sum(sequence_means(surrogate - settings.kl_beta * kl, mask)) * scale
    low = (ratios < 1.0 - settings.clip_low) & (advantages < 0)
    high = (ratios > 1.0 + settings.clip_high) & (advantages > 0)
    metrics = {
        "train/loss": loss,
        "train/kl": jnp.sum(sequence_means(kl, mask)) * scale,
        "train/clip_low_fraction": jnp.sum(sequence_means(low.astype(jnp.float32), mask)) * scale,
        "train/clip_high_fraction": jnp.sum(sequence_means(high.astype(jnp.float32), mask)) * scale,
    }
    return loss, metrics
