"""GRPO and DAPO with PolicyRollout: rewards of the joint group in, loss out.

    r_it = pi(o_it | Q, I, o_i<t) / pi_old(o_it | Q, I, o_i<t)        policy-free prompt, for all 2G
    s_it = min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i)
    k_it = exp(d) - d - 1,   d = log pi_ref - log pi                   (k3 estimator of the KL)

    GRPO   J = mean over rollouts (1 / |o_i|) sum_t [ s_it - beta k_it ]        sequence mean
    DAPO   J = (1 / sum_i |o_i|) sum_i sum_t s_it                               token mean, no KL

    loss = -J. In both, rollouts are those of all prompts of the update.

Policy-aware completions differ from policy-free ones only in where they were sampled: every
log-probability here is under the policy-free prompt, so the gradient never sees the policy.

Source: paper section 4; GRPO, arXiv:2402.03300; k3, joschu.net/blog/kl-approx.html; clip-higher,
token mean, soft overlong punishment and dynamic sampling, arXiv:2503.14476; truncated importance
sampling, fengyao.notion.site/off-policy-rl.
Next: trimpi_jax/stages/rl.py
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from trimpi_jax.objectives.advantages import group_advantages

CLIP_LOW = 0.2  # paper section 4, epsilon_l
CLIP_HIGH = 0.3  # paper section 4, epsilon_h of GRPO
CLIP_HIGH_DAPO = 0.28  # paper section 4 and arXiv:2503.14476
KL_BETA = 0.01  # paper section 4
MEANS = ("sequence", "token")


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """The constants of the objective; `grpo()` and `dapo()` are the paper's.

    `importance_cap` C > 0 multiplies the surrogate of a token by min(pi_old / pi_sampler, C), the
    probability that the training graph gives it over the one it was sampled with.
    """

    loss_mean: str = "sequence"  # "sequence" (GRPO) or "token" (DAPO)
    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    kl_beta: float = KL_BETA
    importance_cap: float = 0.0  # 0 = off

    def __post_init__(self):
        problems = []
        if self.loss_mean not in MEANS:
            problems.append(f"loss_mean is one of {MEANS}")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0 or self.kl_beta < 0:
            problems.append("0 < clip_low < 1, clip_high > 0, kl_beta >= 0")
        if self.loss_mean == "token" and self.kl_beta:
            problems.append("DAPO (loss_mean token) has no KL term: kl_beta must be 0")
        if self.importance_cap and self.importance_cap < 1:
            problems.append("importance_cap is 0 (off) or >= 1")
        if problems:
            raise ValueError(f"objective: {'; '.join(problems)}; got {self}")


def grpo() -> ObjectiveSettings:
    """The paper's GRPO."""
    return ObjectiveSettings()


def dapo() -> ObjectiveSettings:
    """The paper's DAPO."""
    return ObjectiveSettings("token", CLIP_LOW, CLIP_HIGH_DAPO, kl_beta=0.0)


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


def truncated_importance(
    behavior_logprobs: jax.Array, sampled_logprobs: jax.Array, cap: float
) -> jax.Array:
    """min(pi_old / pi_sampler, cap) per token, a constant for the gradient."""
    ratio = jnp.exp(behavior_logprobs - sampled_logprobs)
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def overlong_penalty(lengths: jax.Array, max_tokens: int, soft_tokens: int) -> jax.Array:
    """DAPO's soft overlong punishment in [-1, 0], added to the reward.

        0                                  |o| <= max - soft
        (max - soft - |o|) / soft          up to max
        -1                                 beyond, or cut off at max

    Args:
        lengths: int [...] tokens of each completion, its stop token included; a completion that
            was cut off counts as max + 1 tokens.
        max_tokens: the longest completion that is not punished in full.
        soft_tokens: width of the ramp; 0 = no punishment.
    """
    if not soft_tokens:
        return jnp.zeros(jnp.shape(lengths), jnp.float32)
    over = jnp.asarray(lengths, jnp.float32) - (max_tokens - soft_tokens)
    return -jnp.clip(over / soft_tokens, 0.0, 1.0)


