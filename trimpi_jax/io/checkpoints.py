"""Orbax checkpoints of a stage: training state on the device, data position on the host.

A checkpoint is atomic (a killed or failed save leaves the previous one), asynchronous, and holds
everything a resumed stage needs to take the identical next step: parameters, optimizer state, step,
the stream's state, and the metrics kept for the report. It lies in a folder or in an object store
(io/storage.py); Orbax writes both.

The last `Keep.last` stay, for going on; and, of those with a score, the best `Keep.best`.

Source: orbax-checkpoint 0.12 CheckpointManager and its preservation policies.
Next: trimpi_jax/io/metrics.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from trimpi_jax.io.storage import free_bytes, open_folder

SCORE = "score"  # the one metric that is saved with a checkpoint
DISK_IS_FULL = ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large", "ENOSPC")


class CheckpointFailed(OSError):
    """A checkpoint could not be written; those before it are whole."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, and which one a stage hands on."""

    last: int = 2
    best: int = 0  # so many more, by score
    metric: str = ""  # the score: mean since the checkpoint before, or of an evaluation
    highest: bool = True  # a high score is good
    result: str = "last"  # or "best"

    @property
    def count(self) -> int:
        """Most checkpoints that are on the disk at a time, the one being written among them."""
        return self.last + self.best + 1


def open_checkpoints(folder: str | os.PathLike, keep: Keep | None = None) -> ocp.CheckpointManager:
    """A manager of `folder` that keeps what `keep` says."""
    keep = keep or Keep()
    kept: list[Any] = [policies.LatestN(keep.last)]
    if keep.best:
        kept.append(
            policies.BestN(
                get_metric_fn=_score,
                reverse=not keep.highest,
                n=keep.best,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=_score if keep.best else None,
        best_mode="max" if keep.highest else "min",
        create=True,
        cleanup_tmp_directories=True,  # what a killed or failed save left
        enable_async_checkpointing=True,
    )
    manager = ocp.CheckpointManager(open_folder(folder), options=options)
    # JAX's preemption service takes the last number that anyone asks about for the step that a
    # process is at; the loop asks (stages/loop.py), and Orbax would ask with other numbers.
    manager.reached_preemption = lambda step: False  # pyright: ignore[reportAttributeAccessIssue]
    return manager


def save_checkpoint(
    manager: ocp.CheckpointManager, step: int, state: Any, host: dict, score: float | None = None
) -> None:
    """Save `state` (a tree of arrays) and `host` (JSON-able) as checkpoint `step`.

    Writing goes on after the return; a failure is told by the next call of this or of
    `finish_saves`.

    Raises:
        CheckpointFailed: this one, or the one before.
    """
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    with _telling(manager):
        manager.save(step, args=args, metrics=None if score is None else {SCORE: float(score)})


def finish_saves(manager: ocp.CheckpointManager) -> None:
    """Wait until everything is written.

    Raises:
        CheckpointFailed: it cannot be.
    """
    with _telling(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def closing(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    """Closes a manager at the end; a failed save does not hide the error that ended the body."""
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):
            manager.close()
        raise
    else:
        with _telling(manager):
            manager.close()


@contextlib.contextmanager
def _telling(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise into one message."""
    try:
        yield
    except Exception as error:
        raise CheckpointFailed(_failure(error, str(manager.directory))) from error


def _failure(error: Exception, folder: str) -> str:
    whole, left = [], None
    with contextlib.suppress(Exception):  # the store may be out of reach now
        whole, left = saved_steps(folder), free_bytes(folder)
    text = " ".join(str(error).split())
    is_full = any(sign in text for sign in DISK_IS_FULL)
    reason = "the disk is full" if is_full else "it failed"
    advice = "Make room" if is_full else "See that the folder can be written to"
    room = "" if left is None else f" {left / 2**30:.2f} GiB are free."
    good = f"checkpoint {whole[-1]} is whole" if whole else "no checkpoint was written before"
    return (
        f"a checkpoint could not be written to {folder}: {reason} ({text[:400]}).{room} Nothing"
        f" else is lost: {good}. {advice}, then start the same command again"
    )


def _score(metrics: Any) -> float:
    return metrics[SCORE]


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The checkpoint with the best score, the later one of equals; None when none has a score."""
    if not any(manager.metrics(step) for step in manager.all_steps()):
        return None
    return manager.best_step()


def restore_latest(manager: ocp.CheckpointManager, state: Any) -> tuple[Any, dict, int] | None:
    """(state, host dict, step) of the newest checkpoint, or None when there is none.

    Args:
        manager: see `open_checkpoints`.
        state: a state of the same structure; its shapes, dtypes and shardings are what is restored
            onto, so a checkpoint of another mesh is re-laid.
    """
    step = manager.latest_step()
    if step is None:
        return None
    return *restore_step(manager, step, state), step


def restore_step(manager: ocp.CheckpointManager, step: int, state: Any) -> tuple[Any, dict]:
    """(state, host dict) of one checkpoint; `state` as in `restore_latest`."""
    template = jax.tree.map(_abstract, state)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(template), host=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], restored["host"]


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """The steps of the whole checkpoints in a folder, also in one that is being written to."""
    place = open_folder(folder)
    if not place.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in place.iterdir()
        # the second is written first; in an object store the third is what makes it whole
        if path.name.isdigit()
        and (path / "_CHECKPOINT_METADATA").exists()
        and (not _is_bucket(path) or (path / "commit_success.txt").exists())
    )


def _is_bucket(path: Any) -> bool:
    return os.fspath(path).startswith("gs://")


def restore_params(
    folder: str | os.PathLike, step: int, shardings_of: Callable[[Any], Any], dtype: Any = None
) -> Any:
    """The parameters of checkpoint `step`, without the optimizer's state.

    Args:
        folder: of the checkpoints.
        step: one of `saved_steps`.
        shardings_of: from the tree of shapes to a sharding per parameter.
        dtype: of the restored parameters; None = as saved.
    """
    item = open_folder(folder) / str(step) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(item).item_metadata.tree["params"]
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), saved
        )
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings_of(shapes),
        )
        wanted = {"params": template}
        return checkpointer.restore(
            item,
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )["params"]
