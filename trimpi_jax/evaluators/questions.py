"""Ask a model the questions of a split, with or without the policy in the prompt, and grade.

Two of the paper's evaluations differ by the prompt only: *Main* (no policy in the prompt) and
*Policy In-Context* (the original policy put back).

In: parameters, Examples. Out: one record per question; `summarize` gives counts and Wilson
intervals.

Source: paper section 5.
Next: trimpi_jax/evaluators/efficiency.py
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from scipy.stats import binomtest

from data_pipelines.example import Example
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.inputs.encode import policy_key
from trimpi_jax.models.processor import decode_completion
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import Engine, Weights, ask, prompt_lengths


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Greedy decoding in batches of `rows` prompts."""

    rows: int
    max_new_tokens: int
    dtype: str = "float32"
    needs_think: bool = True


class Evaluator:
    """Asks and grades through the rollout engine, so every evaluation uses the same programs."""

    def __init__(self, engine: Engine, settings: EvaluationSettings):
        self.engine, self.settings = engine, settings
        self.sampler = SamplerSettings(
            completions=1,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0,
            dtype=settings.dtype,
        )
        self.weights: Weights | None = None

    def load(self, params: Any) -> None:
        """Use these weights from now on."""
        self.weights = self.engine.load(params, self.weights)

    def ask(
        self,
        examples: Sequence[Example],
        *,
        policy_in_prompt: bool,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any]]:
        """One record per Example, in order; a prompt that fits no bucket is counted as wrong."""
        records: dict[int, dict[str, Any]] = {}
        # questions about one policy go together: it is read once for all of them
        order = list(range(len(examples)))
        if policy_in_prompt:
            order.sort(key=lambda i: policy_key(examples[i]))
        start = 0
        while start < len(order):
            chunk = order[start : start + self.settings.rows]
            if policy_in_prompt:
                first = policy_key(examples[chunk[0]])
                chunk = [i for i in chunk if policy_key(examples[i]) == first]
            start += len(chunk)
            records.update(self._ask_chunk(examples, chunk, policy_in_prompt))
            on_progress(len(records))
        return [records[i] for i in range(len(examples))]

    def _ask_chunk(
        self, examples: Sequence[Example], chunk: Sequence[int], aware: bool
    ) -> dict[int, dict[str, Any]]:
        engine, rows = self.engine, self.settings.rows
        assert self.weights is not None
        questions, rollouts = ask(
            engine,
            self.weights,
            [examples[i] for i in chunk],
            self.sampler,
            jax.random.key(0),
            aware=aware,
            num_rows=rows,
            max_chunk=rows,
        )
        too_long = set(questions.dropped)
        records = {
            i: _record(examples[i], 0, "", "prompt_too_long", 0.0, {})
            for i in chunk
            if examples[i].example_id in too_long
        }
        texts = [
            decode_completion(engine.processor, rollouts.tokens[at, 0, : rollouts.lengths[at, 0]])
            for at in range(len(questions.examples))
        ]
        grades = grade_completions(
            texts,
            questions.examples,
            [bool(ended) for ended in rollouts.stopped[:, 0]],
            needs_think=self.settings.needs_think,
        )
        places = [i for i in chunk if i not in records]
        lengths = prompt_lengths(questions, aware=aware)
        for i, count, text, grade in zip(places, lengths, texts, grades, strict=True):
            records[i] = _record(
                examples[i], count, text, grade.reason, grade.accuracy, grade.details
            )
        return records


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, rates and the Wilson 95 % interval of the accuracy.

    `score` is the mean accuracy: more than the share of right answers where a grader gives parts of
    a point (tool calls, functions). `details` are the means of the graders' numbers, `problems`
    counts why answers could not be graded, `text_encoders` are what compared texts.
    """
    correct = sum(record["accuracy"] == 1.0 for record in records)
    well_formed = sum(record["format"] == "ok" for record in records)
    low, high = wilson_interval(correct, len(records))
    return {
        "count": len(records),
        "correct": correct,
        "accuracy": correct / max(len(records), 1),
        "accuracy_low": low,
        "accuracy_high": high,
        "score": sum(record["accuracy"] for record in records) / max(len(records), 1),
        "details": _mean_details(records),
        "problems": dict(
            collections.Counter(
                record["details"]["problem"] for record in records if "problem" in record["details"]
            )
        ),
        "text_encoders": sorted({r["details"].get("text_encoder", "") for r in records} - {""}),
        "format_rate": well_formed / max(len(records), 1),
        "prompt_tokens": sum(r["prompt_tokens"] for r in records) / max(len(records), 1),
        "format_failures": dict(
            collections.Counter(r["format"] for r in records if r["format"] != "ok")
        ),
    }


def _mean_details(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    numbers: dict[str, list[float]] = collections.defaultdict(list)
    for record in records:
        for name, value in record["details"].items():
            if isinstance(value, int | float):
                numbers[name].append(float(value))
    return {name: sum(values) / len(values) for name, values in sorted(numbers.items())}


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson score interval at 95 %; (0, 1) without data."""
    if count == 0:
        return 0.0, 1.0
    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _record(
    example: Example,
    prompt_tokens: int,
    text: str,
    reason: str,
    accuracy: float,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "example_id": example.example_id,
        "policy_name": example.policy_name,
        "answer": example.answer,
        "completion": text,
        "accuracy": accuracy,
        "format": reason,
        "prompt_tokens": prompt_tokens,
        "details": details or {},
    }
