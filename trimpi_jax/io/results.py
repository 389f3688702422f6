"""What runs left on disk, as the report and the terminal's table want it; runs side by side.

In: workdirs as `stages.pipeline` leaves them (config.json; evaluation.json and metrics.jsonl per
stage, files of further suites in `evaluation/`), or folders that `trimpi_jax.evaluate`
wrote (results.json and a file a suite). Out: `RunResults`, one per folder, and rows of text.

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
    "distillation": "+Distillation",
}
EVALUATION, METRICS = "evaluation.json", "metrics.jsonl"
# key in evaluation.json, words, the suite that asks the same
VIEWS = (
    ("policy_free", "without policy", "main"),
    ("policy_aware", "policy in context", "in_context"),
)


@dataclasses.dataclass(frozen=True)
class ModelResults:
    """One evaluated model of a run: the base, or what a stage left."""

    stage: str  # "3_rl"
    label: str  # "+PoRo-GRPO"
    summaries: dict[str, dict[str, Any]]  # by view: counts and rates
    records: dict[str, list[dict[str, Any]]]  # by view: one per question
    suites: dict[str, dict[str, Any]]  # files of the evaluation suites, by name
    metrics: list[dict[str, Any]]  # of the stage that made it; empty for the base


@dataclasses.dataclass(frozen=True)
class RunResults:
    """A run; `mark` tells it from others on one page ("" when it is alone)."""

    workdir: Path
    data: Path
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
    """One run: a workdir, or a folder with the results of `trimpi_jax.evaluate`.

    Raises:
        ValueError: neither, a broken file, or nothing evaluated yet.
    """
    workdir = workdir.expanduser().resolve()
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not a folder")
    if (workdir / "results.json").is_file():
        about = _read_json(workdir / "results.json")
        label = Path(str(about.get("model", workdir))).name
        model = load_model(workdir, label, ())
        data = Path(str(about.get("data", workdir / "data")))
        facts = about.get("identity", {})
        config = {"model_dir": about.get("model", "unknown"), "seed": facts.get("seed", "unknown")}
        config |= {"data": {"dataset": facts.get("dataset", "unknown")}, "evaluated": facts}
        return RunResults(workdir, data, str(about.get("config", label)), mark, config, [model])
    if not (workdir / "config.json").is_file():
        raise ValueError(
            f"{workdir} has neither config.json (the workdir of a run) nor results.json (of"
            " trimpi_jax.evaluate)"
        )
    config = _read_json(workdir / "config.json")
    models = [
        load_model(
            folder, stage_label(folder, config.get("rl", {})), read_metrics(folder / METRICS)
        )
        for folder in stage_folders(workdir)
    ]
    if not models:
        raise ValueError(f"{workdir} holds no evaluation.json yet: nothing has been evaluated")
    name = str(config.get("name", workdir.name))
    return RunResults(workdir, workdir / "data", name, mark, config, models)


def load_model(folder: Path, label: str, metrics: Sequence[dict[str, Any]]) -> ModelResults:
    """What is known of the model of one folder.

    Raises:
        ValueError: a broken file, or no answers.
    """
    summaries, records = {}, {}
    if (folder / EVALUATION).is_file():
        found = _read_json(folder / EVALUATION)
        wanted = [name for view, _, _ in VIEWS for name in (view, f"{view}_records")]
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{folder / EVALUATION} lacks {missing}")
        for view, _, _ in VIEWS:
            summaries[view], records[view] = found[view], found[f"{view}_records"]
    suites = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("evaluation/*.json")]):
        if path.name in (EVALUATION, "results.json"):
            continue
        found = _read_json(path)
        if {"identity", "summary", "records", "lines"} <= found.keys():
            suites[path.stem] = found
    for view, _, suite in VIEWS:
        if view not in summaries and suite in suites:
            summaries[view], records[view] = suites[suite]["summary"], suites[suite]["records"]
    if not summaries and not suites:
        raise ValueError(f"{folder} holds no result of an evaluation")
    return ModelResults(folder.name, label, summaries, records, suites, list(metrics))


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
        poro = "PoRo-" if rl.get("policy_rollout") else ""
        questions = ", CoT questions only" if rl.get("data") == "cot" else ""
        return f"+{poro}{objective}{questions}"
    return LABELS.get(name, name)


HEADERS = (
    "model",
    "accuracy without policy, % [95 %]",
    "accuracy with policy in context, % [95 %]",
    "format rate, %",
    "prompt tokens, without / with",
    "prefill ms, without / with",
)


NOT_MEASURED = "–"


def result_rows(run: RunResults) -> list[list[str]]:
    """The table's cells as text: counts beside every percentage, 95 % Wilson intervals."""
    rows = []
    for model in run.models:
        pair = [model.summaries.get(view) for view, _, _ in VIEWS]
        rows.append(
            [
                run.title(model),
                *(accuracy_text(summary) for summary in pair),
                _number(pair[0], "format_rate", ".1f", 100),
                " / ".join(_number(summary, "prompt_tokens", ".0f") for summary in pair),
                " / ".join(_number(summary, "prefill_ms", ".1f") for summary in pair),
            ]
        )
    return rows


def accuracy_text(summary: dict[str, Any] | None) -> str:
    """`86.3 (259/300) [82.0, 89.8]`, with the mean score where answers can be partly right."""
    if summary is None:
        return NOT_MEASURED
    low, high = 100 * summary["accuracy_low"], 100 * summary["accuracy_high"]
    text = (
        f"{100 * summary['accuracy']:.1f} ({summary['correct']}/{summary['count']})"
        f" [{low:.1f}, {high:.1f}]"
    )
    score = summary.get("score", summary["accuracy"])
    if abs(score - summary["accuracy"]) > 1e-9:  # a grader that gives parts of a point
        text += f", mean score {100 * score:.1f}"
    return text


def suite_rows(runs: Sequence[RunResults]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of the suites' own lines, a column a model; the main table's two left out."""
    columns = [(run.title(model), model) for run in runs for model in run.models if model.suites]
    table: dict[tuple[str, str], dict[int, str]] = {}
    for place, (_, model) in enumerate(columns):
        for name, suite in model.suites.items():
            for what, text in suite["lines"]:
                table.setdefault((name, str(what)), {})[place] = str(text)
    shown = {suite for _, _, suite in VIEWS}
    rows = [
        [f"{suite}: {what}", *(cells.get(place, NOT_MEASURED) for place in range(len(columns)))]
        for (suite, what), cells in table.items()
        if suite not in shown or what not in ("right", "format", "prompt tokens")
    ]
    return ["evaluation", *(title for title, _ in columns)], rows


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
        return NOT_MEASURED
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


def _number(summary: dict[str, Any] | None, name: str, form: str, factor: float = 1.0) -> str:
    if summary is None or name not in summary:
        return NOT_MEASURED
    return format(factor * summary[name], form)


def _letters(number: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    text = ""
    while number >= 0:
        text = chr(ord("A") + number % 26) + text
        number = number // 26 - 1
    return text
