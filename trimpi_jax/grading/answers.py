r"""Parse what a model said and grade it: format and exact match. The only grader of boxed answers.

    <think> ... </think>\boxed{Case 3}      well formed, parsed "Case 3"

Text from a model is never an exception: a failed parse is a reason, and the reason is a metric.

Source: paper section 2 (exact match of the parsed answer), section 4 (format reward).
Next: trimpi_jax/objectives/advantages.py
"""

from __future__ import annotations

import dataclasses
import re

_WELL_FORMED = re.compile(
    r"\s*<think>(?P<thought>.*)</think>\s*\\boxed\{(?P<answer>[^{}]*)\}\s*", re.S
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_SPACES = re.compile(r"\s+")

FORMAT_REASONS = ("ok", "cut_off", "no_think", "repeated_think", "no_box", "text_around")


@dataclasses.dataclass(frozen=True)
class Grade:
    """What a completion is worth. `reason` is one of FORMAT_REASONS."""

    accuracy: float  # 1.0 = the parsed answer equals the gold answer
    format: float  # 1.0 = <think>...</think> followed by \boxed{...} and nothing else
    parsed: str | None  # the last boxed answer, normalised; None = there is none
    reason: str


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
    boxes = _BOXED.findall(text)
    parsed = normalize(boxes[-1]) if boxes else None
    reason = _format_reason(text, stopped, needs_think, bool(boxes))
    return Grade(
        accuracy=float(parsed == normalize(gold)),
        format=float(reason == "ok"),
        parsed=parsed,
        reason=reason,
    )


def reward(grade: Grade, weights: RewardWeights) -> float:
    """The scalar reward of a grade."""
    return weights.accuracy * grade.accuracy + weights.format * grade.format


def normalize(answer: str) -> str:
    """Spaces collapsed, ends stripped; case matters."""
    return _SPACES.sub(" ", answer).strip()


def _format_reason(text: str, stopped: bool, needs_think: bool, boxed: bool) -> str:
    if not stopped:
        return "cut_off"
    if needs_think and ("<think>" not in text or "</think>" not in text):
        return "no_think"
    if text.count("<think>") > 1 or text.count("</think>") > 1:
        return "repeated_think"
    if not boxed:
        return "no_box"
    if needs_think:
        return "ok" if _WELL_FORMED.fullmatch(text) else "text_around"
    return "ok" if _BOXED.fullmatch(text.strip()) else "text_around"