def sequence_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the tokens of each rollout: [Q, R, S] -> [Q, R]; 0 for an empty completion."""
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1), 1)


def total_of(values: jax.Array, mask: jax.Array, loss_mean: str) -> jax.Array:
    """What the update's denominator divides: a sum over rollouts of means, or over all tokens."""
    if loss_mean == "sequence":
        return jnp.sum(sequence_means(values, mask))
    return jnp.sum(jnp.where(mask, values, 0.0))


def denominator_of(mask: jax.Array, valid: jax.Array, loss_mean: str) -> jax.Array:
    """Rollouts ("sequence") or tokens ("token") of a whole update; at least 1.

    Args:
        mask: bool [Q, R, S], True = a completion token.
        valid: bool [Q], False = a group that only fills the batch.
    """
    mask = mask & valid[:, None, None]
    if loss_mean == "token":
        return jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
    return jnp.maximum(jnp.sum(valid) * mask.shape[1], 1).astype(jnp.float32)


def policy_rollout_loss(
    logprobs: jax.Array,
    behavior_logprobs: jax.Array | None,
    reference_logprobs: jax.Array | None,
    sampled_logprobs: jax.Array | None,
    rewards: jax.Array,
    mask: jax.Array,
    settings: ObjectiveSettings,
    denominator: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of (a part of) an update.

    Args:
        logprobs: float32 [Q, R, S] of the actor being trained, policy-free prompt, nats.
        behavior_logprobs: float32 [Q, R, S] of the actor that the batch was sampled from,
            recomputed under the policy-free prompt; None = the actor itself (the first update
            after sampling): all ratios are 1, and only their gradient counts.
        reference_logprobs: float32 [Q, R, S] of the KL anchor, policy-free prompt; None when
            kl_beta is 0.
        sampled_logprobs: float32 [Q, R, S] with which the sampler drew the tokens; where they are
            from another prompt, equal to `behavior_logprobs` (weight 1). None when
            importance_cap is 0.
        rewards: float32 [Q, R] of the whole joint group.
        mask: bool [Q, R, S], True = a completion token that counts.
        settings: the constants.
        denominator: of the whole update, from `denominator_of`; the losses of its parts add up.

    Returns:
        (loss, metrics), metrics as sums that add up to the means of the update.
    """
    advantages = group_advantages(rewards)[..., None]
    behavior = logprobs if behavior_logprobs is None else behavior_logprobs
    behavior = jax.lax.stop_gradient(behavior)
    log_ratios = jnp.where(mask, logprobs - behavior, 0.0)
    ratios = jnp.exp(log_ratios)
    value = clipped_surrogate(ratios, advantages, settings.clip_low, settings.clip_high)
    low = (ratios < 1.0 - settings.clip_low) & (advantages < 0)
    high = (ratios > 1.0 + settings.clip_high) & (advantages > 0)
    metrics = {"train/clip_low_fraction": low, "train/clip_high_fraction": high}
    if settings.importance_cap:
        assert sampled_logprobs is not None
        sampled = jnp.where(mask, sampled_logprobs, behavior)
        weights = truncated_importance(behavior, sampled, settings.importance_cap)
        value = weights * value
        metrics["train/importance_mean"] = weights
        metrics["train/importance_cut_fraction"] = weights >= settings.importance_cap
    if settings.kl_beta:
        assert reference_logprobs is not None
        reference = jax.lax.stop_gradient(reference_logprobs)
        kl = kl_k3(logprobs, jnp.where(mask, reference, logprobs))
        value = value - settings.kl_beta * kl
        metrics["train/kl"] = kl

    def mean(values):
        return total_of(values.astype(jnp.float32), mask, settings.loss_mean) / denominator

    loss = -mean(value)
    return loss, {"train/loss": loss} | {name: mean(part) for name, part in metrics.items()}
