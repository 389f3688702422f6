"""Forgetting: general abilities before and after internalization.

    mmlu_pro, mmmu_pro, mmmu_pro_vision, wildguard    official files on this machine
    nano                                              captions and existence questions, generated

In: a config's paths. Out: questions per benchmark; scores of its records. Before against after is
`--against`: the same questions of two models, paired.

Source: paper section 5 (forgetting).
Next: trimpi_jax/evaluators/efficiency.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.example import Example
from data_pipelines.general_eval import (
    WILDGUARD_LABELS,
    read_mmlu_pro,
    read_mmmu_pro,
    read_wildguard,
)
from data_pipelines.nano_base.general import make_general_questions
from trimpi_jax.evaluators.questions import summarize
from trimpi_jax.evaluators.statistics import format_rate
from trimpi_jax.grading.benchmarks import parse_wildguard


@dataclasses.dataclass(frozen=True)
class ForgettingSettings:
    """Files; "" = not asked. `nano` is the number of generated questions."""

    mmlu_pro: str = ""
    mmlu_pro_shots: str = ""  # the validation split: five worked examples before a question
    mmmu_pro: str = ""
    mmmu_pro_vision: str = ""
    wildguard: str = ""
    nano: int = 0
    examples: int = 0  # most questions of a benchmark; 0 = all
    max_new_tokens: int = 1024

    def __post_init__(self):
        if self.mmlu_pro_shots and not self.mmlu_pro:
            raise ValueError("forgetting: mmlu_pro_shots has no effect without mmlu_pro")
        if self.nano < 0 or self.examples < 0 or self.max_new_tokens < 1:
            raise ValueError(
                "forgetting: nano and examples must be >= 0 and max_new_tokens >= 1, got"
                f" {self.nano}, {self.examples}, {self.max_new_tokens}"
            )


def read_benchmarks(settings: ForgettingSettings, seed: int) -> dict[str, list[Example]]:
    """Benchmark -> its questions, for those that the settings name.

    Raises:
        ValueError: every file that cannot be asked, with every fault in it.
    """
    limit = settings.examples or None
    shots = Path(settings.mmlu_pro_shots).expanduser() if settings.mmlu_pro_shots else None
    readers: dict[str, Callable[[Path], list[Example]]] = {
        "mmlu_pro": lambda path: read_mmlu_pro(path, shots, limit),
        "mmmu_pro": lambda path: read_mmmu_pro(path, limit),
        "mmmu_pro_vision": lambda path: read_mmmu_pro(path, limit),
        "wildguard": lambda path: read_wildguard(path, limit),
    }
    found, problems = {}, []
    for name, read in readers.items():
        if given := getattr(settings, name):
            try:
                found[name] = read(Path(given).expanduser())
            except (ValueError, OSError) as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if settings.nano:
        found["nano"] = make_general_questions(settings.nano, seed)
    return found


def summarize_benchmark(name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, intervals, score; for WildGuardTest the F1 of each of its three tasks, too."""
    summary = summarize(records)
    if name == "wildguard":
        summary["f1"] = {
            asked: f1_of_yes(
                [
                    (parse_wildguard(r["answer"]).get(asked), parse_wildguard(r["parsed"] or ""))
                    for r in records
                ],
                asked,
            )
            for asked, _, _ in WILDGUARD_LABELS.values()
        }
    return summary


def f1_of_yes(pairs: Sequence[tuple[str | None, Mapping[str, str]]], asked: str) -> float:
    """F1 of "yes" over the items that have a label: 2 TP / (2 TP + FP + FN)."""
    labelled = [(gold == "yes", said.get(asked) == "yes") for gold, said in pairs if gold]
    hits = sum(gold and said for gold, said in labelled)
    misses = sum(gold != said for gold, said in labelled)
    return 2 * hits / (2 * hits + misses) if hits else 0.0


def describe_benchmark(name: str, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines for the terminal."""
    lines = [(name, format_rate(summary)), (f"{name} mean score", f"{100 * summary['score']:.1f}")]
    for asked, value in summary.get("f1", {}).items():
        lines.append((f"{name} {asked.lower()}, F1", f"{100 * value:.1f}"))
    for family, found in summary["groups"].get("family", {}).items():
        lines.append((f"{name} {family}", f"{100 * found['score']:.1f} (of {found['count']})"))
    for problem, count in summary["problems"].items():
        lines.append((f"{name} {problem}", str(count)))
    return lines
