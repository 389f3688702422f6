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
from trimpi_jax.rollouts.groups import Chunks, plan_chunks
from trimpi_jax.rollouts.sampler import (
    Prefix,
    allowed_tokens,
    make_prefix_reader,
    make_sampler,
    make_weight_sync,
)
from trimpi_jax.sharding import batch_sharding, gathered_shardings, state_shardings
from trimpi_jax.stages.policy_update import Distribution, make_scorer, make_update
from trimpi_jax.stages.run_settings import (
    distillation_settings,
    optimizer_settings,
    rl_objective,
    rl_settings,
    step_settings,
    training_shapes,
    with_lora_scale,
)
from trimpi_jax.stages.supervised import make_supervised_step
from trimpi_jax.stages.train_state import (
    count_micro_batches,
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
            continue
        if stage == "distillation":
            yield from _answering_programs(config, model, mesh, vocabulary, params)
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
            weight_reads=_passes(settings, rows, mesh) * _reads_of_training(config),
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
    sampling = held | {"decode weights": weights}  # forgotten before the update
    at_once = sizes.sample_prompts
    yield from _image_program(
        "rl/images", config, model, mesh, params, at_once, step.dtype, sampling
    )
    for view in ("free", "aware") if sizes.policy_rollout else ("free",):
        sampler = SamplerSettings(
            completions=sizes.group_size if view == "aware" else sizes.free_rollouts,
            max_new_tokens=sizes.max_new_tokens,
            temperature=sizes.temperature,
            top_k=sizes.top_k,
            top_p=sizes.top_p,
            dtype=step.dtype,
        )
        # a batch of prompts asks about all policies of the data
        owners = [row % config.data.get("policies", 1) for row in range(at_once)]
        chunks = None if view == "free" else _chunks(owners, sizes.policy_chunk, mesh)
        alive = yield from _sampling_programs(
            f"rl/{view}", config, model, mesh, vocabulary, params, weights, sampler,
            at_once, chunks, sampling,
        )  # fmt: skip
        sampling = sampling | {f"{view} rollouts": alive}  # both views are on their way together
    allowed = allowed_tokens(model, vocabulary)
    distribution = Distribution(tuple(allowed.tolist()), sizes.temperature)
    score = make_scorer(model, distribution, step)
    update = make_update(model, optimizer, objective, distribution, step, sizes.free_rollouts)
    rollouts, count = 2 * sizes.group_size, sizes.update_prompts
    prompts = _prompt_shapes(config, model, mesh, count, min(config.prompt_buckets), windows=True)
    visual = None
    if step.trainable != "all":
        name = "rl/images of an update"
        known = at_once == count
        visual = yield from _image_program(
            name, config, model, mesh, params, count, step.dtype, held, is_known=known
        )
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
                weight_reads=_passes(settings, count, mesh)
                * (1.0 if name == "score" else _reads_of_training(config)),
            )


def _answering_programs(config, model, mesh, vocabulary, params) -> Programs:
    """What distillation samples with, before it trains."""
    settings = distillation_settings(config)
    held = {"weights": params}
    weights = yield from _sync_program("distillation", model, mesh, params, settings.dtype, held)
    rows, held = settings.sample_prompts, held | {"decode weights": weights}
    yield from _image_program(
        "distillation/images", config, model, mesh, params, rows, settings.dtype, held
    )
    yield from _sampling_programs(
        "distillation/aware", config, model, mesh, vocabulary, params, weights, settings.sampler,
        rows, _chunks([0] * rows, rows, mesh), held,
    )  # fmt: skip


def _evaluation_programs(config, model, mesh, vocabulary, params) -> Programs:
    sampler = SamplerSettings(1, config.max_new_tokens, temperature=0.0, dtype=config.dtype)
    held = {"weights": params}
    weights = yield from _sync_program("evaluate", model, mesh, params, config.dtype, held)
    rows, held = config.eval.rows, held | {"decode weights": weights}
    yield from _image_program(
        "evaluate/images", config, model, mesh, params, rows, config.dtype, held
    )
    for view, chunks in (("free", None), ("aware", _chunks([0] * rows, rows, mesh))):
        yield from _sampling_programs(
            f"evaluate/{view}", config, model, mesh, vocabulary, params, weights, sampler, rows,
            chunks, held,
        )  # fmt: skip


