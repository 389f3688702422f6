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
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.groups import plan_chunks
from trimpi_jax.rollouts.sampler import (
    Prefix,
    allowed_tokens,
    make_prefix_reader,
    make_sampler,
    make_weight_sync,
)
from trimpi_jax.sharding import batch_sharding, param_shardings, state_shardings
from trimpi_jax.stages.pipeline import (
    optimizer_settings,
    rl_objective,
    rl_settings,
    step_settings,
    training_shapes,
    with_lora_scale,
)
from trimpi_jax.stages.policy_update import Distribution, make_scorer, make_update
from trimpi_jax.stages.supervised import make_supervised_step
from trimpi_jax.stages.train_state import (
    init_train_state,
    join_params,
    make_optimizer,
    split_params,
)
from trimpi_jax.types import Batch, GroupBatch

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
    objective = rl_objective(config)
    held = _state_parts(state)
    anchor = params
    if objective.kl_beta:
        trained, frozen = split_params(params, step.trainable)
        used = jax.eval_shape(functools.partial(cast_weights, dtype=step.dtype), trained)
        anchor = place_weights(join_params(used, frozen), model, mesh)
        held["reference"] = split_params(anchor, step.trainable)[0]
    weights = yield from _sync_program("rl", model, mesh, params, step.dtype, held)
    held["decode weights"] = weights
    for view in ("free", "aware") if sizes.policy_rollout else ("free",):
        sampler = SamplerSettings(
            completions=sizes.group_size if view == "aware" else sizes.free_rollouts,
            max_new_tokens=sizes.max_new_tokens,
            temperature=sizes.temperature,
            top_k=sizes.top_k,
            top_p=sizes.top_p,
            dtype=step.dtype,
        )
        at_once = sizes.sample_prompts
        chunks = 0 if view == "free" else _chunks(at_once, sizes.policy_chunk, mesh)
        yield from _sampling_programs(
            f"rl/{view}", config, model, mesh, vocabulary, params, weights, sampler,
            at_once, chunks, held,
        )  # fmt: skip
    allowed = allowed_tokens(model, vocabulary)
    distribution = Distribution(tuple(allowed.tolist()), sizes.temperature)
    score = make_scorer(model, distribution, step)
    update = make_update(model, optimizer, objective, distribution, step, sizes.free_rollouts)
    rollouts, count = 2 * sizes.group_size, sizes.update_prompts
    prompts = _prompt_shapes(config, model, mesh, count, min(config.prompt_buckets), windows=True)
    visual = None
    if step.trainable != "all":
        visual = yield from _image_program("rl/images", model, mesh, params, prompts, step, held)
    for bucket in sizes.completion_buckets:
        tokens = place_rows(jax.ShapeDtypeStruct((count, rollouts, bucket), jnp.int32), mesh)
        numbers = place_rows(jax.ShapeDtypeStruct((count, rollouts, bucket), jnp.float32), mesh)
        rewards = place_rows(jax.ShapeDtypeStruct((count, rollouts), jnp.float32), mesh)
        lengths = place_rows(jax.ShapeDtypeStruct((count, rollouts), jnp.int32), mesh)
        groups = GroupBatch(prompts, tokens, lengths, rewards, numbers)
        slots = count * (prompts.tokens.shape[1] + rollouts * (bucket - 1))
        reference = numbers if objective.kl_beta else None
        behavior = None if sizes.prompts == count and not sizes.is_dynamic else numbers
        arguments: dict[str, tuple] = {"update": (state, groups, visual, behavior, reference)}
        if reference is not None or behavior is not None:
            arguments["score"] = (anchor, prompts, visual, tokens)
        for name, given in sorted(arguments.items()):
            yield Program(
                name=f"rl/{name} {bucket}",
                function=score if name == "score" else update,
                arguments=given,
                held=held | {"batch": given[1:]},
                tokens=slots,
                weight_reads=1.0 if name == "score" else _training_reads(config, settings),
            )


def _evaluation_programs(config, model, mesh, vocabulary, params) -> Programs:
    sampler = SamplerSettings(1, config.max_new_tokens, temperature=0.0, dtype=config.dtype)
    held = {"weights": params}
    weights = yield from _sync_program("evaluate", model, mesh, params, config.dtype, held)
    rows = config.eval.rows
    for view, chunks in (("free", 0), ("aware", _chunks(rows, rows, mesh))):
        yield from _sampling_programs(
            f"evaluate/{view}", config, model, mesh, vocabulary, params, weights, sampler, rows,
            chunks, held | {"decode weights": weights},
        )  # fmt: skip


def _sync_program(stage, model, mesh, params, dtype, held) -> Generator[Program, Tree, Tree]:
    """The cast for decoding; returns the shapes of its copy."""
    yield Program(
        name=f"{stage}/decode weights",
        function=make_weight_sync(dtype),
        arguments=(params, None),
        held=held,
        tokens=0,
        weight_reads=1.0,
    )
    weights = jax.eval_shape(lambda tree: vlm.decode_weights(tree, dtype), params)
    axes = vlm.logical_axes(model)["language"]

    def is_names(leaf):
        return isinstance(leaf, tuple)

    one = jax.tree.map(lambda names: names[1:], axes["layers"], is_leaf=is_names)
    axes = {"language": {**axes, "layers": [one] * model.text.depth}}
    return _with_shardings(weights, param_shardings(axes, mesh, weights))


