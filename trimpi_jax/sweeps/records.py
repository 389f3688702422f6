"""The result of a run as one JSON object, and all of them as one file.

    DIR/results/NAME-KEY.json   one run: done or failed, what it belongs to, numbers
    DIR/results.jsonl           those of the present code and configs, one a line

A result whose key is not that of the run as it would be made now (other code, config, base model,
package versions) is stale: told, never counted.

In: workdirs as `sweeps/child.py` leaves them.
Next: trimpi_jax/sweeps/runner.py
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.shards import read_manifest
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.stages.result_files import digest, read_result
from trimpi_jax.sweeps.child import Job
from trimpi_jax.sweeps.identity import short, stage_folders
from trimpi_jax.sweeps.plan import Run

SCHEMA = 1
DONE, FAILED = "done", "failed"
ANSWERED = ("main", "in_context", "override")  # suites of which every answer is kept
CURVES = (
    "train/loss",
    "rollouts/accuracy_free",
    "rollouts/accuracy_aware",
    "rollouts/reward_mean",
)
CURVE_POINTS = 60


class Found(NamedTuple):
    """What lies in a sweep's folder."""

    results: dict[str, dict[str, Any]]  # run name -> result of the present code and config
    stale: list[dict[str, Any]]  # of others
    broken: list[str]  # files that are no results


def identity(run: Run, job: Job, code: Any) -> dict[str, Any]:
    """The head of a result."""
    return {
        "schema": SCHEMA,
        "run": run.name,
        "row": run.row.name,
        "label": run.row.label,
        "method": run.row.method,
        "column": run.column.name,
        "seed": run.seed,
        "key": job.key,
        "config_sha256": digest(json.loads(run.config.to_json())),
        "code_sha256": code.sha256,
        "versions": code.versions,
    }


def gather(job: Job, code: Any) -> dict[str, Any]:
    """What a finished run found: numbers of its last stage, and what training took.

    Raises:
        ValueError, OSError: a file of the run is missing or broken.
    """
    stages = [
        _stage(job.workdir / name, key) for name, key in stage_folders(job.config, code).items()
    ]
    last = job.workdir / stages[-1]["stage"]
    told = json.loads((last / "evaluation.json").read_text())
    suites, answers = {}, {}
    for path in sorted((last / "evaluation").glob("*.json")):
        result = read_result(path)
        if result is None:
            continue
        suites[path.stem] = result["summary"]
        if path.stem in ANSWERED:
            answers[path.stem] = _answers(result["records"])
    if missing := [suite for suite in ("main", "in_context") if suite not in suites]:
        raise ValueError(f"{last} has no result of {missing}")
    belongs = json.loads((last / "stage.json").read_text())
    return {
        "data_sha256": belongs["data_sha256"],
        "stages": stages,
        "train_s": sum(stage["train_s"] for stage in stages),
        "steps": sum(stage["steps"] for stage in stages),
        "rollouts": sum(stage["rollouts"] for stage in stages),
        "prefill_ms": {v: told[v]["prefill_ms"] for v in ("policy_free", "policy_aware")},
        "suites": suites,
        "answers": answers,
    }


def _stage(folder: Path, key: str) -> dict[str, Any]:
    lines = read_metrics(folder / "metrics.jsonl")
    asked = [read_result(path) for path in (folder / "evaluation").glob("*.json")]
    seconds = [result["seconds"]["suite"] for result in asked if result is not None]
    first = json.loads((folder / "stage.json").read_text())["first_run"]
    return {
        "stage": folder.name,
        "key": key,
        "trained_by": first,
        "steps": len(lines),
        "train_s": sum(line.get("time/step_s", 0.0) for line in lines),
        "evaluation_s": sum(seconds),
        "rollouts": _rollouts(folder, lines),
        "curves": {name: curve for name in CURVES if (curve := _curve(lines, name))},
    }


def _rollouts(folder: Path, lines: Sequence[Mapping[str, Any]]) -> int:
    """Completions that a stage sampled to train on."""
    if (folder / "data").is_dir():  # a distillation's answers, with their counts
        return int(read_manifest(folder / "data")["recipe"]["distillation"]["rollouts"])
    return int(max((line.get("rollouts/sampled_total", 0) for line in lines), default=0))


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """[step, mean of the steps up to there since the last point], at most CURVE_POINTS of them."""
    told = [line for line in lines if isinstance(line.get(name), float | int)]
    points = [(line["step"] + 1, line[name]) for line in told]
    size = max(1, -(-len(points) // CURVE_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [[part[-1][0], round(sum(v for _, v in part) / len(part), 5)] for part in parts]


def _answers(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores in the order of the questions, and a digest of the questions."""
    ordered = sorted(records, key=lambda record: record["example_id"])
    asked = [[record["example_id"], record["answer"]] for record in ordered]
    return {
        "questions_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "scores": [round(record["accuracy"], 6) for record in ordered],
    }


def write_whole(path: Path, text: str) -> None:
    """A file, complete or as it was; several machines may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """One result."""
    write_whole(path, json.dumps(record))


def record_path(root: Path, name: str, key: str) -> Path:
    return root / "results" / f"{name}-{short(key)}.json"


def find_results(root: Path, keys: Mapping[str, str]) -> Found:
    """All results in a sweep's folder.

    Args:
        root: the sweep's workdir.
        keys: run name -> key, of every run of the sweep as it would be made now.
    """
    results: dict[str, dict[str, Any]] = {}
    stale, broken = [], []
    for path in sorted((root / "results").glob("*.json")):
        try:
            record = json.loads(path.read_text())
            name, key = record["run"], record["key"]
        except (ValueError, KeyError, TypeError) as error:
            broken.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        if record.get("schema") != SCHEMA or keys.get(name) != key:
            stale.append(record)
        else:
            results[name] = record
    return Found(results, stale, broken)


def write_all(root: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """results.jsonl, one run a line."""
    lines = "".join(json.dumps(record) + "\n" for record in results.values())
    write_whole(root / "results.jsonl", lines)


def check_same_questions(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Results of one group must be about the same data and the same questions.

    Raises:
        ValueError: they are not; every group is named.
    """
    problems = []
    groups: dict[str, dict[str, list[str]]] = {}
    for name, record in results.items():
        if record["status"] == DONE:
            group = f"{record['column']}-s{record['seed']}"
            facts = [record["data_sha256"]]
            facts += [f"{s}:{a['questions_sha256']}" for s, a in sorted(record["answers"].items())]
            groups.setdefault(group, {}).setdefault(json.dumps(facts), []).append(name)
    for group, kinds in groups.items():
        if len(kinds) > 1:
            named = "; ".join(", ".join(names) for names in kinds.values())
            problems.append(f"{group}: other data or questions in these results: {named}")
    if problems:
        raise ValueError("results that cannot be compared:\n  " + "\n  ".join(problems))
