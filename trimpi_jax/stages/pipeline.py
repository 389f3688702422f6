"""The run: data, base model, the stages of the method in order, evaluation, table, report.

    workdir/config.json     what this folder belongs to; another config is refused
    workdir/data/           shards and manifest
    workdir/0_base/ 1_vm_cpt/ 2_cot_sft/ 3_rl/
        checkpoints/  metrics.jsonl  model/  adapter/ (LoRA)  evaluation/  evaluation.json
        evaluation-step40/  evaluations.jsonl     with config.eval.every_steps: while it trained
    workdir/final/          the trained model, Hugging Face layout
    workdir/report.html     everything on one page

A stage is finished when its model/ and evaluation.json exist; a second start skips it.

Source: paper section 4 (the three stages) and 5 (what is measured).
Next: trimpi_jax/stages/vm_cpt.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.build import DATASETS, build, make_settings
from data_pipelines.example import Example
from data_pipelines.shards import check_dataset, read_manifest, split_count
from data_pipelines.streaming import (
    encode_state,
    iter_split,
    make_stream,
    read_split,
    restore_state,
)
from trimpi_jax.evaluators.efficiency import make_prefill, measure_prefill_ms
from trimpi_jax.evaluators.questions import EvaluationSettings, Evaluator
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.inputs.batching import (
    BatchShapes,
    as_buckets,
    drop_too_long,
    fill_batch,
    padding_waste,
)
from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.io.metrics import append_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.io.report import result_table, write_report
from trimpi_jax.io.workdir_lock import lock_workdir
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_checks import stored_dtype
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.models.lora import add_lora, merge_lora
from trimpi_jax.models.processor import Processor
from trimpi_jax.objectives.grpo import ObjectiveSettings
from trimpi_jax.ops.kernels import choose_implementation
from trimpi_jax.rollouts.engine import Engine, make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh, place_batch
from trimpi_jax.stages import loop
from trimpi_jax.stages.auto_sizes import describe_sizes, fill_auto_sizes
from trimpi_jax.stages.evaluate_model import (
    PAPER_SUITES,
    Context,
    folder_digest,
    make_identity,
    run_suites,
    write_json,
)
from trimpi_jax.stages.model_files import (
    base_of_stage,
    load_weights,
    model_folder,
    open_base,
    write_adapter,
    write_model,
)
from trimpi_jax.stages.nano_base import run_nano_base
from trimpi_jax.stages.rl import RLSettings, RLStep, completion_buckets
from trimpi_jax.stages.sft import SPLITS, encode_sft_row
from trimpi_jax.stages.supervised import StepSettings, make_supervised_step
from trimpi_jax.stages.train_state import (
    Flat,
    OptimizerSettings,
    TrainState,
    init_train_state,
    make_optimizer,
    split_params,
)
from trimpi_jax.stages.vm_cpt import SPLIT as VM_CPT_SPLIT
from trimpi_jax.stages.vm_cpt import encode_vm_cpt_row


@dataclasses.dataclass
class Run:
    """What the parts of a run share; made once, never changed."""

    config: ConfigDict
    workdir: Path
    progress: Progress
    processor: Processor
    model: VLMConfig
    mesh: jax.sharding.Mesh
    engine: Engine | None = None
    evaluator: Evaluator | None = None


def run(config: ConfigDict, workdir: Path, progress: Progress | None = None) -> None:
    """Run or continue what the config says in `workdir`.

    Raises:
        ValueError, OSError: bad config, data, model or folder, before anything is changed.
        loop.Stopped, loop.NonFiniteLoss: see `loop.run`.
    """
    progress = progress or Progress()
    workdir = workdir.expanduser().resolve()
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes have found each other, but this version trains on one"
            f" process only: it would drive {jax.device_count()} devices that it cannot all feed."
            " Take one host with all its devices, e.g. a v5p-8, a v6e-8 or a machine with 8 GPUs"
        )
    if config.get("kind") == "nano_base":
        claim_workdir(config, workdir)
        with lock_workdir(workdir, progress.say):
            run_nano_base(config, workdir, progress)
        return
    model, processor = open_base(config)  # what is wrong with it is told before anything is written
    model = execution(model, config, jax.default_backend())
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    claim_workdir(config, workdir)
    with lock_workdir(workdir, progress.say):
        internalize(config, workdir, progress, model, processor, mesh)


def internalize(
    config: ConfigDict,
    workdir: Path,
    progress: Progress,
    model: VLMConfig,
    processor: Processor,
    mesh: jax.sharding.Mesh,
) -> None:
    """Data, base model, stages, evaluations and report, in a workdir that is claimed and locked."""
    started = time.time()
    base = model_folder(config.model_dir)
    prepare_data(config, workdir / "data", progress)
    splits = read_manifest(workdir / "data")["splits"]
    filled = fill_auto_sizes(
        config, {name: iter_split(workdir / "data", name) for name in splits}, processor
    )
    if filled is not config:
        config = filled
        progress.say(f"sizes from the data: {describe_sizes(config)}")
    this = Run(config, workdir, progress, processor, model, mesh)
    with jax.set_mesh(mesh):
        this.engine = make_run_engine(this)
        this.evaluator = make_evaluator(this)
        params = load_weights(base, model, mesh)
        evaluate_stage(this, params, "0_base", base)
        for number, stage in enumerate(config.stages, start=1):
            folder = workdir / f"{number}_{stage}"
            if (folder / "model" / "config.json").is_file():
                progress.say(f"{stage}: finished before, skipped")
                params = load_weights(folder / "model", model, mesh)
            else:
                params = run_stage(this, params, stage, folder)
                write_model(folder / "model", base, model, params, processor)
                shutil.rmtree(folder / "checkpoints")
            evaluate_stage(this, params, folder.name, folder / "model")
    if not (workdir / "final" / "config.json").is_file():
        write_model(workdir / "final", base, model, params, processor, stored_dtype(base))
    progress.table(result_table(workdir))
    write_report([workdir], workdir / "report.html")
    minutes = (time.time() - started) / 60
    progress.say(
        f"{minutes:.1f} minutes in this start. Report: {workdir / 'report.html'}"
        f"  Model: {workdir / 'final'}"
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


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Make the folder this config's, or check that it is.

    Raises:
        ValueError: it belongs to another config (every difference is listed), or it holds
            something that is no run.
        OSError: it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"workdir {workdir} is not writable ({error}); choose another") from error
    path = workdir / "config.json"
    current = json.loads(config.to_json())
    if path.is_file():
        saved = json.loads(path.read_text())
        differences = list_differences(saved, current)
        if differences:
            raise ValueError(
                f"workdir {workdir} belongs to another config; choose another folder or delete it."
                f" Differences (saved -> now):\n  " + "\n  ".join(differences)
            )
        return
    # a start on several hosts that was killed may have left its marker (io/hosts.py)
    if any(not path.name.startswith((".start-", ".probe-", ".lock")) for path in workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and has no config.json: not a run")
    scratch = workdir / "config.json.part"
    scratch.write_text(json.dumps(current, indent=1, sort_keys=True))
    os.replace(scratch, path)


def list_differences(saved: Any, current: Any, path: str = "config") -> list[str]:
    """`path: old -> new` for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        return [
            line
            for key in sorted(saved.keys() | current.keys())
            for line in list_differences(
                saved.get(key, "(absent)"), current.get(key, "(absent)"), f"{path}.{key}"
            )
        ]
    return [] if saved == current else [f"{path}: {saved!r} -> {current!r}"]