def _image_program(name, model, mesh, params, prompts: Batch, step, held):
    def encode(params, patches, patch_hw, patch_segment):
        return vlm.encode_images(params, model, patches, patch_hw, patch_segment, dtype=step.dtype)

    images = (prompts.patches, prompts.patch_hw, prompts.patch_segment)
    yield Program(
        name=name,
        function=jax.jit(encode),
        arguments=(params, *images),
        held=held | {"batch": images},
        tokens=prompts.patches.shape[0] * prompts.patches.shape[1] * prompts.patches.shape[2],
        weight_reads=1.0,
    )
    return place_rows(jax.eval_shape(encode, params, *images), mesh)


def _sampling_programs(
    name, config, model, mesh, vocabulary, params, weights, sampler, rows, chunks, held
) -> Programs:
    """Prefill and decode of one view; `chunks` copies of a policy before the prompts, 0 = none."""
    made = make_sampler(model, sampler, vocabulary)
    free = _prompt_shapes(config, model, mesh, rows, min(config.prompt_buckets), windows=True)
    visual = jax.eval_shape(
        lambda params, batch: vlm.encode_images(
            params, model, batch.patches, batch.patch_hw, batch.patch_segment, dtype=sampler.dtype
        ),
        params,
        free,
    )
    prompts, prefix, before = free, None, 0
    if chunks:
        before = max(config.prompt_buckets)
        policy = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_whole(mesh)),
            _one_policy(config, model, before),
        )
        read = make_prefix_reader(model, sampler.dtype)
        yield Program(
            name=f"{name} policy {before}",
            function=read,
            arguments=(params, policy),
            held=held | {"batch": policy},
            tokens=before,
            weight_reads=1.0,
        )
        kv = jax.eval_shape(read, params, policy)
        kv = jax.tree.map(
            lambda leaf: place_rows(
                jax.ShapeDtypeStruct((chunks, *leaf.shape[1:]), leaf.dtype), mesh
            ),
            kv,
        )
        prefix = Prefix(kv, place_rows(jax.ShapeDtypeStruct((chunks,), jnp.int32), mesh))
        rows = chunks * -(-rows // chunks)
        prompts = _prompt_shapes(
            config, model, mesh, rows, min(config.prompt_buckets), windows=False
        )
    visual = place_rows(jax.ShapeDtypeStruct((rows, *visual.shape[1:]), visual.dtype), mesh)
    ids = place_rows(jax.ShapeDtypeStruct((rows,), jnp.uint32), mesh)
    length = prompts.tokens.shape[1]
    given = (params, prompts, visual, _key(mesh), ids, prefix)
    yield Program(
        name=f"{name} prefill {length}",
        function=made.prefill,
        arguments=given,
        held=held | {"batch": (prompts, visual, prefix)},
        tokens=rows * length,
        weight_reads=1.0,
    )
    standing, last = place_rows(jax.eval_shape(made.prefill, *given), mesh)
    given = (last, place_rows(jax.ShapeDtypeStruct((rows,), jnp.bool_), mesh))
    yield Program(
        name=f"{name} cache",
        function=made.begin,
        arguments=given,
        held=held | {"batch": standing},
        tokens=0,
        weight_reads=0.0,
    )
    decoding = jax.eval_shape(made.begin, *given)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=_whole(mesh))
    decoding = dataclasses.replace(
        place_rows(dataclasses.replace(decoding, step=None), mesh), step=step
    )
    new = rows * sampler.completions * sampler.max_new_tokens
    until = jax.ShapeDtypeStruct((), jnp.int32, weak_type=True, sharding=_whole(mesh))
    yield Program(
        name=f"{name} decode",
        function=made.decode,
        arguments=(weights, standing, decoding, until),
        held=held | {"batch": (standing, decoding)},
        tokens=new,
        weight_reads=0.0,
        loop_steps=sampler.max_new_tokens,
        cache_slots=chunks * before + rows * length + new,
    )


def _chunks(rows: int, size: int, mesh: Mesh) -> int:
    """Copies of policies for prompts that share them as well as the run lets them."""
    degree = mesh.shape["data"] * mesh.shape["fsdp"]
    return len(plan_chunks([0] * rows, size, degree).policy_of)


def _prompt_shapes(config, model, mesh, rows, bucket, *, windows: bool) -> Batch:
    count = max(as_buckets(config.windows)) if windows else 0
    return batch_shapes(model, mesh, rows, bucket, count)


def _one_policy(config, model, tokens: int) -> Batch:
    """A policy document of the largest size, its images among it."""
    buckets = as_buckets(config.windows)
    windows = max(buckets) - min(buckets)
    single = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    return batch_shapes(model, single, 1, tokens, windows)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _training_reads(config, settings) -> float:
    """Forward and backward, and once more where layers are computed again."""
    return settings.micro_batches * (2.0 if config.remat == "none" else 3.0)


def _state_parts(state) -> dict[str, Tree]:
    return {"weights": state.params, "optimizer state": state.opt_state}


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=_whole(mesh))


def _with_shardings(tree: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )
