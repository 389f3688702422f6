"""Every program that a run compiles, made by the builders that the run uses, from shapes alone.

    for program in ...:  outputs = compile it;  the next program starts from the outputs' shapes

Nothing is allocated: weights, optimizer state and batches are `jax.ShapeDtypeStruct`s that say how
they lie on the mesh. What else of a stage lives on the devices while a program runs (the optimizer
state during sampling, the reference during an update) is told with it.

Next: trimpi_jax/preflight.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from trimpi_jax.inputs.batching import as_buckets
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.models.lora import add_lora, lora_axes
from trimpi_jax.rollouts.sampler import SamplerSettings, make_sampler
from trimpi_jax.sharding import batch_sharding, state_shardings
from trimpi_jax.stages.pipeline import (
    grpo_settings,
    optimizer_settings,
    rl_settings,
    step_settings,
    training_shapes,
    with_lora_scale,
)
from trimpi_jax.stages.rl import make_scorer, make_update
from trimpi_jax.stages.supervised import make_supervised_step
from trimpi_jax.stages.train_state import init_train_state, make_optimizer
from trimpi_jax.types import Batch

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """One compilation. Trees hold `jax.ShapeDtypeStruct`s."""

    name: str  # stage/what bucket
    function: Any  # what `jax.jit` returned
    arguments: tuple
    held: dict[str, Tree]  # what lives on the devices while it runs, arguments among it
    tokens: int  # token slots that one call works on
    weight_reads: float  # how often it must read all weights
    loop_steps: int = 0  # most iterations of its `while_loop`
    cache_slots: int = 0  # token slots of keys and values that an iteration reads


Programs = Generator[Program, Tree, None]


def run_programs(config: ConfigDict, model: VLMConfig, mesh: Mesh, vocabulary: int) -> Programs:
    """Programs in the order in which the run meets them; send back each one's output shapes."""
    params = place_weights(vlm.param_shapes(model), model, mesh)
    yield from _evaluation_programs(config, model, mesh, vocabulary, params)
    for stage in config.stages:
        if stage == "rl":
            yield from _rl_programs(config, model, mesh, vocabulary, params)
        else:
            yield from _supervised_programs(config, model, mesh, stage, params)


def place_weights(tree: Tree, model: VLMConfig, mesh: Mesh, *, adapters: bool = False) -> Tree:
    """The tree with the sharding of every weight, or of every part of a training state."""
    axes = vlm.logical_axes(model)
    axes = lora_axes(axes, model) if adapters else axes
    return _with_shardings(tree, state_shardings(tree, axes, mesh))


