"""How long runs will take: measured seconds of like stages in this folder, else the sweep's own.

Next: trimpi_jax/sweeps/runner.py
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.stages.result_files import read_result
from trimpi_jax.sweeps.child import Job, stage_path
from trimpi_jax.sweeps.identity import Code, stage_folders
from trimpi_jax.sweeps.plan import Run

START_S = 15.0  # a process with JAX, the report of a run


class Estimate(NamedTuple):
    """What one run would do."""

    run: Run
    state: str  # done, or to do
    stages: tuple[str, ...]  # all of it
    new: tuple[str, ...]  # those that no run before it leaves
    seconds: float


def estimate_runs(
    runs: Sequence[Run],
    chosen: Sequence[Run],
    todo: Sequence[Run],
    jobs: Mapping[str, Job],
    code: Code,
) -> list[Estimate]:
    """One line a chosen run, in order."""
    known = measure_stages(runs, jobs, code)
    missing = {run.name for run in todo}
    seen = set()
    plan = []
    for run in chosen:
        job, folders = jobs[run.name], stage_folders(run.config, code)
        new = []
        for name, key in folders.items():
            folder = stage_path(job, name, key)
            if folder not in seen and not (folder / "evaluation.json").is_file():
                new.append(name)
            seen.add(folder)
        if run.name not in missing:
            plan.append(Estimate(run, "done", tuple(folders), (), 0.0))
            continue
        seconds = START_S + sum(stage_seconds(run, name, known) for name in new)
        plan.append(Estimate(run, "to do", tuple(folders), tuple(new), seconds))
    return plan


def group_seconds(runs: Sequence[Run]) -> dict[str, float]:
    """Group -> seconds, from the sweep's own numbers alone: the same on every machine."""
    totals: dict[str, float] = collections.defaultdict(float)
    for run in runs:
        names = ["0_base", *(f"1_{stage}" for stage in run.config.stages)]
        totals[run.group] += START_S + sum(stage_seconds(run, name, {}) for name in names)
    return dict(totals)


def stage_seconds(run: Run, folder: str, known: Mapping[Any, float]) -> float:
    """Training and evaluation of one stage."""
    stage = folder.partition("_")[2]
    if (run.column.name, stage) in known:
        return known[run.column.name, stage]
    given = run.column.seconds
    if stage == "base":
        return given.get("data", 0.0) + given.get("evaluation", 0.0)
    if stage == "rl":
        training = run.config.rl.steps * given.get("rl", 0.0)
    elif stage == "distillation":  # sampling is about a quarter of an RL step, SFT comes after
        training = run.config.distillation.rollouts * given.get("rollout", 0.0)
        training += given.get("cot_sft", 0.0)
    else:
        training = given.get(stage, 0.0)
    return training + given.get("evaluation", 0.0)


def measure_stages(
    runs: Sequence[Run], jobs: Mapping[str, Job], code: Code
) -> dict[tuple[str, str], float]:
    """(column, stage) -> median seconds of those that are finished in this folder."""
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    seen = set()
    for run in runs:
        for name, key in stage_folders(run.config, code).items():
            folder = stage_path(jobs[run.name], name, key)
            if folder in seen or not (folder / "evaluation.json").is_file():
                continue
            seen.add(folder)
            asked = [read_result(path) for path in (folder / "evaluation").glob("*.json")]
            seconds = sum(result["seconds"]["suite"] for result in asked if result)
            lines = read_metrics(folder / "metrics.jsonl")
            seconds += sum(line.get("time/step_s", 0.0) for line in lines)
            found[run.column.name, name.partition("_")[2]].append(seconds)
    return {what: statistics.median(values) for what, values in found.items()}
