"""Where the checkpoints of a run lie, which of them stay, and whether there is room for them.

    config.checkpoint_dir   "" = in the workdir; or a folder, or gs://bucket/run, where the results
                            are copied to as well
    config.keep_last        newest checkpoints that stay
    config.<stage>.keep_best, best_metric, result     the best stay, too, and may be handed on

All of it is looked at before the first step: a run must not find out after an hour that it cannot
save.

Next: trimpi_jax/stages/run_settings.py
"""

from __future__ import annotations

import functools
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from trimpi_jax.io.checkpoints import Keep
from trimpi_jax.io.hosts import config_digest
from trimpi_jax.io.results_copy import fetch_results, send_results
from trimpi_jax.io.storage import (
    claim_folder,
    claim_problem,
    is_remote,
    open_folder,
    probe_problem,
    space_problem,
)
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.lora import add_lora
from trimpi_jax.stages.loop import EVALUATION
from trimpi_jax.stages.run_settings import optimizer_settings, with_lora_scale
from trimpi_jax.stages.train_state import init_train_state, make_optimizer


def checkpoint_folder(config: Mapping[str, Any] | ConfigDict, folder: Path) -> str:
    """Where the checkpoints of the stage in `folder` lie."""
    elsewhere = config.get("checkpoint_dir") or ""
    if not elsewhere:
        return str(folder / "checkpoints")
    return os.fspath(open_folder(elsewhere) / folder.name)


def keep_settings(config: ConfigDict, stage: str) -> Keep:
    """Which checkpoints of a stage stay, and which one it hands on.

    Raises:
        ValueError: an option that would have no effect, or cannot be.
    """
    section, last = config[stage], config.get("keep_last", 2)
    best, result = section.get("keep_best", 0), section.get("result", "last")
    order, _, metric = section.get("best_metric", "").rpartition(" ")
    where = f"--config.{stage}"
    if last < 1 or best < 0:
        raise ValueError(
            f"--config.keep_last is at least 1 (got {last}), {where}.keep_best at least 0"
            f" (got {best})"
        )
    if result not in ("last", "best"):
        raise ValueError(f"{where}.result is 'last' or 'best', got '{result}'")
    if bool(best) != bool(metric):
        raise ValueError(
            f"{where}.keep_best={best} and {where}.best_metric='{section.get('best_metric', '')}'"
            " belong together: so many of the best by that metric stay, e.g. keep_best=1 and"
            " best_metric='highest evaluation/main_accuracy' or 'lowest train/loss'"
        )
    if metric and order not in ("highest", "lowest"):
        raise ValueError(
            f"{where}.best_metric is 'highest NAME' or 'lowest NAME', got '{section.best_metric}'"
        )
    if result == "best" and not best:
        raise ValueError(f"{where}.result=best needs {where}.keep_best and best_metric")
    if metric.startswith(EVALUATION) and not config.eval.get("every_steps", 0):
        raise ValueError(
            f"{where}.best_metric='{section.best_metric}' is measured by evaluations within the"
            " stage: set --config.eval.every_steps"
        )
    return Keep(last, best, metric, order != "lowest", result)


def checkpoint_bytes(config: ConfigDict, model: VLMConfig, stage: str) -> int:
    """Size of one checkpoint of a stage: float32 weights, adapters, moments."""
    settings, params = config[stage], vlm.param_shapes(model)
    if settings.trainable == "lora":
        scaled = with_lora_scale(model, settings)
        add = functools.partial(add_lora, config=scaled, rank=settings.lora_rank)
        params = jax.eval_shape(lambda tree, key: add(tree, key=key), params, jax.random.key(0))
    optimizer = make_optimizer(optimizer_settings(settings, 1000))
    start = functools.partial(init_train_state, optimizer=optimizer, trainable=settings.trainable)
    return _count_bytes(jax.eval_shape(start, params))


def check_saving(config: ConfigDict, model: VLMConfig, workdir: Path) -> None:
    """Looks whether everything that the rest of the run saves can be saved.

    Raises:
        ValueError: options that do not belong together.
        OSError: a folder that cannot be written to, or has too little room.
    """
    keep = {stage: keep_settings(config, stage) for stage in config.stages}
    elsewhere = config.get("checkpoint_dir") or ""
    if elsewhere and (problem := probe_problem(elsewhere)):
        raise OSError(f"--config.checkpoint_dir: {problem}")
    folders = {name: workdir / f"{i}_{name}" for i, name in enumerate(config.stages, start=1)}
    ahead = [name for name in folders if not (folders[name] / "model" / "config.json").is_file()]
    if not ahead:
        return
    sizes = {}
    for name in ahead:
        place = checkpoint_folder(config, folders[name])
        there = 0 if is_remote(place) else _folder_bytes(Path(place))
        one = checkpoint_bytes(config, model, name)
        sizes[f"{keep[name].count} checkpoints of {name}"] = max(one * keep[name].count - there, 0)
    largest = max(sizes, key=lambda name: sizes[name])  # a finished stage deletes its own
    models = {f"models of {len(ahead)} stages": len(ahead) * _count_bytes(vlm.param_shapes(model))}
    checkpoints = {largest: sizes[largest]}
    places = {str(workdir): models | ({} if elsewhere else checkpoints)}
    if elsewhere and not is_remote(elsewhere):
        where = os.fspath(open_folder(elsewhere))
        if os.stat(where).st_dev == os.stat(workdir).st_dev:
            places[str(workdir)] |= checkpoints
        else:
            places[where] = checkpoints
    problems = [text for where, parts in places.items() if (text := space_problem(where, parts))]
    if problems:
        raise OSError(
            "; ".join(problems)
            + ". Make room, or keep less (--config.keep_last, keep_best), or save elsewhere"
            " (--config.checkpoint_dir)"
        )


def bring_results(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> None:
    """Fetches what an earlier start left in the checkpoints' bucket, into an empty workdir."""
    elsewhere = config.get("checkpoint_dir") or ""
    if not is_remote(elsewhere):
        return
    if jax.process_index() == 0 and (names := fetch_results(workdir, elsewhere)):
        say(f"{workdir}: {len(names)} files of this run fetched from {elsewhere}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("results are fetched")


def claim_checkpoints(
    config: ConfigDict, workdir: Path, say: Callable[[str], None]
) -> Callable[[], None]:
    """Marks the folder of the checkpoints as this start's; returns what is called before each save.

    That looks whether the folder still is ours, and copies results into a bucket. The lock of a
    workdir (io/workdir_lock.py) holds on one machine and on file systems that know locks; object
    stores, and NFS mounted without locks, have none.

    Raises:
        ValueError: another run's folder.
    """
    elsewhere = config.get("checkpoint_dir") or ""
    if jax.process_index() != 0:
        return lambda: None
    place = elsewhere or workdir  # whose config a workdir belongs to is known by now
    token, before = claim_folder(place, config_digest(config) if elsewhere else "")
    if before is not None and (elsewhere or before.get("host") != socket.gethostname()):
        say(
            f"checkpoints: {place} was last used by process {before.get('pid')} on"
            f" {before.get('host')}; should that still run, it will stop at its next save"
        )

    def before_save() -> None:
        if problem := claim_problem(place, token):
            raise ValueError(problem)
        if is_remote(elsewhere):
            send_results(workdir, elsewhere)

    return before_save


def delete_checkpoints(config: ConfigDict, folder: Path) -> None:
    """Remove those of a finished stage."""
    place = open_folder(checkpoint_folder(config, folder))
    if place.exists():
        place.rmtree()


def _count_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
