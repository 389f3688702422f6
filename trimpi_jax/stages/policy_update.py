"""The jitted halves of an RL step: score completions, and update the actor on joint groups.

A prompt and its R completions are one row: the prompt is computed once, the completions branch off
it (models/vlm.branch_hidden_states). Group advantage, ratios, clipping and KL are one objective
over the joint group, inside one jitted program sharded over prompts.

Source: paper section 4.
Next: trimpi_jax/objectives/grpo.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.objectives.grpo import ObjectiveSettings, denominator_of, policy_rollout_loss
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import (
    Flat,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    join_params,
    split_micro_batches,
    split_params,
)
from trimpi_jax.types import Batch, GroupBatch


@dataclasses.dataclass(frozen=True)
class Distribution:
    """The distribution whose log-probabilities are computed: that of the sampler."""

    allowed: tuple[bool, ...]  # [V], see `sampler.allowed_tokens`
    temperature: float


def make_scorer(
    config: VLMConfig, distribution: Distribution, step: StepSettings
) -> Callable[[Any, Batch, jax.Array | None, jax.Array], jax.Array]:
    """A jitted `score(params, prompts, visual, completions) -> logprobs float32 [Q, R, S]`.

    `visual` [Q, M, D] may be None: then the images are encoded here.
    """

    def score(params: Any, prompts: Batch, visual: jax.Array | None, completions: jax.Array):
        params = cast_weights(params, step.dtype)

        def one(part):
            rows, tokens, seen = part
            seen = _encode(params, config, rows, step) if seen is None else seen
            return _logprobs(params, config, distribution, rows, seen, tokens, step)[0]

        parts = split_micro_batches((prompts, completions, visual), step.micro_batches)
        return _merged(jax.lax.map(one, parts))

    return jax.jit(score)


def make_update(
    config: VLMConfig,
    optimizer: optax.GradientTransformation,
    objective: ObjectiveSettings,
    distribution: Distribution,
    step: StepSettings,
    free_rollouts: int,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `update(state, groups, visual, behavior, reference)`; the state is donated.

    groups: GroupBatch, whole joint groups, since the group advantage is computed inside. visual
    [Q, M, D] where the vision tower is frozen, else None. behavior, reference float32 [Q, R, S]:
    behavior None = the actor itself, reference None where kl_beta is 0.

    Args:
        config: of the model.
        optimizer: see `make_optimizer`.
        objective: see `ObjectiveSettings`.
        distribution: of the sampler.
        step: how it is computed.
        free_rollouts: how many of the R rollouts are policy-free (the first ones).
    """

    def update(state: TrainState, groups: GroupBatch, visual, behavior, reference):
        trained, frozen = split_params(state.params, step.trainable)
        frozen = cast_weights(frozen, step.dtype)
        mask = _mask_of(groups)
        denominator = denominator_of(mask, groups.prompts.valid, objective.loss_mean)
        counts = _counts(mask, free_rollouts)

        def loss_of(trained: Flat, micro):
            part, seen, old, anchor = micro
            params = join_params(trained, frozen)
            seen = _encode(params, config, part.prompts, step) if seen is None else seen
            logprobs, entropy = _logprobs(
                params, config, distribution, part.prompts, seen, part.completions, step
            )
            here = _mask_of(part)
            old = jax.lax.stop_gradient(logprobs) if old is None else old
            is_free = (np.arange(part.rewards.shape[1]) < free_rollouts)[None, :, None]
            # aware completions were drawn from another distribution: no importance weight
            sampled = jnp.where(is_free, part.sampled_logprobs, old)
            loss, metrics = policy_rollout_loss(
                logprobs, old, anchor, sampled, part.rewards, here, objective, denominator
            )
            metrics["train/entropy"] = _masked_sum(entropy, here) / counts["all"]
            gap = old - part.sampled_logprobs
            metrics["rollouts/logprob_gap_mean"] = (
                _masked_sum(jnp.abs(gap), here & is_free) / counts["free"]
            )
            metrics["rollouts/logprob_gap_max"] = jnp.max(
                jnp.where(here & is_free, jnp.abs(gap), 0.0)
            )
            if free_rollouts < part.rewards.shape[1]:
                metrics["rollouts/aware_log_ratio_mean"] = (
                    _masked_sum(gap, here & ~is_free) / counts["aware"]
                )
            return loss, jax.lax.stop_gradient(metrics)

        micro_batches = split_micro_batches(
            (groups, visual, behavior, reference), step.micro_batches
        )
        gradients, metrics = accumulate_gradients(
            loss_of, cast_weights(trained, step.dtype), micro_batches
        )
        state, norm = apply_gradients(state, gradients, optimizer, step.trainable)
        return state, metrics | {"train/grad_norm": norm}

    return jax.jit(update, donate_argnums=0)


def _logprobs(params, config, distribution, prompts, visual, completions, step: StepSettings):
    """(logprobs, entropy) float32 [Q, R, S] of the completions after the prompts."""
    hidden = vlm.branch_hidden_states(
        params, config, prompts, visual, completions, dtype=step.dtype, remat=step.remat
    )
    return vlm.token_logprobs(
        params,
        config,
        hidden,
        completions,
        step.logprob_chunk,
        allowed=jnp.asarray(np.asarray(distribution.allowed)),
        temperature=distribution.temperature,
    )


def _encode(params, config, prompts: Batch, step: StepSettings) -> jax.Array:
    return vlm.encode_images(
        params,
        config,
        prompts.patches,
        prompts.patch_hw,
        prompts.patch_segment,
        dtype=step.dtype,
        remat=step.remat,
    )


def _mask_of(groups: GroupBatch) -> jax.Array:
    """bool [Q, R, S], True = a completion token of a real group."""
    steps = jnp.arange(groups.completions.shape[-1])[None, None]
    return (steps < groups.lengths[..., None]) & groups.prompts.valid[:, None, None]


def _counts(mask: jax.Array, free_rollouts: int) -> dict[str, jax.Array]:
    parts = {"all": mask, "free": mask[:, :free_rollouts], "aware": mask[:, free_rollouts:]}
    return {name: jnp.maximum(jnp.sum(part), 1) for name, part in parts.items()}


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, values, 0.0))


def _merged(parts: jax.Array) -> jax.Array:
    # [micro, q, ...] -> [Q, ...]; row i was in part i mod micro, see `split_micro_batches`
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
