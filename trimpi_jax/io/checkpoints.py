"""Orbax checkpoints of a stage: training state on the device, data position on the host.

A checkpoint is atomic (a killed save leaves the previous one), asynchronous, and holds everything a
resumed stage needs to take the identical next step: parameters, optimizer state, step, the stream's
state, and the metrics kept for the report.

Source: orbax-checkpoint 0.12 CheckpointManager.
Next: trimpi_jax/io/metrics.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_checkpoints(folder: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """A manager of `folder` that keeps the last `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save_checkpoint(manager: ocp.CheckpointManager, step: int, state: Any, host: dict) -> None:
    """Save `state` (a tree of arrays) and `host` (JSON-able) as checkpoint `step`."""
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    manager.save(step, args=args)


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
    template = jax.tree.map(_abstract, state)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(template), host=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], restored["host"], step


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def saved_steps(folder: str | Path) -> list[int]:
    """The steps of the whole checkpoints in a folder, also in one that is being written to."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").is_file()
    )


def restore_params(
    folder: str | Path, step: int, shardings_of: Callable[[Any], Any], dtype: Any = None
) -> Any:
    """The parameters of checkpoint `step`, without the optimizer's state.

    Args:
        folder: of the checkpoints.
        step: one of `saved_steps`.
        shardings_of: from the tree of shapes to a sharding per parameter.
        dtype: of the restored parameters; None = as saved.
    """
    item = Path(folder).resolve() / str(step) / "state"
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