def prepare_data(config: ConfigDict, folder: Path, progress: Progress) -> None:
    """Build the dataset, or check and reuse it; its chains of thought may be those of make_cot.

    Raises:
        ValueError: broken shards, or shards of another recipe.
    """
    if config.get("data_dir") and not folder.exists():
        given = Path(config.data_dir).expanduser().resolve()
        check_dataset(given)
        folder.symlink_to(given)
    options = config.data.to_dict()
    dataset = options.pop("dataset")
    settings = make_settings(dataset, options)
    wanted = json.loads(json.dumps(DATASETS[dataset].recipe(settings)))
    if folder.exists() and any(folder.iterdir()):
        found = check_dataset(folder)["recipe"]
        thoughts = found.pop("cot", None)
        if found != wanted:
            lines = list_differences(found, wanted, "recipe")
            raise ValueError(f"{folder} was built otherwise:\n  " + "\n  ".join(lines))
        progress.say(f"data: {folder} is whole, reused")
        if thoughts:
            progress.say(
                f"data: chains of thought by {thoughts['model']}, {thoughts['mode']},"
                f" {thoughts['accepted']}/{thoughts['asked']} accepted"
            )
        return
    with progress.task("data", None) as bar:
        manifest = build(dataset, settings, folder, lambda done, total: bar(done, {}, total=total))
    counts = {name: split["count"] for name, split in manifest["splits"].items()}
    progress.say(f"data: {counts} examples in {folder}")


