"""Plots of one or several runs, as SVG data addresses with a caption and alternative text.

One plot per stage and quantity, one line per run. Names of runs never enter a plot (they may be
anything): lines carry the runs' marks A, B, C.

Source: matplotlib (SVG); colours of Okabe and Ito, told apart by every kind of sight.
Next: trimpi_jax/io/gallery.py
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file
from matplotlib.figure import Figure

from trimpi_jax.io.results import RunResults

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Curve(NamedTuple):
    """What the page shows."""

    title: str
    image: str  # data address
    text: str  # alternative text: what the picture shows, in numbers


class Quantity(NamedTuple):
    """A plot: metric names with their labels and line styles, and the axis."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]


QUANTITIES = (
    Quantity("loss", "nats per target token", (("train/loss", "", "-"),)),
    Quantity("reward", "mean reward of the group", (("rollouts/reward_mean", "", "-"),)),
    Quantity(
        "accuracy of rollouts",
        "share of right answers",
        (
            ("rollouts/accuracy_free", "policy-free", "-"),
            ("rollouts/accuracy_aware", "policy-aware", "--"),
        ),
    ),
    Quantity("form", "share of well-formed rollouts", (("rollouts/format_share", "", "-"),)),
    Quantity("length", "tokens a completion", (("rollouts/completion_tokens", "", "-"),)),
    Quantity("entropy", "nats per token", (("train/entropy", "", "-"),)),
)


def make_curves(runs: Sequence[RunResults]) -> list[Curve]:
    """Training curves of every stage, in the order of the stages."""
    stages: dict[str, None] = {}  # an ordered set
    for run in runs:
        stages |= dict.fromkeys(model.stage.partition("_")[2] for model in run.models)
    curves = []
    for stage in stages:
        found = [
            (run, model)
            for run in runs
            for model in run.models
            if model.stage.partition("_")[2] == stage and model.metrics
        ]
        for quantity in QUANTITIES:
            if quantity.title == "loss" and stage == "rl":
                continue  # a surrogate: its value says nothing
            lines = []
            for number, (run, model) in enumerate(found):
                for key, label, style in quantity.lines:
                    name = " ".join(part for part in (run.mark, label) if part)
                    points = [
                        (line["step"] + 1, line[key])
                        for line in model.metrics
                        if isinstance(line.get(key), float | int)
                    ]
                    if points:
                        lines.append((name, points, COLOURS[number % len(COLOURS)], style))
            if lines:
                labels = " and ".join(dict.fromkeys(model.label for _, model in found))
                curves.append(plot_lines(f"{labels}: {quantity.title}", quantity.unit, lines))
    return curves


def make_overview(runs: Sequence[RunResults]) -> Curve:
    """Accuracy after every stage, without the policy and with it, with 95 % intervals."""
    rows = [(run.title(model), model) for run in runs for model in run.models]
    figure = Figure(figsize=(7.2, 0.9 + 0.46 * len(rows)), layout="constrained")
    axes = figure.subplots()
    views = (
        ("policy_free", "without policy", COLOURS[0], -0.15, "o"),
        ("policy_aware", "policy in context", COLOURS[1], 0.15, "s"),
    )
    said, labelled = [], set()
    for view, label, colour, offset, marker in views:
        for place, (name, model) in enumerate(rows):
            if view not in model.summaries:
                continue
            summary = model.summaries[view]
            low, middle, high = (
                100 * summary[key] for key in ("accuracy_low", "accuracy", "accuracy_high")
            )
            axes.errorbar(
                [middle],
                [place + offset],
                xerr=[[max(middle - low, 0)], [max(high - middle, 0)]],
                fmt=marker,
                color=colour,
                capsize=3,
                label=label if label not in labelled else None,
            )
            labelled.add(label)
            said.append(f"{name} {label} {middle:.1f} %")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy on unseen images, % (bars: 95 % intervals)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, ncols=2, loc="outside upper left")
    return Curve("Accuracy after every stage", svg_address(figure), "; ".join(said))


def plot_lines(
    title: str, unit: str, lines: Sequence[tuple[str, list[tuple[int, float]], str, str]]
) -> Curve:
    """Lines over steps: (name, points, colour, style) each, with a running mean."""
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    said = []
    for name, points, colour, style in lines:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        smooth = _smooth(values)
        axes.plot(steps, smooth, color=colour, linewidth=2, linestyle=style, label=name)
        said.append(f"{name} from {values[0]:.3f} to {values[-1]:.3f}".strip())
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    steps = max(len(points) for _, points, _, _ in lines)
    text = f"{title}, {unit}, {steps} logged steps: {'; '.join(said)}"
    return Curve(title, svg_address(figure), text)


def svg_address(figure: Figure) -> str:
    """The figure as a data address; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "trimpi_jax", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_address(buffer.getvalue(), "image/svg+xml")


def data_address(content: bytes, kind: str) -> str:
    """Bytes inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of a window of a tenth of the curve around each point; it does not lag behind."""
    half = len(values) // 20
    means = []
    for at in range(len(values)):
        reach = min(half, at, len(values) - 1 - at)  # narrower at both ends
        window = values[at - reach : at + reach + 1]
        means.append(sum(window) / len(window))
    return means
