"""Which checkpoints stay, and what a save that fails leaves behind."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.io.checkpoints import (
    Keep,
    best_step,
    closing,
    finish_saves,
    open_checkpoints,
    restore_latest,
    restore_step,
    save_checkpoint,
    saved_steps,
)

ROOT = Path(__file__).parents[2]


def state_of(step: int) -> dict:
    return {"params": {"w": jnp.full((4,), float(step))}}


def save_all(folder, keep: Keep, scores: list[float | None]) -> None:
    with closing(open_checkpoints(folder, keep)) as manager:
        for step, score in enumerate(scores):
            save_checkpoint(manager, step, state_of(step), {"place": step}, score)
        finish_saves(manager)


@pytest.mark.parametrize(
    ("keep", "stay", "best"),
    [
        (Keep(last=2), [4, 5], None),
        (Keep(last=1, best=1, metric="a"), [1, 5], 1),
        (Keep(last=1, best=2, metric="a"), [1, 3, 5], 1),
        (Keep(last=3, best=1, metric="a", highest=False), [2, 3, 4, 5], 2),
    ],
)
def test_the_last_stay_and_the_best_beside_them(tmp_path, keep, stay, best):
    save_all(tmp_path, keep, [None, 0.9, 0.1, 0.5, 0.2, 0.3])
    assert saved_steps(tmp_path) == stay
    with closing(open_checkpoints(tmp_path, keep)) as manager:  # as a restart sees it
        assert best_step(manager) == best
        _, host, newest = restore_latest(manager, state_of(0))
        assert (newest, host) == (5, {"place": 5})
        if best is not None:
            state, host = restore_step(manager, best, state_of(0))
            assert host == {"place": best}
            np.testing.assert_array_equal(state["params"]["w"], float(best))


def test_of_equal_scores_the_later_is_best_and_without_scores_there_is_none(tmp_path):
    keep = Keep(last=1, best=1, metric="a")
    save_all(tmp_path / "equal", keep, [0.5, 0.7, 0.7, 0.5])
    assert saved_steps(tmp_path / "equal") == [2, 3]
    with closing(open_checkpoints(tmp_path / "equal", keep)) as manager:
        assert best_step(manager) == 2
    save_all(tmp_path / "none", keep, [None, None])
    with closing(open_checkpoints(tmp_path / "none", keep)) as manager:
        assert best_step(manager) is None


# a limit on the size of files is a full disk that needs no mount and no rights
DISK_FILLS_UP = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from trimpi_jax.io.checkpoints import (
    CheckpointFailed, closing, finish_saves, open_checkpoints, save_checkpoint
)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
numbers = jnp.asarray(np.random.default_rng(0).normal(size=200_000))  # do not shrink when packed
try:
    with closing(open_checkpoints(sys.argv[1])) as manager:
        save_checkpoint(manager, 1, {"params": numbers}, {})
        finish_saves(manager)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_checkpoint(manager, 2, {"params": numbers}, {})
        finish_saves(manager)
except CheckpointFailed as error:
    print(error)
    sys.exit(3)
"""


def test_a_disk_that_fills_up_is_told_and_the_last_checkpoint_is_whole(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", DISK_FILLS_UP, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert ran.returncode == 3, ran.stderr[-2000:]
    assert "could not be written" in ran.stdout and "the disk is full" in ran.stdout
    assert "checkpoint 1 is whole" in ran.stdout
    assert saved_steps(tmp_path) == [1]
    numbers = jnp.asarray(np.random.default_rng(0).normal(size=200_000))
    with closing(open_checkpoints(tmp_path)) as manager:  # room was made; what was half is gone
        state, _, step = restore_latest(manager, {"params": jnp.zeros_like(numbers)})
        assert step == 1
        np.testing.assert_array_equal(state["params"], numbers)
        save_checkpoint(manager, 2, jax.tree.map(lambda leaf: leaf + 1, state), {})
        finish_saves(manager)
    assert saved_steps(tmp_path) == [1, 2]
