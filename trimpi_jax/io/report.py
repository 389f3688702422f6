"""The result table, and one self-contained HTML page of a run: works offline, every text escaped.

In: a workdir as `stages.pipeline` leaves it (evaluation.json and metrics.jsonl per stage). Out: a
rich table, report.html.

Source: jinja2 (autoescape), matplotlib (SVG).
Next: trimpi_jax/train.py
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table

from data_pipelines.streaming import read_split
from trimpi_jax.io.metrics import read_metrics

LABELS = {
    "base": "base",
    "vm_cpt": "+VM-CPT",
    "cot_sft": "+CoT SFT",
    "direct_sft": "+Direct SFT",
}
QUESTIONS = 8
COLOURS = {"free": "#0b6e99", "aware": "#c2571a", "loss": "#333333", "reward": "#3a7d44"}


def stage_folders(workdir: Path) -> list[Path]:
    """Folders of evaluated stages, in order."""
    folders = [path.parent for path in workdir.glob("[0-9]*_*/evaluation.json")]
    return sorted(folders, key=lambda folder: int(folder.name.split("_")[0]))


def stage_label(folder: Path, policy_rollout: bool) -> str:
    """`3_rl` -> `+PoRo-GRPO`."""
    name = folder.name.partition("_")[2]
    if name == "rl":
        return "+PoRo-GRPO" if policy_rollout else "+GRPO"
    return LABELS.get(name, name)


def load_results(workdir: Path) -> list[dict[str, Any]]:
    """One dict per evaluated stage: label, policy_free, policy_aware, records, metrics."""
    config = json.loads((workdir / "config.json").read_text())
    poro = bool(config.get("rl", {}).get("policy_rollout"))
    results = []
    for folder in stage_folders(workdir):
        result = json.loads((folder / "evaluation.json").read_text())
        result["label"] = stage_label(folder, poro)
        result["metrics"] = read_metrics(folder / "metrics.jsonl")
        results.append(result)
    return results


def result_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells as text: counts beside every percentage, 95 % Wilson intervals."""
    rows = []
    for result in results:
        free, aware = result["policy_free"], result["policy_aware"]
        rows.append(
            [
                result["label"],
                _accuracy(free),
                _accuracy(aware),
                f"{100 * free['format_rate']:.1f}",
                f"{free['prompt_tokens']:.0f} / {aware['prompt_tokens']:.0f}",
                f"{free['prefill_ms']:.1f} / {aware['prefill_ms']:.1f}",
            ]
        )
    return rows


HEADERS = (
    "model",
    "accuracy without policy, % [95 %]",
    "accuracy with policy in context, % [95 %]",
    "format rate, %",
    "prompt tokens, without / with",
    "prefill ms, without / with",
)


def result_table(workdir: Path) -> Table:
    """The table for the terminal."""
    table = Table(title="Unseen images, greedy decoding")
    for number, header in enumerate(HEADERS):
        table.add_column(header, justify="left" if number == 0 else "right")
    for row in result_rows(load_results(workdir)):
        table.add_row(*row)
    return table


def write_report(workdir: Path, path: Path) -> None:
    """Write the page; the file appears complete or not at all."""
    results = load_results(workdir)
    config = json.loads((workdir / "config.json").read_text())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.jinja").render(
        title=config["name"],
        config=json.dumps(config, indent=1, sort_keys=True),
        headers=HEADERS,
        rows=result_rows(results),
        curves=make_curves(results),
        questions=make_questions(workdir, results),
        labels=[result["label"] for result in results],
    )
    part = path.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def make_curves(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Loss and reward curves as SVG data addresses with a caption and alternative text."""
    curves = []
    for result in results:
        metrics = result["metrics"]
        if not metrics:
            continue
        if "rollouts/reward_mean" not in metrics[0]:
            figure, text = _plot(
                metrics, [("train/loss", "loss", COLOURS["loss"])], "nats per target token"
            )
            curves.append({"title": f"{result['label']}: loss", "image": figure, "text": text})
            continue
        lines = [("rollouts/reward_mean", "reward", COLOURS["reward"])]
        figure, text = _plot(metrics, lines, "mean reward of the joint group")
        curves.append({"title": f"{result['label']}: reward", "image": figure, "text": text})
        lines = [("rollouts/accuracy_free", "policy-free", COLOURS["free"])]
        if "rollouts/accuracy_aware" in metrics[0]:
            lines.append(("rollouts/accuracy_aware", "policy-aware", COLOURS["aware"]))
        figure, text = _plot(metrics, lines, "accuracy of rollouts")
        title = f"{result['label']}: policy-free against policy-aware accuracy"
        curves.append({"title": title, "image": figure, "text": text})
    return curves


def make_questions(workdir: Path, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Eight fixed test questions, spread over the split, answered after every stage."""
    if not results:
        return []
    count = len(results[0]["policy_free_records"])
    examples = read_split(workdir / "data", "test", count)
    chosen = [i * count // QUESTIONS for i in range(min(QUESTIONS, count))]
    questions = []
    for i in chosen:
        example = examples[i]
        questions.append(
            {
                "image": _data_address(example.images[0], _image_kind(example.images[0])),
                "alt": f"Picture of test question {example.example_id}",
                "query": example.query,
                "answer": example.answer,
                "gold": example.meta.get("gold_cot", ""),
                "answers": [
                    {
                        "label": result["label"],
                        "view": view,
                        "completion": result[key][i]["completion"],
                        "right": result[key][i]["accuracy"] == 1.0,
                        "format": result[key][i]["format"],
                    }
                    for result in results
                    for view, key in (
                        ("without policy", "policy_free_records"),
                        ("policy in context", "policy_aware_records"),
                    )
                ],
            }
        )
    return questions


def _accuracy(summary: dict[str, Any]) -> str:
    low, high = 100 * summary["accuracy_low"], 100 * summary["accuracy_high"]
    text = (
        f"{100 * summary['accuracy']:.1f} ({summary['correct']}/{summary['count']})"
        f" [{low:.1f}, {high:.1f}]"
    )
    if abs(summary["score"] - summary["accuracy"]) > 1e-9:  # a grader that gives parts of a point
        text += f", mean score {100 * summary['score']:.1f}"
    return text


def _plot(
    metrics: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str, str]], ylabel: str
) -> tuple[str, str]:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    parts = []
    for key, label, colour in lines:
        points = [(m["step"] + 1, m[key]) for m in metrics if isinstance(m.get(key), float | int)]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2, label=label)
        parts.append(f"{label} from {values[0]:.3f} to {values[-1]:.3f}")
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    text = f"{ylabel} over {len(metrics)} steps: " + "; ".join(parts)
    return _data_address(buffer.getvalue(), "image/svg+xml"), text


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean with a memory of a tenth of the curve."""
    memory = max(len(values) / 10, 1.0)
    smoothed, mean = [], values[0]
    for value in values:
        mean += (value - mean) / memory
        smoothed.append(mean)
    return smoothed


def _image_kind(encoded: bytes) -> str:
    """The MIME type of an encoded picture."""
    with Image.open(io.BytesIO(encoded)) as image:
        return Image.MIME.get(image.format or "", "image/png")


def _data_address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