def batch_shapes(
    model: VLMConfig, mesh: Mesh, rows: int, tokens: int, windows: int, *, packed: bool = False
) -> Batch:
    """A `types.Batch` of one bucket."""
    vision = model.vision
    slots, pixels = vision.window_patches, vision.channels * vision.patch_size**2

    def leaf(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    return place_rows(
        Batch(
            tokens=leaf(jnp.int32, tokens),
            loss_mask=leaf(jnp.bool_, tokens),
            lengths=leaf(jnp.int32),
            positions=leaf(jnp.int32, 3, tokens),
            rope_delta=leaf(jnp.int32),
            visual_index=leaf(jnp.int32, tokens),
            patches=leaf(jnp.uint8, windows, slots, pixels),
            patch_hw=leaf(jnp.int32, windows, slots, 2),
            patch_segment=leaf(jnp.int32, windows, slots),
            valid=leaf(jnp.bool_),
            segments=leaf(jnp.int32, tokens) if packed else None,
        ),
        mesh,
    )


def place_rows(tree: Tree, mesh: Mesh) -> Tree:
    """The tree with its rows over the batch axes.

    Raises:
      ValueError: the rows do not divide over them.
    """
    degree = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % degree:
        raise ValueError(
            f"{rows} rows are not divisible by the {degree} devices of mesh axes ('data', 'fsdp')."
            f" Use a multiple of {degree}, or change --config.mesh."
        )
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _supervised_programs(config, model, mesh, stage, params) -> Programs:
    settings = config[stage]
    adapters = settings.trainable == "lora"
    if adapters:
        model = with_lora_scale(model, settings)
        add = functools.partial(add_lora, config=model, rank=settings.lora_rank)
        params = jax.eval_shape(lambda tree, key: add(tree, key=key), params, _key(mesh))
    optimizer = make_optimizer(optimizer_settings(settings, 1000))
    start = functools.partial(init_train_state, optimizer=optimizer, trainable=settings.trainable)
    state = place_weights(jax.eval_shape(start, params), model, mesh, adapters=adapters)
    step = make_supervised_step(model, optimizer, step_settings(config, stage))
    shapes = training_shapes(config, stage, mesh)
    packed = bool(shapes.pack_tokens)
    for rows, tokens, windows in shapes.every():
        if not packed and windows < max(shapes.window_buckets):
            continue
        batch = batch_shapes(model, mesh, rows, tokens, windows, packed=packed)
        yield Program(
            name=f"{stage}/step {f'{rows} x {tokens}' if packed else tokens}",
            function=step,
            arguments=(state, batch),
            held=_state_parts(state) | {"batch": batch},
            tokens=rows * tokens,
            weight_reads=_training_reads(config, settings),
        )


def _rl_programs(config, model, mesh, vocabulary, params) -> Programs:
    settings = config.rl
    sizes = rl_settings(config)
    step = step_settings(config, "rl")
    optimizer = make_optimizer(optimizer_settings(settings, 1000))
    start = functools.partial(init_train_state, optimizer=optimizer, trainable=step.trainable)
    state = place_weights(jax.eval_shape(start, params), model, mesh)
    used = functools.partial(cast_weights, dtype=config.dtype)
    reference = place_weights(jax.eval_shape(used, params), model, mesh)
    held = _state_parts(state) | {"reference": reference}
    group = 2 * sizes.group_size
    counts = {"free": group // 2 if sizes.policy_rollout else group, "aware": group // 2}
    if not sizes.policy_rollout:
        del counts["aware"]
    for view, count in counts.items():
        sampler = SamplerSettings(
            completions=count,
            max_new_tokens=sizes.max_new_tokens,
            temperature=sizes.temperature,
            top_p=sizes.top_p,
            dtype=step.dtype,
        )
        sample = make_sampler(model, sampler, vocabulary)
        bucket = max(config.prompt_buckets) if view == "aware" else min(config.prompt_buckets)
        prompts = batch_shapes(model, mesh, sizes.prompts, bucket, max(as_buckets(config.windows)))
        yield _sampling(f"rl/sample {view} {bucket}", sample, params, prompts, sampler, mesh, held)
    score = make_scorer(model, step)
    update = make_update(model, optimizer, grpo_settings(config), step)
    for bucket in config.row_buckets:
        for name, prompts in (("score", sizes.prompts), ("update", sizes.update_prompts)):
            rows = batch_shapes(model, mesh, prompts * group, bucket, 0)
            batch = batch_shapes(model, mesh, prompts, bucket, max(as_buckets(config.windows)))
            images = {
                part: getattr(batch, part) for part in ("patches", "patch_hw", "patch_segment")
            }
            numbers = jax.ShapeDtypeStruct((prompts * group, bucket - 1), jnp.float32)
            rewards = jax.ShapeDtypeStruct((prompts, group), jnp.float32)
            numbers, rewards = place_rows(numbers, mesh), place_rows(rewards, mesh)
            if name == "score":
                function, arguments, reads = score, (reference, rows, images), 1.0
            else:
                function = update
                arguments = (state, rows, images, rewards, numbers, numbers)
                reads = _training_reads(config, settings)
            yield Program(
                name=f"rl/{name} {bucket}",
                function=function,
                arguments=arguments,
                held=held | {"batch": arguments[1:]},
                tokens=prompts * group * bucket,
                weight_reads=reads,
            )


def _evaluation_programs(config, model, mesh, vocabulary, params) -> Programs:
    sampler = SamplerSettings(1, config.max_new_tokens, temperature=0.0, dtype=config.dtype)
    sample = make_sampler(model, sampler, vocabulary)
    for bucket in config.prompt_buckets:
        prompts = batch_shapes(
            model, mesh, config.eval.rows, bucket, max(as_buckets(config.windows))
        )
        held = {"weights": params}
        yield _sampling(f"evaluate/sample {bucket}", sample, params, prompts, sampler, mesh, held)


def _sampling(name, sample, params, prompts: Batch, sampler, mesh, held) -> Program:
    ids = place_rows(jax.ShapeDtypeStruct(prompts.lengths.shape, jnp.uint32), mesh)
    rows, length = prompts.tokens.shape
    return Program(
        name=name,
        function=sample,
        arguments=(params, prompts, _key(mesh), ids),
        held=held | {"batch": prompts},
        tokens=rows * (length + sampler.completions * sampler.max_new_tokens),
        weight_reads=1.0,
        loop_steps=sampler.max_new_tokens,
        cache_slots=rows * (length + sampler.completions * sampler.max_new_tokens),
    )


def _training_reads(config, settings) -> float:
    """Forward and backward, and once more where layers are computed again."""
    return settings.micro_batches * (2.0 if config.remat == "none" else 3.0)


def _state_parts(state) -> dict[str, Tree]:
    return {"weights": state.params, "optimizer state": state.opt_state}


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)


def _with_shardings(tree: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
