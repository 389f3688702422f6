"""Grade completions of any task: the Example says how, in `meta["answer_form"]`.

    {"form": "exact"}      the boxed answer equals the gold answer (ClevrPolicy; the default)
    choice, number, regex, tool_call, python    a user's own policy: grading/answer_forms.py
    mmlu_pro, mmmu_pro, wildguard, nano_*       general benchmarks: grading/benchmarks.py
    gta_call               one JSON tool call by GTAPolicy's metrics: grading/tool_calls.py

In: texts and their Examples, batched, since some scores are cheaper together. Out: one Grade each.
RL and the evaluators call nothing else.

Source: paper section 2 and 3 (metrics), section 4 (format reward).
Next: trimpi_jax/objectives/advantages.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from data_pipelines.example import Example
from trimpi_jax.grading.answer_forms import (
    grade_form,
    grade_own_calls,
    grade_python,
    score_choice,
    score_number,
    score_pattern,
)
from trimpi_jax.grading.answers import Grade, grade_completion
from trimpi_jax.grading.benchmarks import (
    grade_benchmark,
    read_mmlu_pro,
    read_mmmu_pro,
    read_nano_caption,
    read_nano_existence,
    read_nano_text,
    read_wildguard,
)
from trimpi_jax.grading.tool_calls import grade_tool_calls

DEFAULT_FORM = {"form": "exact"}

# form -> (texts, examples, stopped, needs_think) -> grades, all of that form
FormGrader = Callable[[Sequence[str], Sequence[Example], Sequence[bool], bool], list[Grade]]


def grade_completions(
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    *,
    needs_think: bool = True,
) -> list[Grade]:
    """One Grade per completion, in order.

    Args:
        texts: what the model said, without stop tokens.
        examples: the Example of each text.
        stopped: False where a completion was cut off at the length limit.
        needs_think: whether the format asks for a chain of thought.

    Raises:
        ValueError: an Example has an answer form that does not exist.
    """
    members: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        members.setdefault(answer_form(example)["form"], []).append(i)
    if unknown := sorted(set(members) - set(FORMS)):
        raise ValueError(f"unknown answer forms {unknown}; there are {sorted(FORMS)}")
    grades: dict[int, Grade] = {}
    for form, places in members.items():
        part = FORMS[form](
            [texts[i] for i in places],
            [examples[i] for i in places],
            [stopped[i] for i in places],
            needs_think,
        )
        grades.update(zip(places, part, strict=True))
    return [grades[i] for i in range(len(texts))]


def answer_form(example: Example) -> dict:
    """How the Example's answer is graded."""
    return example.meta.get("answer_form", DEFAULT_FORM)


def _grade_exact(texts, examples, stopped, needs_think) -> list[Grade]:
    return [
        grade_completion(text, example.answer, stopped=bool(ended), needs_think=needs_think)
        for text, example, ended in zip(texts, examples, stopped, strict=True)
    ]


FORMS: Mapping[str, FormGrader] = {
    "exact": _grade_exact,
    "choice": functools.partial(grade_form, score_choice),
    "number": functools.partial(grade_form, score_number),
    "regex": functools.partial(grade_form, score_pattern),
    "tool_call": grade_own_calls,
    "python": grade_python,
    "gta_call": grade_tool_calls,
    "mmlu_pro": functools.partial(grade_benchmark, read_mmlu_pro),
    "mmmu_pro": functools.partial(grade_benchmark, read_mmmu_pro),
    "wildguard": functools.partial(grade_benchmark, read_wildguard),
    "nano_caption": functools.partial(grade_benchmark, read_nano_caption),
    "nano_existence": functools.partial(grade_benchmark, read_nano_existence),
    "nano_text": functools.partial(grade_benchmark, read_nano_text),
}