def _sync_program(stage, model, mesh, params, dtype, held) -> Generator[Program, Tree, Tree]:
    """The cast for decoding; returns the shapes of its copy."""
    yield Program(
        name=f"{stage}/decode weights",
        function=make_weight_sync(model, dtype),
        arguments=(params, None),
        held=held,
        tokens=0,
        weight_reads=1.0,
    )
    weights = jax.eval_shape(lambda tree: vlm.decode_weights(tree, dtype), params)
    return _with_shardings(weights, gathered_shardings(vlm.decode_axes(model), mesh, weights))


def _image_program(
    name, config, model, mesh, params, rows, dtype, held, *, is_known=False
) -> Generator[Program, Tree, Tree]:
    """The vision tower over the images of `rows` prompts; returns the shape of what it sees.

    `is_known`: the program is the same as one before.
    """
    prompts = _prompt_shapes(config, model, mesh, rows, min(config.prompt_buckets), windows=True)

    def encode(params, patches, patch_hw, patch_segment):
        return vlm.encode_images(params, model, patches, patch_hw, patch_segment, dtype=dtype)

    images = (prompts.patches, prompts.patch_hw, prompts.patch_segment)
    if not is_known:
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
) -> Generator[Program, Tree, Tree]:
    """Prefill and decode of one view; `chunks` of prompts behind their policies, None = alone.

    Returns the shapes of what stays on the devices until its rollouts have been fetched.
    """
    made = make_sampler(model, sampler, vocabulary)
    free = _prompt_shapes(config, model, mesh, rows, min(config.prompt_buckets), windows=True)
    visual = jax.eval_shape(
        lambda params, batch: vlm.encode_images(
            params, model, batch.patches, batch.patch_hw, batch.patch_segment, dtype=sampler.dtype
        ),
        params,
        free,
    )
    prompts, prefix, before, copies = free, None, 0, 0
    if chunks is not None:
        copies = len(chunks.policy_of)
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
                jax.ShapeDtypeStruct((copies, *leaf.shape[1:]), leaf.dtype), mesh
            ),
            kv,
        )
        prefix = Prefix(kv, place_rows(jax.ShapeDtypeStruct((copies,), jnp.int32), mesh))
        rows = copies * chunks.size
        prompts = _prompt_shapes(
            config, model, mesh, rows, min(config.prompt_buckets), windows=False
        )
    visual = place_rows(jax.ShapeDtypeStruct((rows, *visual.shape[1:]), visual.dtype), mesh)
    ids = place_rows(jax.ShapeDtypeStruct((rows,), jnp.uint32), mesh)
    length = prompts.tokens.shape[1]
    given = (params, prompts, visual, _key(mesh), ids, prefix)
    sent = yield Program(
        name=f"{name} prefill {length}",
        function=made.prefill,
        arguments=given,
        held=held | {"batch": (prompts, visual, prefix)},
        tokens=rows * length,
        weight_reads=1.0,
    )
    standing, last = _as_laid(sent, place_rows(jax.eval_shape(made.prefill, *given), mesh))
    given = (last, place_rows(jax.ShapeDtypeStruct((rows,), jnp.bool_), mesh))
    sent = yield Program(
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
    decoding = _as_laid(sent, decoding)
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
        cache_slots=copies * before + rows * length + new,
    )
    return standing, decoding


def _as_laid(sent: Tree, expected: Tree) -> Tree:
    """What the compiler said of outputs, or where it was not asked how they should lie."""
    leaves = jax.tree.leaves(sent)
    known = leaves and all(getattr(leaf, "sharding", None) is not None for leaf in leaves)
    return sent if known else expected


def _chunks(owners: list[int], size: int, mesh: Mesh) -> Chunks:
    """How the run lays out prompts behind the policies of these numbers."""
    return plan_chunks(owners, size, mesh.shape["data"] * mesh.shape["fsdp"])


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


def _passes(settings, rows: int, mesh: Mesh) -> int:
    """How often a step goes through the model: once for every part of its batch."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return count_micro_batches(settings.micro_batches, rows, devices)


def _reads_of_training(config) -> float:
    """Forward and backward, and once more where layers are computed again."""
    return 2.0 if config.remat == "none" else 3.0


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