def run_stage(this: Run, params: Any, stage: str, folder: Path) -> Any:
    """Train one stage from `params`; returns plain parameters (LoRA merged)."""
    if stage == "rl":
        return run_rl(this, params, folder)
    return run_supervised(this, params, stage, folder)


def run_supervised(this: Run, params: Any, stage: str, folder: Path) -> Any:
    """VM-CPT, Direct SFT or CoT SFT."""
    settings = this.config[stage]
    split = VM_CPT_SPLIT if stage == "vm_cpt" else SPLITS[stage]
    data = this.workdir / "data"
    steps = max(1, round(settings.epochs * split_count(data, split) / settings.batch))
    model = this.model
    trainable = settings.trainable
    if trainable == "lora":
        model = with_lora_scale(model, settings)
        key = jax.random.key(this.config.seed)
        key = jax.random.fold_in(key, zlib.crc32(stage.encode()))
        params = add_lora(params, model, key, settings.lora_rank)
    optimizer = make_optimizer(optimizer_settings(settings, steps))
    state = init_train_state(params, optimizer, trainable)
    step = make_supervised_step(model, optimizer, step_settings(this.config, stage))
    shapes = training_shapes(this.config, stage, this.mesh)
    longest = max(shapes.token_buckets)

    def take_step(state: TrainState, number: int, rows):
        fitted = drop_too_long(rows, longest, max(shapes.window_buckets))
        if not fitted.rows:
            raise ValueError(
                f"{stage} step {number}: no row fits {longest} tokens (longest"
                f" {fitted.longest}); add a larger bucket to --config.row_buckets"
            )
        batch = fill_batch(fitted.rows, shapes)
        state, metrics = step(state, place_batch(batch, this.mesh))
        return state, metrics | {
            "inputs/dropped_too_long": fitted.too_long,
            "inputs/padding_share": padding_waste(batch),
        }

    def plain(state: TrainState) -> Any:
        if trainable != "lora":
            return state.params
        return merge_lora(state.params, model.text.lora_scale)

    encode = functools.partial(encode_training_row, processor=this.processor, stage=stage)
    source = open_source(this, split, settings.batch, stage, encode)
    state = loop.run(
        loop_settings(this, stage, folder, steps),
        state,
        source,
        take_step,
        this.progress,
        lambda state, number: evaluate_step(this, plain(state), folder, number),
    )
    if trainable == "lora":
        base = base_of_stage(this.workdir, this.config, int(folder.name.split("_")[0]))
        write_adapter(folder / "adapter", base, model, state.params)
    return plain(state)


