r"""Parse what a model said and grade it: format and exact match. The only grader of boxed answers.

    <think> ... </think>\boxed{Case 3}      well formed, parsed "Case 3"

Text from a model is never an exception: a failed parse is a reason, and the reason is a metric.

Source: paper section 2 (exact match of the parsed answer), section 4 (format reward).
Next: trimpi_jax/objectives/advantages.py
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from data_pipelines.answer_forms import normalize

_THOUGHT = re.compile(r"\s*<think>.*</think>\s*", re.S)
_BOX_START = re.compile(r"\\boxed\{")

GRADER_ERROR = "grader_error"  # key in a Grade's details: why the grader itself failed
FORMAT_REASONS = ("ok", "cut_off", "no_think", "repeated_think", "no_box", "text_around")


@dataclasses.dataclass(frozen=True)
class Grade:
    """What a completion is worth. `reason` is one of FORMAT_REASONS."""

    accuracy: float  # 1.0 = the parsed answer equals the gold answer
    format: float  # 1.0 = <think>...</think> followed by \boxed{...} and nothing else
    parsed: str | None  # the last boxed answer, normalised; None = there is none
    reason: str
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # sub-scores, JSON-able


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """total = accuracy * a + format * f. The paper states no weights; 0.9 and 0.1 are ours."""

    accuracy: float = 0.9
    format: float = 0.1

    def __post_init__(self):
        if self.accuracy < 0 or self.format < 0 or self.accuracy + self.format <= 0:
            raise ValueError(f"reward weights must be >= 0 and not both 0, got {self}")


def grade_completion(text: str, gold: str, *, stopped: bool, needs_think: bool = True) -> Grade:
    """Grade one completion.

    Args:
        text: what the model said, without its stop token.
        gold: the canonical answer.
        stopped: False when the completion was cut off at the length limit.
        needs_think: whether the format asks for a chain of thought (Direct SFT is judged without).
    """
    boxes = [content for _, content, _ in find_boxes(text)]
    parsed = normalize(boxes[-1]) if boxes else None
    reason = format_reason(text, stopped=stopped, needs_think=needs_think)
    return Grade(
        accuracy=float(parsed == normalize(gold)),
        format=float(reason == "ok"),
        parsed=parsed,
        reason=reason,
    )


def reward(grade: Grade, weights: RewardWeights) -> float:
    """The scalar reward of a grade."""
    return weights.accuracy * grade.accuracy + weights.format * grade.format


def find_boxes(text: str) -> list[tuple[int, str, int]]:
    r"""(start, content, end) of every `\boxed{...}` whose braces balance (JSON may be boxed)."""
    closed_at: dict[int, int] = {}  # place after an opening brace -> place of its closing one
    open_braces: list[int] = []
    for at, letter in enumerate(text):  # one pass: a hostile text costs no more than a long one
        if letter == "{":
            open_braces.append(at + 1)
        elif letter == "}" and open_braces:
            closed_at[open_braces.pop()] = at
    boxes: list[tuple[int, str, int]] = []
    for start in _BOX_START.finditer(text):
        end = closed_at.get(start.end())
        if end is not None and (not boxes or start.start() >= boxes[-1][2]):
            boxes.append((start.start(), text[start.end() : end], end + 1))
    return boxes


def format_reason(text: str, *, stopped: bool, needs_think: bool) -> str:
    """One of FORMAT_REASONS: the first rule of the format that a completion breaks, or "ok"."""
    boxes = find_boxes(text)
    if not stopped:
        return "cut_off"
    if needs_think and ("<think>" not in text or "</think>" not in text):
        return "no_think"
    if text.count("<think>") > 1 or text.count("</think>") > 1:
        return "repeated_think"
    if not boxes:
        return "no_box"
    start, _, end = boxes[-1]
    before, after = text[:start], text[end:]
    around = not _THOUGHT.fullmatch(before) if needs_think else bool(before.strip())
    return "text_around" if around or after.strip() else "ok"
