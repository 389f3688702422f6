"""The jitted step shared by VM-CPT, SFT and the base model's training: mask and data differ.

    L(theta) = - (1 / sum m) sum m_t log p_theta(x_t | x_<t)

Next: trimpi_jax/objectives/cross_entropy.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.layers import REMAT, cast_weights
from trimpi_jax.objectives.cross_entropy import masked_nll_sum
from trimpi_jax.stages.train_state import (
    Flat,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    join_params,
    split_micro_batches,
    split_params,
)
from trimpi_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """How a step is computed; the result does not depend on `micro_batches` or `remat`."""

    trainable: str
    dtype: str = "float32"
    micro_batches: int = 1  # parts of a batch, one after the other; 0 = one row a device at a time
    remat: str = "none"  # one of models.layers.REMAT
    logprob_chunk: int = 2048  # tokens a device whose logits exist at a time: 1.2 GB at V = 152k

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(
                f"remat must be one of {tuple(REMAT)}, got {self.remat!r}: set --config.remat."
            )


def row_logprobs(
    params: Any, config: VLMConfig, batch: Batch, visual: jax.Array, settings: StepSettings
) -> tuple[jax.Array, jax.Array]:
    """(logprobs, entropy) float32 [B, T - 1] of tokens 1..T-1, given the visual tokens.

    Computed for targets only (`loss_mask`), 0 elsewhere.
    """
    hidden = vlm.hidden_states(
        params,
        config,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        jnp.asarray(batch.lengths),
        visual,
        jnp.asarray(batch.visual_index),
        segments=None if batch.segments is None else jnp.asarray(batch.segments),
        dtype=settings.dtype,
        remat=settings.remat,
    )
    return vlm.token_logprobs(
        params,
        config,
        hidden[:, :-1],
        batch.tokens[:, 1:],
        settings.logprob_chunk,
        needed=batch.loss_mask[:, 1:],
    )


def make_supervised_step(
    config: VLMConfig, optimizer: optax.GradientTransformation, settings: StepSettings
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, batch) -> (state, metrics)`; the state is donated."""

    def step(state: TrainState, batch: Batch):
        trained, frozen = split_params(state.params, settings.trainable)
        frozen = cast_weights(frozen, settings.dtype)
        count = jnp.maximum(jnp.sum(batch.loss_mask[:, 1:]), 1)

        def loss_of(trained: Flat, micro: Batch):
            params = join_params(trained, frozen)
            visual = vlm.encode_images(
                params,
                config,
                micro.patches,
                micro.patch_hw,
                micro.patch_segment,
                dtype=settings.dtype,
                remat=settings.remat,
            )
            logprobs, _ = row_logprobs(params, config, micro, visual, settings)
            loss = masked_nll_sum(logprobs, micro.loss_mask[:, 1:]) / count
            return loss, {"train/loss": loss}

        gradients, metrics = accumulate_gradients(
            loss_of,
            cast_weights(trained, settings.dtype),
            split_micro_batches(batch, settings.micro_batches),
        )
        state, norm = apply_gradients(state, gradients, optimizer, settings.trainable)
        metrics |= {"train/grad_norm": norm, "train/target_tokens": count}
        return state, metrics

    return jax.jit(step, donate_argnums=0)
