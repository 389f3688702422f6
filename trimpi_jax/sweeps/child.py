"""One run of a sweep, in a process of its own: its stages are those that other runs share.

    DIR/data/GROUP-KEY/                 the dataset of a group
    DIR/stages/GROUP/2_cot_sft-KEY/     a stage: checkpoints while it trains, then model, evaluation
                      stage.json        what it belongs to
    DIR/runs/NAME-KEY/                  the workdir of a run; data and stages are links to those
    DIR/logs/NAME-KEY.txt               what it printed
             NAME-KEY.failed.json       why it failed, if it did
    DIR/compiled/HOST/                  compiled programs, for later runs on the same machine

A killed run leaves its stage half done where the next run that needs it finds it and goes on.

Next: trimpi_jax/sweeps/runner.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from trimpi_jax.stages.result_files import make_identity, write_json
from trimpi_jax.sweeps.identity import current_code, data_key, short, stage_folders

EXIT_FAILED, EXIT_STOPPED = 1, 75
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a child process is told."""

    name: str
    group: str
    config: ConfigDict
    key: str
    root: Path  # the sweep's workdir
    code_sha256: str  # of the code that the sweep was started with

    @property
    def workdir(self) -> Path:
        return self.root / "runs" / f"{self.name}-{short(self.key)}"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.name}-{short(self.key)}.txt"

    @property
    def failed(self) -> Path:
        return self.log.with_suffix(".failed.json")


def stage_path(job: Job, name: str, key: str) -> Path:
    """Where the stage with this key lies."""
    return job.root / "stages" / job.group / f"{name}-{short(key)}"


def run_job(job: Job, parent: int) -> None:
    """Run or continue a job and exit: 0 = done, 75 = stopped and saved, 1 = failed (the reason is
    in `job.failed`).

    Args:
        job: what to run.
        parent: process id of the sweep; this process ends with it.
    """
    os.setpgid(0, 0)  # Ctrl-C reaches the sweep, which passes it on once
    _end_with_parent(parent)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    job.failed.unlink(missing_ok=True)
    try:
        if current_code().sha256 != job.code_sha256:
            raise RuntimeError(
                "the code was changed while the sweep ran; start the same command again: it makes"
                " the runs of the new code and shows the old ones as stale"
            )
        _keep_compiled(job.root / "compiled" / (platform.node() or "host"))
        train(job)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)
    except Exception as error:  # whatever it is: the next run is another one
        reason = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        print(trace, flush=True)
        write_json(job.failed, {"reason": reason, "traceback": trace})
        sys.exit(EXIT_FAILED)


def train(job: Job) -> None:
    """Data, links, stages, evaluations."""
    from rich.console import Console

    from trimpi_jax.io.progress import Progress
    from trimpi_jax.stages.pipeline import run
    from trimpi_jax.stages.workdir import claim_workdir, prepare_data

    progress = Progress(Console(soft_wrap=True, force_terminal=False))
    claim_workdir(job.config, job.workdir)
    data = job.root / "data" / f"{job.group}-{short(data_key(job.config, current_code()))}"
    data.parent.mkdir(parents=True, exist_ok=True)
    prepare_data(job.config, data, progress)
    link(job.workdir / "data", data)
    facts = make_identity(job.config, data)
    for name, key in stage_folders(job.config, current_code()).items():
        folder = stage_path(job, name, key)
        open_stage(folder, {"key": key, "data_sha256": facts["data_sha256"], "first_run": job.name})
        link(job.workdir / name, folder)
    run(job.config, job.workdir, progress)
    shutil.rmtree(job.workdir / "final")  # the last stage's model, once more


def open_stage(folder: Path, facts: dict[str, Any]) -> None:
    """Make a stage's folder, or check that it is the one that is meant.

    Raises:
        ValueError: it was trained on other data, or by another key of the same beginning.
    """
    path = folder / "stage.json"
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [name for name in ("key", "data_sha256") if found[name] != facts[name]]
        if differing:
            raise ValueError(
                f"{folder} belongs to another {' and '.join(differing)} than this run; delete it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def link(place: Path, target: Path) -> None:
    """A relative link, so that the sweep's folder can be moved."""
    if not place.is_symlink():
        place.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)


def _keep_compiled(cache: Path) -> None:
    """Programs that another run has compiled are read from the sweep's folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _end_with_parent(parent: int) -> None:
    """Where the system can (Linux), die when the sweep is killed: nothing trains unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_FAILED)
