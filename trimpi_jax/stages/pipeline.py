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

import contextlib
import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.example import Example
from data_pipelines.shards import read_manifest, split_count
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
    drop_too_long,
    fill_batch,
)
from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.io.agreement import gather, is_first, largest, of_first
from trimpi_jax.io.metrics import append_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.io.report import result_table, write_report
from trimpi_jax.io.workdir_lock import lock_workdir
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_checks import stored_dtype
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.models.lora import add_lora, merge_lora
from trimpi_jax.models.processor import Processor
from trimpi_jax.rollouts.engine import Engine, make_engine
from trimpi_jax.sharding import make_mesh, place_batch, row_share
from trimpi_jax.stages import loop
from trimpi_jax.stages.auto_sizes import describe_sizes, fill_auto_sizes
from trimpi_jax.stages.distillation import distil
from trimpi_jax.stages.evaluate_model import run_suites
from trimpi_jax.stages.model_files import (
    base_of_stage,
    load_weights,
    model_folder,
    open_base,
    write_adapter,
    write_model,
)
from trimpi_jax.stages.nano_base import run_nano_base
from trimpi_jax.stages.result_files import folder_digest, make_identity, write_json
from trimpi_jax.stages.rl import RLStep
from trimpi_jax.stages.run_settings import (
    check_rows,
    check_sampling,
    distillation_settings,
    execution,
    optimizer_settings,
    prompt_sizes,
    question_split,
    rl_objective,
    rl_settings,
    step_settings,
    training_shapes,
    with_lora_scale,
)
from trimpi_jax.stages.saving import (
    bring_results,
    check_saving,
    checkpoint_folder,
    claim_checkpoints,
    delete_checkpoints,
    keep_settings,
)
from trimpi_jax.stages.sft import SPLITS, encode_sft_row
from trimpi_jax.stages.suites import PAPER_SUITES, SUITES, Context
from trimpi_jax.stages.supervised import make_supervised_step
from trimpi_jax.stages.train_state import (
    Flat,
    TrainState,
    init_train_state,
    make_optimizer,
    split_params,
)
from trimpi_jax.stages.vm_cpt import SPLIT as VM_CPT_SPLIT
from trimpi_jax.stages.vm_cpt import encode_vm_cpt_row
from trimpi_jax.stages.workdir import append_records, claim_workdir, prepare_data


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
    before_save: Callable[[], None] = lambda: None  # see saving.claim_checkpoints


def run(config: ConfigDict, workdir: Path, progress: Progress | None = None) -> None:
    """Run or continue what the config says in `workdir`.

    Raises:
        ValueError, OSError: bad config, data, model or folder, before anything is changed.
        loop.Stopped, loop.NonFiniteLoss: see `loop.run`.
    """
    progress = progress or Progress.of_process()
    workdir = workdir.expanduser().resolve()
    if config.get("kind") == "nano_base":
        if jax.process_count() > 1:
            raise ValueError(
                f"the nano base is trained on one process, not on {jax.process_count()}; it takes"
                " minutes"
            )
        claim_workdir(config, workdir)
        with lock_workdir(workdir, progress.say):
            run_nano_base(config, workdir, progress)
        return
    check_suites(config)
    model, processor = open_base(config)  # what is wrong with it is told before anything is written
    model = execution(model, config, jax.default_backend())
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if isinstance(config.max_new_tokens, int):
        check_sampling(config)
    check_rows(config, mesh)
    bring_results(config, workdir, progress.say)
    of_first(lambda: claim_workdir(config, workdir), "claim the workdir")
    of_first(lambda: check_saving(config, model, workdir), "look for room")
    with contextlib.ExitStack() as held:
        # the first process holds the lock for all: it writes, and without it nothing goes on
        lock = lock_workdir(workdir, progress.say)
        of_first(lambda: held.enter_context(lock), "lock the workdir")
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
    of_first(lambda: prepare_data(config, workdir / "data", progress), "prepare the data")
    splits = read_manifest(workdir / "data")["splits"]
    filled = fill_auto_sizes(
        config, {name: iter_split(workdir / "data", name) for name in splits}, processor
    )
    if filled is not config:
        config = filled
        check_sampling(config)
        progress.say(f"sizes from the data: {describe_sizes(config)}")
    this = Run(config, workdir, progress, processor, model, mesh)
    this.before_save = claim_checkpoints(config, workdir, progress.say)
    with jax.set_mesh(mesh):
        this.engine = make_run_engine(this)
        this.evaluator = make_evaluator(this)
        params = load_weights(base, model, mesh)
        evaluate_stage(this, params, "0_base", base)
        for number, stage in enumerate(config.stages, start=1):
            folder = workdir / f"{number}_{stage}"
            if of_first((folder / "model" / "config.json").is_file, "look for a model"):
                progress.say(f"{stage}: finished before, skipped")
                params = load_weights(folder / "model", model, mesh)
            else:
                params = run_stage(this, params, stage, folder)
                write_model(folder / "model", base, model, params, processor)
                this.before_save()
                of_first(lambda done=folder: delete_checkpoints(config, done), "clear")
            evaluate_stage(this, params, folder.name, folder / "model")
    if not of_first((workdir / "final" / "config.json").is_file, "look for the final model"):
        write_model(workdir / "final", base, model, params, processor, stored_dtype(base))
    if is_first():
        progress.table(result_table(workdir))
        write_report([workdir], workdir / "report.html")
    this.before_save()
    minutes = (time.time() - started) / 60
    progress.say(
        f"{minutes:.1f} minutes in this start. Report: {workdir / 'report.html'}"
        f"  Model: {workdir / 'final'}"
    )


