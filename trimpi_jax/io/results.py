"""What runs left on disk, as the report and the terminal's table want it; runs side by side.

In: workdirs as `stages.pipeline` leaves them (config.json; evaluation.json and metrics.jsonl per
stage). Out: `RunResults`, one per workdir, and rows of text.

Next: trimpi_jax/io/curves.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from trimpi_jax.io.metrics import read_metrics

LABELS = {
    "base": "base",
    "vm_cpt": "+VM-CPT",
    "cot_sft": "+CoT SFT",
    "direct_sft": "+Direct SFT",
}
VIEWS = (("policy_free", "without policy"), ("policy_aware", "policy in context"))


@dataclasses.dataclass(frozen=True)
class ModelResults:
    """One evaluated model of a run: the base, or what a stage left."""

    stage: str  # "3_rl"
    label: str  # "+PoRo-GRPO"
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]  # of the stage that made it; empty for the base

    def summary(self, view: str) -> dict[str, Any]:
        """Counts and rates of "policy_free" or "policy_aware"."""
        return self.evaluation[view]

    def records(self, view: str) -> list[dict[str, Any]]:
        """One record per question."""
        return self.evaluation[f"{view}_records"]


@dataclasses.dataclass(frozen=True)
class RunResults:
    """A run; `mark` tells it from others on one page ("" when it is alone)."""

    workdir: Path
    name: str
    mark: str
    config: dict[str, Any]
    models: list[ModelResults]

    def title(self, model: ModelResults) -> str:
        """The model's name on a page of several runs."""
        return f"{self.mark} {model.label}".strip()


def load_runs(workdirs: Sequence[Path]) -> list[RunResults]:
    """The runs, marked A, B, C ... when there are several.

    Raises:
        ValueError: folders that are no runs, broken files, or nothing evaluated yet; all of them
            are named.
    """
    problems, runs = [], []
    for number, workdir in enumerate(workdirs):
        mark = _letters(number) if len(workdirs) > 1 else ""
        try:
            runs.append(load_run(workdir, mark))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("cannot report:\n  " + "\n  ".join(problems))
    return runs


def load_run(workdir: Path, mark: str = "") -> RunResults:
    """One run.

    Raises:
        ValueError: not a run, a broken file, or nothing evaluated yet.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not a folder")
    if not (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} has no config.json: not the workdir of a run")
    config = _read_json(workdir / "config.json")
    folders = stage_folders(workdir)
    if not folders:
        raise ValueError(f"{workdir} holds no evaluation.json yet: nothing has been evaluated")
    models = []
    for folder in folders:
        evaluation = _read_json(folder / "evaluation.json")
        wanted = [name for view, _ in VIEWS for name in (view, f"{view}_records")]
        missing = [name for name in wanted if name not in evaluation]
        if missing:
            raise ValueError(f"{folder / 'evaluation.json'} lacks {missing}")
        label = stage_label(folder, config.get("rl", {}))
        metrics = read_metrics(folder / "metrics.jsonl")
        models.append(ModelResults(folder.name, label, evaluation, metrics))
    return RunResults(workdir, str(config.get("name", workdir.name)), mark, config, models)


def stage_folders(workdir: Path) -> list[Path]:
    """Folders of evaluated stages, in order."""
    folders = [path.parent for path in workdir.glob("[0-9]*_*/evaluation.json")]
    numbered = [folder for folder in folders if folder.name.split("_")[0].isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name.split("_")[0]))


def stage_label(folder: Path, rl: dict[str, Any]) -> str:
    """`3_rl` -> `+PoRo-GRPO`, by the config's `rl` section."""
    name = folder.name.partition("_")[2]
    if name == "rl":
        objective = str(rl.get("objective", "grpo")).upper()
        return f"+PoRo-{objective}" if rl.get("policy_rollout") else f"+{objective}"
    return LABELS.get(name, name)


HEADERS = (
    "model",
    "accuracy without policy, % [95 %]",
    "accuracy with policy in context, % [95 %]",
    "format rate, %",
    "prompt tokens, without / with",
    "prefill ms, without / with",
)


def result_rows(run: RunResults) -> list[list[str]]:
    """The table's cells as text: counts beside every percentage, 95 % Wilson intervals."""
    rows = []
    for model in run.models:
        free, aware = model.summary("policy_free"), model.summary("policy_aware")
        rows.append(
            [
                run.title(model),
                accuracy_text(free),
                accuracy_text(aware),
                f"{100 * free['format_rate']:.1f}",
                f"{free['prompt_tokens']:.0f} / {aware['prompt_tokens']:.0f}",
                f"{free['prefill_ms']:.1f} / {aware['prefill_ms']:.1f}",
            ]
        )
    return rows


def accuracy_text(summary: dict[str, Any]) -> str:
    """`86.3 (259/300) [82.0, 89.8]`, with the mean score where answers can be partly right."""
    low, high = 100 * summary["accuracy_low"], 100 * summary["accuracy_high"]
    text = (
        f"{100 * summary['accuracy']:.1f} ({summary['correct']}/{summary['count']})"
        f" [{low:.1f}, {high:.1f}]"
    )
    score = summary.get("score", summary["accuracy"])
    if abs(score - summary["accuracy"]) > 1e-9:  # a grader that gives parts of a point
        text += f", mean score {100 * score:.1f}"
    return text


def compare_records(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Paired comparison of right answers over the questions that both were asked; None if none.

    `p` is McNemar's exact test: of the questions that only one of the two got right, how surprising
    is the split, were both equally good.
    """
    right = {record["example_id"]: record["accuracy"] == 1.0 for record in before}
    pairs = [
        (right[record["example_id"]], record["accuracy"] == 1.0)
        for record in after
        if record["example_id"] in right
    ]
    if not pairs:
        return None
    gained = sum(now and not then for then, now in pairs)
    lost = sum(then and not now for then, now in pairs)
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "count": len(pairs),
        "gained": gained,
        "lost": lost,
        "points": 100 * (gained - lost) / len(pairs),
        "p": float(p),
    }


def comparison_text(comparison: dict[str, Any] | None) -> str:
    """`+23.3 points (+91 −21 of 300, p < 0.001)`."""
    if comparison is None:
        return "no question in common"
    p = "p < 0.001" if comparison["p"] < 0.001 else f"p = {comparison['p']:.3f}"
    return (
        f"{comparison['points']:+.1f} points (+{comparison['gained']} −{comparison['lost']}"
        f" of {comparison['count']}, {p})"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _letters(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    text = ""
    while number >= 0:
        text = chr(ord("A") + number % 26) + text
        number = number // 26 - 1
    return text
