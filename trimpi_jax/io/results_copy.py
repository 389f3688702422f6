"""The results of a run beside its checkpoints in a bucket: for machines that lose their disks.

    gs://bucket/run/.claim                whose it is (io/storage.py)
    gs://bucket/run/3_rl/40/...           checkpoints of the stage that runs
    gs://bucket/run/workdir/...           config, metrics, evaluations, models, as in the workdir

The workdir stays a folder: what is appended to, locked and read back at once has no place in an
object store. Copies are made at every save and after every stage; a start in an empty workdir first
fetches them. Data is not copied: it is built again from the config, or lies in `data_dir`.

Next: trimpi_jax/io/checkpoints.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trimpi_jax.io.storage import list_files, open_folder

COPIES = "workdir"
SENT = ".sent.json"  # file -> size and time of what was copied last
LEFT_OUT = ("data", "checkpoints")  # folders: of the run, of its stages
LAST = ("evaluation.json", "config.json")  # mark a stage, a model, a run as whole


def send_results(workdir: Path, elsewhere: str | os.PathLike) -> list[str]:
    """Copies what is new in a workdir; returns their names. What marks a thing as whole goes last.

    Args:
        workdir: of the run.
        elsewhere: config.checkpoint_dir.
    """
    place, record = open_folder(elsewhere) / COPIES, workdir / SENT
    sent = json.loads(record.read_text()) if record.is_file() else {}
    names = []
    for path in sorted(_files(workdir), key=_order):
        name, state = path.relative_to(workdir).as_posix(), [*_state(path)]
        if sent.get(name) == state:
            continue
        _copy(path, place / name)
        sent[name] = state
        names.append(name)
    if names:
        record.write_text(json.dumps(sent))
    return names


def fetch_results(workdir: Path, elsewhere: str | os.PathLike) -> list[str]:
    """Copies the results of a run into a workdir that has none; returns their names."""
    place = open_folder(elsewhere) / COPIES
    if (workdir / "config.json").exists() or not (place / "config.json").exists():
        return []
    names = [path.relative_to(place).as_posix() for path in list_files(place)]
    names.sort(key=lambda name: _order(workdir / name))
    sent = {}
    for name in names:
        _copy(place / name, workdir / name)
        sent[name] = [*_state(workdir / name)]
    (workdir / SENT).write_text(json.dumps(sent))
    return names


def _files(workdir: Path) -> list[Path]:
    found = []
    for folder, below, files in os.walk(workdir):
        here = Path(folder)
        left_out = LEFT_OUT[:1] if here == workdir else LEFT_OUT[1:]
        below[:] = [name for name in below if name not in left_out and not _is_passing(name)]
        found += [here / name for name in files if not _is_passing(name)]
    return found


def _is_passing(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part")  # locks, probes; half-written things


def _order(path: Path) -> tuple[int, int, str]:
    """Files that mark something as whole come last, the outer after the inner."""
    rank = LAST.index(path.name) + 1 if path.name in LAST else 0
    return bool(rank), -len(path.parts) if rank else 0, path.as_posix()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _copy(source: Any, target: Any) -> None:
    source, target = open_folder(source), open_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.copy(target, overwrite=True)