def run_stage(this: Run, params: Any, stage: str, folder: Path) -> Any:
    """Train one stage from `params`; returns plain parameters (LoRA merged)."""
    if stage == "rl":
        return run_rl(this, params, folder)
    if stage == "distillation":
        return run_distillation(this, params, folder)
    return run_supervised(this, params, stage, folder, this.workdir / "data")


def run_distillation(this: Run, params: Any, folder: Path) -> Any:
    """Answers of the actor that reads the policy, then SFT on the right ones."""
    assert this.engine is not None
    actor = base_of_stage(this.workdir, this.config, int(folder.name.split("_")[0]))
    about = make_identity(this.config, this.workdir / "data")
    about = {"actor_sha256": folder_digest(actor), "data_sha256": about["data_sha256"]}
    answers = distil(
        this.engine,
        params,
        (this.workdir / "data", question_split(this.config, "distillation")),
        folder,
        distillation_settings(this.config),
        about,
        this.progress,
    )
    return run_supervised(this, params, "distillation", folder, answers)


def run_supervised(this: Run, params: Any, stage: str, folder: Path, data: Path) -> Any:
    """VM-CPT, Direct SFT, CoT SFT, or SFT on the answers of a distillation, whose `data` it is."""
    settings = this.config[stage]
    split = VM_CPT_SPLIT if stage == "vm_cpt" else SPLITS[stage]
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
    shapes = training_shapes(this.config, stage, this.mesh, row_share(this.mesh).count)
    longest = max(shapes.token_buckets)

    def take_step(state: TrainState, number: int, rows):
        fitted = drop_too_long(rows, longest, max(shapes.window_buckets))
        used = sum(len(row.tokens) for row in fitted.rows)
        told = gather([len(fitted.rows), fitted.too_long, fitted.longest, used], f"{stage} rows")
        told = np.asarray(row_share(this.mesh).of_leaders(told))  # [shares, 4]
        kept, too_long, _, used = told.sum(axis=0).tolist()
        if not kept:
            raise ValueError(
                f"{stage} step {number}: no row fits {longest} tokens (longest"
                f" {told[:, 2].max()}); add a larger bucket to --config.row_buckets"
            )
        batch = fill_batch(fitted.rows, shapes, lambda size: largest(size, f"{stage} shape"))
        batch = place_batch(batch, this.mesh)
        state, metrics = step(state, batch)
        return state, metrics | {
            "inputs/dropped_too_long": too_long,
            "inputs/padding_share": 1 - used / batch.tokens.size,
        }

    def plain(state: TrainState) -> Any:
        if trainable != "lora":
            return state.params
        return merge_lora(state.params, model.text.lora_scale)

    encode = functools.partial(encode_training_row, processor=this.processor, stage=stage)
    source = open_source(this, split, settings.batch, stage, encode, data)
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
    stream = open_stream(this, question_split(this.config, "rl"), settings.prompts, "rl")
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
            append_records(folder / "rollouts.jsonl", number, step.gather_rollouts())
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


def loop_settings(this: Run, stage: str, folder: Path, steps: int) -> loop.LoopSettings:
    """The loop part of a stage's config."""
    return loop.LoopSettings(
        name=stage,
        folder=folder,
        num_steps=steps,
        save_every=this.config.save_every,
        log_every=this.config.log_every,
        evaluate_every=this.config.eval.get("every_steps", 0),
        keep=keep_settings(this.config, stage),
        checkpoints=checkpoint_folder(this.config, folder),
        before_save=this.before_save,
    )


def encode_training_row(example: Example, *, processor: Processor, stage: str) -> EncodedRow:
    """The row of an Example in a supervised stage."""
    if stage == "vm_cpt":
        return encode_vm_cpt_row(example, processor)
    return encode_sft_row(example, processor, stage=stage)


