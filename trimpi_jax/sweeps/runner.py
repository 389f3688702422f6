"""Run a sweep: what is missing, one run after another; then the results file and the page.

Every run is a process of its own, so that one that dies (memory, a broken kernel) takes nothing
with it. Results are written as soon as a run ends, and the page after each.

Next: trimpi_jax/sweeps/tables.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimpi_jax.io.progress import Progress
from trimpi_jax.io.workdir_lock import lock_workdir
from trimpi_jax.stages.result_files import write_json
from trimpi_jax.sweeps.child import EXIT_STOPPED, Job, run_job, stage_path
from trimpi_jax.sweeps.estimate import Estimate, estimate_runs, group_seconds
from trimpi_jax.sweeps.identity import Code, current_code, run_key, stage_folders
from trimpi_jax.sweeps.page import write_page
from trimpi_jax.sweeps.plan import Run, Sweep, choose_shard, make_runs, select
from trimpi_jax.sweeps.records import (
    DONE,
    FAILED,
    Found,
    check_same_questions,
    find_results,
    gather,
    identity,
    record_path,
    write_all,
    write_record,
)

Start = Callable[[Job], int]  # runs a job, gives its exit status


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep is run; see the flags of trimpi_jax/sweep.py."""

    only: str = ""
    shard: str = ""
    dry_run: bool = False
    page_only: bool = False
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_sweep(
    sweep: Sweep,
    root: Path,
    options: Options,
    progress: Progress | None = None,
    start: Start | None = None,
    code: Code | None = None,
) -> int:
    """Run or continue a sweep; returns how many of the chosen runs failed.

    Args:
        sweep: what to run.
        root: the sweep's workdir.
        options: see `Options`.
        progress: where lines go.
        start: how a job is run; None = in a process of its own.
        code: None = that of this installation.

    Raises:
        ValueError, OSError: bad options, runs that cannot be compared, a folder that is no sweep's.
        Stopped: a run was stopped; it is saved.
    """
    progress = progress or Progress()
    code = code or current_code()
    root = root.expanduser().resolve()
    runs = make_runs(sweep, options.changes)
    jobs = {run.name: _make_job(run, root, code) for run in runs}
    keys = {name: job.key for name, job in jobs.items()}
    chosen = select(choose_shard(runs, options.shard, group_seconds(runs)), options.only)
    if not options.dry_run:
        claim_root(root, sweep)
    found = find_results(root, keys)
    _tell_others(found, code, progress)
    todo = [run for run in chosen if found.results.get(run.name, {}).get("status") != DONE]
    plan = estimate_runs(runs, chosen, todo, jobs, code)
    if options.dry_run:
        progress.table(plan_table(sweep, plan))
        progress.say(plan_summary(plan))
        return 0
    if not options.page_only:
        progress.say(plan_summary(plan))
        try:
            _run_all(todo, jobs, code, root, progress, start or start_process, sweep, runs, keys)
        except Stopped:
            progress.say("stopped and saved; start the same command again to continue")
            raise
    found = find_results(root, keys)
    finish(sweep, runs, root, found)
    done = [run for run in chosen if found.results.get(run.name, {}).get("status") == DONE]
    failed = [run.name for run in chosen if found.results.get(run.name, {}).get("status") == FAILED]
    progress.say(
        f"{len(done)} of {len(chosen)} chosen runs are done, {len(failed)} failed."
        f" Page: {root / 'report.html'}  Results: {root / 'results.jsonl'}"
    )
    for name in failed:
        progress.say(f"failed: {name}: {found.results[name]['reason']}")
    return len(failed)


class Stopped(SystemExit):
    """The sweep was asked to stop; the same command goes on."""


