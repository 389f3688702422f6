"""From a config to the dataclasses that stages take: the only place that knows both.

Preflight makes the same dataclasses of the same config, so that it compiles what a run will.

Next: trimpi_jax/stages/vm_cpt.py
"""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import ConfigDict

from trimpi_jax.inputs.batching import (
    BatchShapes,
    as_buckets,
)
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.objectives.grpo import ObjectiveSettings
from trimpi_jax.ops.kernels import choose_implementation
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import row_share
from trimpi_jax.stages.distillation import DistillationSettings
from trimpi_jax.stages.rl_settings import RLSettings, completion_buckets
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import (
    OptimizerSettings,
)


def execution(model: VLMConfig, config: ConfigDict, platform: str) -> VLMConfig:
    """The model with what the config says about how to run it on a platform.

    Raises:
        ValueError: an attention kernel that cannot run there, or an unknown loop.
    """
    attention = choose_implementation(
        config.attention, platform, config.dtype, model.text.head_width
    )
    packed = [name for name in config.stages if config[name].get("pack_tokens", 0)]
    if packed and attention == "cudnn":  # it knows no segments
        if config.attention != "auto":
            raise ValueError(
                f"attention {config.attention!r} is cuDNN here, which cannot keep the examples of"
                f" packed rows apart: set pack_tokens and pack_windows of {packed} to 0, or"
                " --config.attention=xla"
            )
        attention = "xla"
    return dataclasses.replace(model, layer_loop=config.layer_loop, attention=attention)


def with_lora_scale(model: VLMConfig, settings: ConfigDict) -> VLMConfig:
    """The model with the factor alpha / rank of its adapters."""
    scale = settings.lora_alpha / settings.lora_rank
    return dataclasses.replace(model, text=dataclasses.replace(model.text, lora_scale=scale))


def step_settings(config: ConfigDict, stage: str) -> StepSettings:
    """How a training step of a stage is computed."""
    settings = config[stage]
    return StepSettings(settings.trainable, config.dtype, settings.micro_batches, config.remat)


def rl_settings(config: ConfigDict) -> RLSettings:
    """The sizes of an RL step."""
    settings = config.rl
    return RLSettings(
        group_size=settings.group_size,
        prompts=settings.prompts,
        update_prompts=settings.update_prompts,
        sample_prompts=settings.sample_prompts or settings.prompts,
        policy_rollout=settings.policy_rollout,
        max_new_tokens=config.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        completion_buckets=completion_buckets(config.max_new_tokens),
        compact_every=settings.compact_every,
        policy_chunk=settings.get("policy_chunk", 1),
        max_attempts=settings.get("max_attempts", 1),
        max_rollouts=settings.max_rollouts,
        stop_after_dry_steps=settings.get("stop_after_dry_steps", 0),
        overlong_tokens=settings.get("overlong_tokens", 0),
        max_failed_grades=settings.max_failed_grades,
        seed=config.seed,
    )


QUESTIONS = {"all": "train", "cot": "cot"}  # config -> split; the first holds the second's, too


def question_split(config: ConfigDict, stage: str) -> str:
    """The split whose questions a stage samples answers to.

    Raises:
        ValueError: `data` of the stage's section is neither.
    """
    if (data := config[stage].data) not in QUESTIONS:
        raise ValueError(f"{stage}.data is one of {sorted(QUESTIONS)}, got '{data}'")
    return QUESTIONS[data]


def distillation_settings(config: ConfigDict) -> DistillationSettings:
    """What the `distillation` stage samples and keeps."""
    section = config.distillation
    names = {field.name for field in dataclasses.fields(DistillationSettings)}
    options = {name: section[name] for name in names if name in section}
    return DistillationSettings(
        max_new_tokens=config.max_new_tokens, seed=config.seed, dtype=config.dtype, **options
    )


def check_sampling(config: ConfigDict) -> None:
    """Look at the stages that sample, before any stage has begun.

    Raises:
        ValueError: an option that they would not take.
    """
    for stage in ("rl", "distillation"):
        if stage in config.stages:
            question_split(config, stage)
    if "rl" in config.stages:
        rl_settings(config)
        rl_objective(config)
    if "distillation" in config.stages:
        distillation_settings(config)


def rl_objective(config: ConfigDict) -> ObjectiveSettings:
    """The objective of the `rl` section: "grpo" or "dapo", its constants from the config."""
    settings = config.rl
    if settings.objective not in ("grpo", "dapo"):
        raise ValueError(f"rl.objective is 'grpo' or 'dapo', got '{settings.objective}'")
    return ObjectiveSettings(
        loss_mean={"grpo": "sequence", "dapo": "token"}[settings.objective],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_beta=settings.get("kl_beta", 0.0),
        importance_cap=settings.importance_cap,
    )


def prompt_sizes(config: ConfigDict) -> PromptSizes:
    """The shapes that prompts may take."""
    return PromptSizes(tuple(config.prompt_buckets), as_buckets(config.windows))


def optimizer_settings(settings: ConfigDict, steps: int) -> OptimizerSettings:
    """The optimizer part of a stage's config."""
    return OptimizerSettings(
        learning_rate=settings.learning_rate,
        steps=steps,
        warmup_steps=settings.warmup_steps,
        schedule=settings.schedule,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        moment_dtype=settings.moment_dtype,
    )


def training_shapes(
    config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, shares: int = 1
) -> BatchShapes:
    """The shapes that a process's part of the batches of a supervised stage may have.

    Args:
        config: of the run.
        stage: one of its supervised stages.
        mesh: of all devices.
        shares: parts that a batch is read in, see `sharding.RowShare`.
    """
    settings = config[stage]
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return BatchShapes(
        settings.batch // shares,
        tuple(config.row_buckets),
        as_buckets(config.windows),
        settings.pack_tokens,
        settings.pack_windows,
        # 0 micro-batches: any number of rows of every device
        devices // shares * max(settings.micro_batches, 1),
    )


def check_rows(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError, naming all of them, for numbers of rows that the mesh does not divide."""
    if "distillation" in config.stages and jax.process_count() > 1:
        raise ValueError(
            f"the stage distillation runs on one process, not on {jax.process_count()}; start the"
            " run on one host, or choose a method without it"
        )
    devices = row_share(mesh).degree
    wanted: dict[str, tuple[int, int]] = {}
    for stage in config.stages:
        settings = config[stage]
        each = devices * max(settings.micro_batches, 1)
        if stage != "rl":
            wanted[f"{stage}.batch"] = settings.batch, each
            continue
        wanted["rl.update_prompts"] = settings.update_prompts, each
        wanted["rl.sample_prompts"] = settings.sample_prompts or settings.prompts, devices
    problems = [
        f"--config.{name}={rows} is not a multiple of {each}; the nearest are"
        f" {' and '.join(str(n) for n in (rows // each * each, -(-rows // each) * each) if n)}"
        for name, (rows, each) in wanted.items()
        if rows % each
    ]
    if problems:
        raise ValueError(
            f"rows are dealt to the {devices} devices of mesh axes ('data', 'fsdp') of"
            f" {jax.process_count()} processes, times the micro-batches of a step:\n  "
            + "\n  ".join(problems)
            + "\nor choose another --config.mesh"
        )
