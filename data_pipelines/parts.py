"""Build a dataset piece by piece: in several processes, and on from where a build was killed.

A `Part` makes Examples of one or more splits from its own arguments alone, so parts can be made
in any order, by any number of processes, and give the same bytes. Finished parts are kept in the
hidden folder of the build, each with a report; the next start with the same recipe, versions and
parts goes on with those that are missing.

    .DIR.building/build.json                       what is being built
    .DIR.building/train-part00003-00000.array_record
    .DIR.building/part00003.json                   written last: this part is finished

Worker processes are started fresh ("spawn": JAX does not survive a fork), compute on one CPU thread
and with the instructions that every x86-64 server has, so that their arithmetic is the same
everywhere. With `processes=0` the parts are made in this process, on its default device.

Next: data_pipelines/build.py
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.building import clear_building, open_building, seal_dataset, versions
from data_pipelines.example import Example
from data_pipelines.shards import SHARD_EXAMPLES, is_shard_whole, write_examples

OnProgress = Callable[[int, int], None]  # (examples done, examples in all)
Made = Mapping[str, Sequence[Example]]  # split -> Examples
PLAN = "build.json"

# Without AVX2 and its fused multiply-add about 2 bytes of 100,000 of a picture differ; with AVX-512
# none did.
WORKER_XLA_FLAGS = "--xla_cpu_max_isa=AVX2" if platform.machine() in ("x86_64", "AMD64") else ""
WORKER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # N processes must not share one accelerator
    "XLA_FLAGS": WORKER_XLA_FLAGS,
    "NPROC": "1",  # XLA's and Eigen's thread pools
    "OMP_NUM_THREADS": "1",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a dataset that can be made on its own.

    `make` is picklable (`functools.partial` of a function of a module) and deterministic.
    """

    name: str  # unique in its dataset
    counts: Mapping[str, int]  # split -> how many Examples `make` gives
    make: Callable[[], Made]

    @property
    def examples(self) -> int:
        """Examples of all splits together."""
        return sum(self.counts.values())


def iter_splits(
    parts: Sequence[Part], on_progress: OnProgress = lambda done, total: None
) -> dict[str, Iterator[Example]]:
    """Split name -> its Examples, made lazily in this process, each part once.

    What a part made for another split is kept until that split is consumed.
    """
    total = sum(part.examples for part in parts)
    waiting: list[dict[str, Sequence[Example]] | None] = [None] * len(parts)
    done = 0

    def made(number: int) -> dict[str, Sequence[Example]]:
        nonlocal done
        found = waiting[number]
        if found is None:
            found = waiting[number] = dict(parts[number].make())
            done += parts[number].examples
            on_progress(done, total)
        return found

    def iterate(split: str) -> Iterator[Example]:
        for number in range(len(parts)):
            yield from made(number).pop(split, ())

    return {name: iterate(name) for name in dict.fromkeys(n for part in parts for n in part.counts)}


def build_parts(
    folder: str | Path,
    parts: Sequence[Part],
    recipe: Mapping[str, Any],
    *,
    processes: int = 0,
    on_progress: OnProgress = lambda done, total: None,
    shard_examples: int = SHARD_EXAMPLES,
    licence: str = "",
) -> dict[str, Any]:
    """Make all parts, in order of their list, into a dataset; returns the manifest.

    Args:
        folder: created; must not hold a dataset already.
        parts: the pieces; a part's Examples start a new shard.
        recipe, shard_examples, licence: see `building.write_dataset`.
        processes: worker processes; 0 = this process. The bytes do not depend on how many.
        on_progress: called with (examples done, examples in all), also for parts found finished.

    Raises:
        ValueError: as `building.write_dataset`, and what a part raises. Finished parts are kept.
        RuntimeError: a worker died.
    """
    if len({part.name for part in parts}) != len(parts):
        raise ValueError("the parts of a dataset must have different names")
    made_in = "one process"
    if processes:
        made_in = f"worker processes, JAX_PLATFORMS=cpu XLA_FLAGS={WORKER_XLA_FLAGS}"
    built_with = versions() | {"made in": made_in}
    plan = {
        "recipe": dict(recipe),
        "built_with": built_with,
        "parts": [part.name for part in parts],
        "shard_examples": shard_examples,
    }
    plan = json.loads(json.dumps(plan))
    with open_building(folder) as building:
        if _read_json(building / PLAN) != plan:
            clear_building(building)
            _write_json(building / PLAN, plan)
        finished = [_is_finished(building, number) for number in range(len(parts))]
        missing = [number for number, there in enumerate(finished) if not there]
        total = sum(part.examples for part in parts)
        done = total - sum(parts[number].examples for number in missing)
        on_progress(done, total)
        for number in _make_all(building, parts, missing, processes, shard_examples):
            done += parts[number].examples
            on_progress(done, total)
        reports = [_read_json(building / _report(number)) for number in range(len(parts))]
        return seal_dataset(
            building, Path(folder), reports, recipe, built_with=built_with, licence=licence
        )


def _make_all(
    building: Path, parts: Sequence[Part], missing: list[int], processes: int, shard_examples: int
) -> Iterator[int]:
    """Make the missing parts; yields the number of each as it is finished."""
    if not processes:
        for number in missing:
            _make_part(building, number, parts[number], shard_examples)
            yield number
        return
    with concurrent.futures.ProcessPoolExecutor(
        min(processes, len(missing)) or 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    ) as workers:
        running = {
            workers.submit(_make_part, building, number, parts[number], shard_examples): number
            for number in missing
        }
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                yield running[future]
        except concurrent.futures.BrokenExecutor as error:
            raise RuntimeError(
                "a worker process died (out of memory, or killed); finished parts are kept: the"
                " same command goes on from there, with fewer processes if memory was short"
            ) from error
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _make_part(building: Path, number: int, part: Part, shard_examples: int) -> None:
    """Make one part and write it; its report comes last and marks it as finished."""
    report = {
        split: write_examples(building, f"{split}-part{number:05d}", examples, shard_examples)
        for split, examples in part.make().items()
    }
    counts = {split: len(piece["identities"]) for split, piece in report.items()}
    if counts != dict(part.counts):
        raise ValueError(f"part {part.name} made {counts} examples, {dict(part.counts)} were due")
    _write_json(building / _report(number), report)


def _start_worker() -> None:
    """Before anything imports JAX here: one CPU thread, the common instructions, no orphan."""
    os.environ.update(WORKER_ENVIRONMENT)
    if "jax" in sys.modules:  # the program's main module imported it; no device is open yet
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _is_finished(building: Path, number: int) -> bool:
    report = _read_json(building / _report(number))
    return report is not None and all(
        is_shard_whole(building, shard) for piece in report.values() for shard in piece["shards"]
    )


def _report(number: int) -> str:
    return f"part{number:05d}.json"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or cut by whatever killed the build
        return None


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_suffix(".scratch")
    scratch.write_text(json.dumps(value))
    os.replace(scratch, path)