def run_rl(this: Run, params: Any, folder: Path) -> Any:
    """GRPO or DAPO, with or without PolicyRollout."""
    settings = this.config.rl
    updates = settings.prompts // settings.update_prompts
    optimizer = make_optimizer(optimizer_settings(settings, settings.steps * updates))
    objective = rl_objective(this.config)
    reference = None
    if objective.kl_beta:
        reference = _copy_reference(split_params(params, settings.trainable)[0], this.config.dtype)
    stream = open_stream(this, "train", settings.prompts, "rl")
    assert this.engine is not None
    step = RLStep(
        this.engine,
        reference,
        optimizer,
        rl_settings(this.config),
        objective,
        RewardWeights(settings.accuracy_weight, settings.format_weight),
        step_settings(this.config, "rl"),
        fetch_more=lambda: next(stream),
        say=this.progress.say,
    )

    def take_step(state, number, examples):
        state, metrics = step(state, number, examples)
        if number % settings.log_rollouts_every == 0:
            append_records(folder / "rollouts.jsonl", number, step.last_rollouts)
        if step.last_failures:
            failures = [failure._asdict() for failure in step.last_failures]
            append_records(folder / "failed_grades.jsonl", number, failures)
        return state, metrics

    def restore_place(saved):
        restore_state(stream, saved["stream"])
        step.restore_place(saved["rl"])

    source = loop.Source(
        fetch=lambda number: next(stream),
        save_place=lambda: {"stream": encode_state(stream), "rl": step.save_place()},
        restore_place=restore_place,
    )
    return loop.run(
        loop_settings(this, "rl", folder, settings.steps),
        init_train_state(params, optimizer, settings.trainable),
        source,
        take_step,
        this.progress,
        lambda state, number: evaluate_step(this, state.params, folder, number),
        is_finished=lambda: step.is_finished,
    ).params


def _copy_reference(trained: Flat, dtype: str) -> Flat:
    """The KL anchor in the dtype of use, arrays of its own: the state is donated step by step."""
    used = cast_weights(trained, dtype)
    return {
        path: used[path].copy() if used[path] is leaf else used[path]
        for path, leaf in trained.items()
    }


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
        stop_after_dry_steps=settings.get("stop_after_dry_steps", 0),
        overlong_tokens=settings.get("overlong_tokens", 0),
        max_failed_grades=settings.max_failed_grades,
        seed=config.seed,
    )


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


def loop_settings(this: Run, stage: str, folder: Path, steps: int) -> loop.LoopSettings:
    """The loop part of a stage's config."""
    return loop.LoopSettings(
        name=stage,
        folder=folder,
        num_steps=steps,
        save_every=this.config.save_every,
        log_every=this.config.log_every,
        evaluate_every=this.config.eval.get("every_steps", 0),
    )


def encode_training_row(example: Example, *, processor: Processor, stage: str) -> EncodedRow:
    """The row of an Example in a supervised stage."""
    if stage == "vm_cpt":
        return encode_vm_cpt_row(example, processor)
    return encode_sft_row(example, processor, stage=stage)


def training_shapes(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh) -> BatchShapes:
    """The shapes that the batches of a supervised stage may have."""
    settings = config[stage]
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return BatchShapes(
        settings.batch,
        tuple(config.row_buckets),
        as_buckets(config.windows),
        settings.pack_tokens,
        settings.pack_windows,
        devices * settings.micro_batches,
    )


def open_stream(
    this: Run,
    split: str,
    batch: int,
    stage: str,
    each: Callable[[Example], Any] | None = None,
) -> Any:
    """The Grain stream of a stage; its seed is the run's and the stage's.

    Examples (or what `each` makes of them) are read ahead of the step by `config.data_workers`
    processes, 0 = a thread.
    """
    seed = this.config.seed * 1000 + sum(stage.encode())
    return make_stream(
        this.workdir / "data",
        split,
        batch_examples=batch,
        seed=seed,
        workers=this.config.data_workers,
        each=each,
    )


