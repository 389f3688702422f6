"""A sweep of three methods and a runner that writes what a training would leave, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import nano
from tests.io.made_runs import make_examples, make_record
from trimpi_jax.evaluators.questions import summarize
from trimpi_jax.stages.result_files import write_json
from trimpi_jax.sweeps.child import Job, link, open_stage, stage_path
from trimpi_jax.sweeps.identity import Code, stage_folders
from trimpi_jax.sweeps.plan import AWARE, Claim, Column, Row, Sweep

CODE = Code("c" * 64, {"jax": "0"})
ROWS = (
    Row("in_context", "in context, no training", "in_context", shows=AWARE),
    Row("cot_sft", "CoT SFT", "cot_sft", paper="cot_sft"),
    Row("cot_sft_grpo", "CoT SFT + GRPO", "cot_sft_grpo", paper="cot_sft_grpo"),
    Row("trimpi_poro_grpo", "TriMPI PoRo-GRPO", "trimpi_poro_grpo", paper="trimpi_poro_grpo"),
)
CLAIMS = (
    Claim("rl", "RL improves on SFT", "cot_sft_grpo", "cot_sft"),
    Claim("growth", "The gain grows", "trimpi_poro_grpo", "cot_sft_grpo", grows=True),
)


def make_recipe(method: str, depth: int) -> ConfigDict:
    config = nano.get_config(f"method={method}")
    config.data.depth = depth
    return config


def make_sweep(seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Sweep:
    columns = tuple(
        Column(
            f"T{depth}",
            f"Clevr-T, depth {depth}",
            ("clevr_policy", "T", depth),
            lambda method, depth=depth: make_recipe(method, depth),
            depth,
            {"evaluation": 10.0, "cot_sft": 20.0, "vm_cpt": 30.0, "rl": 1.0},
        )
        for depth in (4, 6)
    )
    given = {"name": "made", "rows": ROWS, "columns": columns, "chosen": ("T4",)}
    return Sweep(**(given | {"seeds": seeds, "claims": CLAIMS} | changes))


class FakeStart:
    """Instead of a process: every stage that is not there yet is "trained" and "evaluated".

    `right` says how many of four questions a row gets right; `fails` names runs that fail at their
    last stage, `dies` those that are killed there.
    """

    def __init__(self, root: Path, **right: int):
        self.root, self.right = root, right
        self.trained: list[str] = []
        self.started: list[str] = []
        self.fails: dict[str, str] = {}
        self.stops: set[str] = set()
        self.data = "d" * 64

    def __call__(self, job: Job) -> int:
        self.started.append(job.name)
        job.workdir.mkdir(parents=True, exist_ok=True)
        folders = stage_folders(job.config, CODE)
        for number, (name, key) in enumerate(folders.items()):
            folder = stage_path(job, name, key)
            open_stage(folder, {"key": key, "data_sha256": self.data, "first_run": job.name})
            link(job.workdir / name, folder)
            if (folder / "evaluation.json").is_file():
                continue
            if number == len(folders) - 1:
                if job.name in self.stops:
                    return 75
                if job.name in self.fails:
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    write_json(job.failed, {"reason": self.fails[job.name]})
                    return 1
            self.trained.append(f"{job.group}/{name}")
            row = job.name.removeprefix(f"{job.group}-")
            write_stage(folder, name, self.right.get(row, 1))
        return 0


def write_stage(folder: Path, name: str, right: int) -> None:
    """What a stage leaves: metrics, evaluation.json and a file a suite."""
    examples = make_examples()
    (folder / "evaluation").mkdir(parents=True)
    stage = name.partition("_")[2]
    metric = "rollouts/accuracy_free" if stage == "rl" else "train/loss"
    if stage != "base":
        lines = [
            {"step": step, metric: step / 4, "time/step_s": 0.5}
            | ({"rollouts/sampled_total": 8 * step} if stage == "rl" else {})
            for step in range(4)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
    told: dict[str, Any] = {}
    for view, suite in (("policy_free", "main"), ("policy_aware", "in_context")):
        records = [make_record(e, number < right) for number, e in enumerate(examples)]
        write_json(
            folder / "evaluation" / f"{suite}.json",
            {
                "identity": {},
                "seconds": {"suite": 2.0},
                "summary": summarize(records),
                "records": records,
                "lines": [],
            },
        )
        told[view] = summarize(records) | {"prefill_ms": 1.0}
    write_json(folder / "evaluation.json", told)