def claim_root(root: Path, sweep: Sweep) -> None:
    """Make the folder this sweep's, or check that it is a sweep's of this name.

    Raises:
        ValueError: it is another sweep's, or something else.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "sweep.json"
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved.get("sweep") != sweep.name:
            raise ValueError(
                f"{root} belongs to the sweep '{saved.get('sweep')}', this is '{sweep.name}';"
                " choose another folder"
            )
        return
    if any(not found.name.startswith("sweep.json") for found in root.iterdir()):
        raise ValueError(f"{root} is not empty and has no sweep.json: not a sweep's folder")
    write_json(path, {"sweep": sweep.name})


def finish(sweep: Sweep, runs: Sequence[Run], root: Path, found: Found) -> None:
    """Results file and page of what there is.

    Raises:
        ValueError: results of one group are about other questions.
    """
    check_same_questions(found.results)
    ordered = {run.name: found.results[run.name] for run in runs if run.name in found.results}
    write_all(root, ordered)
    write_page(sweep, runs, ordered, found, root)


def _make_job(run: Run, root: Path, code: Code) -> Job:
    return Job(run.name, run.group, run.config, run_key(run.config, code), root, code.sha256)


def _run_all(
    todo: Sequence[Run],
    jobs: Mapping[str, Job],
    code: Code,
    root: Path,
    progress: Progress,
    start: Start,
    sweep: Sweep,
    runs: Sequence[Run],
    keys: Mapping[str, str],
) -> None:
    """One after another; a run that needs a stage that failed is not tried."""
    failed_stages: dict[Path, str] = {}
    for group in dict.fromkeys(run.group for run in todo):
        folder = root / "stages" / group
        folder.mkdir(parents=True, exist_ok=True)
        with lock_workdir(folder, progress.say):
            for number, run in enumerate(todo, start=1):
                if run.group != group:
                    continue
                job = jobs[run.name]
                progress.say(f"[{number}/{len(todo)}] {run.name}: {run.row.label}")
                record = _run_one(run, job, code, start, failed_stages)
                write_record(record_path(root, run.name, job.key), record)
                said = f"failed: {record['reason']}" if record["status"] == FAILED else "done"
                progress.say(
                    f"[{number}/{len(todo)}] {run.name}: {said} ({record['wall_s']:.0f} s)"
                )
                try:
                    finish(sweep, runs, root, find_results(root, keys))
                except Exception as error:  # the next run matters more; the end tells it again
                    progress.say(f"the page could not be written: {type(error).__name__}: {error}")


def _run_one(
    run: Run, job: Job, code: Code, start: Start, failed_stages: dict[Path, str]
) -> dict[str, Any]:
    """The result of a run, done or failed."""
    began = time.time()
    head = identity(run, job, code) | {"machine": machine()}
    folders = [stage_path(job, name, key) for name, key in stage_folders(run.config, code).items()]
    before = next((failed_stages[folder] for folder in folders if folder in failed_stages), None)
    reason = before
    if before is None:
        status = start(job)
        if status == EXIT_STOPPED:
            raise Stopped(EXIT_STOPPED)
        reason = _reason(job, status) if status else None
    body: dict[str, Any] = {}
    if reason is None:
        try:
            body = gather(job, code)
        except (ValueError, OSError, KeyError) as error:
            reason = f"its results cannot be read: {type(error).__name__}: {error}"
    ended = {"status": DONE if reason is None else FAILED, "wall_s": time.time() - began}
    if reason is not None:
        ended["reason"] = reason
        unfinished = [f for f in folders if not (f / "evaluation.json").is_file()]
        if unfinished and before is None:
            name = unfinished[0].name
            failed_stages[unfinished[0]] = f"its stage {name} failed in {run.name}: {reason}"
    return head | ended | body


def _reason(job: Job, status: int) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(job.failed.read_text())["reason"]
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}; see {job.log}"
    return f"the process ended with status {status}; see {job.log}"


def start_process(job: Job) -> int:
    """Run a job in a process of its own; its exit status, negative for a signal.

    Ctrl-C reaches the run, too, which saves itself; SIGTERM is passed on.
    """
    child = multiprocessing.get_context("spawn").Process(target=run_job, args=(job, os.getpid()))
    child.start()
    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = child.exitcode or 0
    return EXIT_STOPPED if asked and status else status


def machine() -> dict[str, Any]:
    """Where a run was made; no name."""
    return {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))}


def _tell_others(found: Found, code: Code, progress: Progress) -> None:
    if found.stale:
        other = sum(record.get("code_sha256") != code.sha256 for record in found.stale)
        progress.say(
            f"{len(found.stale)} results of other code ({other}) or configs are stale: they stay in"
            " results/ and are not counted"
        )
    for line in found.broken:
        progress.say(f"no result: {line}")


def plan_table(sweep: Sweep, plan: Sequence[Estimate]) -> Table:
    """What would be run, in order."""
    table = Table(title=f"{sweep.name}: runs, and what each would train")
    for header in ("run", "state", "trains or evaluates", "about, s"):
        table.add_column(header, justify="right" if header == "about, s" else "left", no_wrap=True)
    for line in plan:
        table.add_row(
            line.run.name,
            line.state,
            ", ".join(line.new) or "-",
            f"{line.seconds:.0f}",
        )
    return table


def plan_summary(plan: Sequence[Estimate]) -> str:
    """One line."""
    todo = [line for line in plan if line.state != DONE]
    seconds = sum(line.seconds for line in todo)
    stages = sum(len(line.new) for line in todo)
    needed = sum(len(line.stages) for line in todo)
    return (
        f"{len(todo)} of {len(plan)} runs to make, {stages} stages to train or evaluate for the"
        f" {needed} that they have (the others are shared), about {seconds / 60:.0f} minutes"
    )