def open_source(
    this: Run,
    split: str,
    batch: int,
    stage: str,
    each: Callable[[Example], Any] | None = None,
) -> loop.Source:
    """A stage's stream as the loop wants it."""
    stream = open_stream(this, split, batch, stage, each)
    return loop.Source(
        fetch=lambda step: next(stream),
        save_place=lambda: encode_state(stream),
        restore_place=lambda saved: restore_state(stream, saved),
    )


def make_run_engine(this: Run) -> Engine:
    """The rollout engine that RL and every evaluation share."""
    return make_engine(
        this.model, this.processor, prompt_sizes(this.config), this.mesh, dtype=this.config.dtype
    )


def make_evaluator(this: Run) -> Evaluator:
    """The evaluator that every stage uses."""
    assert this.engine is not None
    return Evaluator(
        this.engine,
        EvaluationSettings(
            rows=this.config.eval.rows,
            max_new_tokens=this.config.max_new_tokens,
            dtype=this.config.dtype,
            needs_think="direct_sft" not in this.config.stages,
        ),
    )


def evaluate_stage(this: Run, params: Any, name: str, files: Path) -> None:
    """The paper's suites on a finished stage; skipped when already on disk.

    Args:
        this: the run.
        params: of the model in `files`.
        name: of the stage's folder.
        files: the model's folder, of which the results keep a digest.
    """
    path = this.workdir / name / "evaluation.json"
    if path.is_file():
        return
    digest = folder_digest(files)
    results = run_paper_suites(this, params, path.parent / "evaluation", {"model_sha256": digest})
    prefill = make_prefill(this.model, this.config.dtype)
    example = read_split(this.workdir / "data", "test", 1)[0]
    found: dict[str, Any] = {"stage": name}
    for view, suite, aware in (
        ("policy_free", "main", False),
        ("policy_aware", "in_context", True),
    ):
        milliseconds = measure_prefill_ms(
            prefill, params, example, this.processor, policy_in_prompt=aware
        )
        found[view] = results[suite]["summary"] | {"prefill_ms": milliseconds}
        found[f"{view}_records"] = results[suite]["records"]
    write_json(path, found)
    this.progress.say(f"{name}: {_counts(results)}")


def evaluate_step(this: Run, params: Any, folder: Path, number: int) -> None:
    """The paper's suites in the middle of a stage; one line in `evaluations.jsonl`."""
    about = {"stage": folder.name, "step": number}
    results = run_paper_suites(this, params, folder / f"evaluation-step{number}", about)
    line = {
        f"evaluation/{suite}_{what}": result["summary"][what]
        for suite, result in results.items()
        for what in ("accuracy", "score", "correct", "count")
    }
    append_metrics(folder / "evaluations.jsonl", number, line)
    this.progress.say(f"{folder.name} step {number}: {_counts(results)}")


def run_paper_suites(
    this: Run, params: Any, folder: Path, model: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Main, in-context and, where the data has it, override; name -> result.

    Raises:
        ValueError: there is nothing to ask.
    """
    evaluator, config, data = this.evaluator, this.config, this.workdir / "data"
    assert evaluator is not None
    evaluator.load(params)
    identity = make_identity(config, data) | model
    context = Context(
        evaluator, params, config, data, folder, config.seed, this.progress, identity=identity
    )
    names = [name for name in PAPER_SUITES if name != "override" or context.has_split("override")]
    results, left_out = run_suites(context, names)
    evaluator.unload()  # its copy of the weights is memory that training needs
    if left_out:
        raise ValueError(f"nothing to evaluate: {left_out}")
    return results


def _counts(results: dict[str, dict[str, Any]]) -> str:
    words = {"main": "without policy", "in_context": "policy in context"}
    return ", ".join(
        f"{words.get(name, name)} {result['summary']['correct']}/{result['summary']['count']}"
        for name, result in results.items()
    )


def append_records(path: Path, number: int, records: list[dict[str, Any]]) -> None:
    """Append what a step is remembered by, one JSON object a line."""
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({"step": number} | record) + "\n")