def open_stream(
    this: Run,
    split: str,
    batch: int,
    stage: str,
    each: Callable[[Example], Any] | None = None,
    data: Path | None = None,
) -> Any:
    """This process's share of the Grain stream of a stage; its seed is the run's and the stage's.

    Of several shares, number i gets every n-th Example from the i-th on: together they are the
    batch that one process would read.

    Examples (or what `each` makes of them) are read ahead of the step by `config.data_workers`
    processes, 0 = a thread. `data` None: the run's.
    """
    seed = this.config.seed * 1000 + sum(stage.encode())
    share = row_share(this.mesh)
    return make_stream(
        data or this.workdir / "data",
        split,
        batch_examples=share.part(batch),
        seed=seed,
        process_index=share.number,
        process_count=share.count,
        workers=this.config.data_workers,
        each=each,
    )


def open_source(
    this: Run,
    split: str,
    batch: int,
    stage: str,
    each: Callable[[Example], Any] | None = None,
    data: Path | None = None,
) -> loop.Source:
    """A stage's stream as the loop wants it."""
    stream = open_stream(this, split, batch, stage, each, data)
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
    degree = row_share(this.mesh).degree
    return Evaluator(
        this.engine,
        EvaluationSettings(
            rows=-(-this.config.eval.rows // degree) * degree,  # results do not depend on it
            max_new_tokens=this.config.max_new_tokens,
            dtype=this.config.dtype,
            needs_think="direct_sft" not in this.config.stages,
        ),
    )


def evaluate_stage(this: Run, params: Any, name: str, files: Path) -> None:
    """The suites of `config.eval.suites` on a finished stage; skipped when already on disk.

    Args:
        this: the run.
        params: of the model in `files`.
        name: of the stage's folder.
        files: the model's folder, of which the results keep a digest.
    """
    path = this.workdir / name / "evaluation.json"
    if of_first(path.is_file, "look for an evaluation"):
        return
    digest = of_first(lambda: folder_digest(files), "digest of the model")
    identity = {"model_sha256": digest}
    suites = this.config.eval.suites
    results = ask_suites(this, params, path.parent / "evaluation", identity, suites)
    prefill = make_prefill(this.model, this.config.dtype)
    example = read_split(this.workdir / "data", this.config.eval.split, 1)[0]
    found: dict[str, Any] = {"stage": name}
    for view, suite, aware in (
        ("policy_free", "main", False),
        ("policy_aware", "in_context", True),
    ):
        milliseconds = measure_prefill_ms(
            prefill, params, example, this.processor, policy_in_prompt=aware, mesh=this.mesh
        )
        found[view] = results[suite]["summary"] | {"prefill_ms": milliseconds}
        found[f"{view}_records"] = results[suite]["records"]
    if is_first():
        write_json(path, found)
    this.progress.say(f"{name}: {_counts(results)}")


def evaluate_step(this: Run, params: Any, folder: Path, number: int) -> dict[str, Any]:
    """The paper's suites in the middle of a stage; returns the line for `evaluations.jsonl`."""
    about = {"stage": folder.name, "step": number}
    place = folder / f"evaluation-step{number}"
    results = ask_suites(this, params, place, about, PAPER_SUITES)
    line = {
        f"evaluation/{suite}_{what}": result["summary"][what]
        for suite, result in results.items()
        for what in ("accuracy", "score", "correct", "count")
    }
    append_metrics(folder / "evaluations.jsonl", number, line)
    this.progress.say(f"{folder.name} step {number}: {_counts(results)}")
    return line


def check_suites(config: ConfigDict) -> None:
    """The suites that a config names.

    Raises:
        ValueError: an unknown one, or one that every stage's evaluation needs is missing.
    """
    names = list(config.eval.suites)
    unknown = [name for name in names if name not in SUITES]
    missing = [name for name in ("main", "in_context") if name not in names]
    if unknown or missing:
        raise ValueError(
            f"config.eval.suites {names}: unknown {unknown}, missing {missing}; there are"
            f" {', '.join(SUITES)}"
        )


def ask_suites(
    this: Run, params: Any, folder: Path, model: dict[str, Any], suites: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Name -> result; override only where the data has it.

    Raises:
        ValueError: one of them has nothing to ask.
    """
    evaluator, config, data = this.evaluator, this.config, this.workdir / "data"
    assert evaluator is not None
    evaluator.load(params)
    identity = make_identity(config, data) | model
    context = Context(
        evaluator, params, config, data, folder, config.seed, this.progress, identity=identity
    )
    names = [name for name in suites if name != "override" or context.has_split("override")]
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
        if "correct" in result["summary"]
    )
