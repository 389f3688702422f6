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
from trimpi_jax.inputs.batching import choose_bucket, make_batch
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import Processor, decode_completion
from trimpi_jax.rollouts.sampler import SamplerSettings, make_sampler, prompt_ids
from trimpi_jax.sharding import place_batch


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Greedy decoding in batches of `rows` prompts."""

    rows: int
    max_new_tokens: int
    prompt_buckets: tuple[int, ...]
    windows: tuple[int, ...]  # buckets, as of the prompt tokens
    dtype: str = "float32"
    needs_think: bool = True


class Evaluator:
    """Holds the jitted sampler, so every evaluation of a run uses the same compiled programs."""

    def __init__(
        self,
        config: VLMConfig,
        processor: Processor,
        settings: EvaluationSettings,
        mesh: jax.sharding.Mesh,
    ):
        self.processor, self.settings, self.mesh = processor, settings, mesh
        sampler = SamplerSettings(
            completions=1,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0,
            dtype=settings.dtype,
        )
        self.sample = make_sampler(config, sampler, len(processor.tokenizer))

    def ask(
        self,
        params: Any,
        examples: Sequence[Example],
        *,
        policy_in_prompt: bool,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any]]:
        """One record per Example, in order; a prompt that fits no bucket is counted as wrong."""
        rows = [
            encode_prompt(example, self.processor, policy_in_prompt=policy_in_prompt)
            for example in examples
        ]
        largest = max(self.settings.prompt_buckets)
        records: dict[int, dict[str, Any]] = {}
        by_bucket: dict[int, list[int]] = collections.defaultdict(list)
        for i, row in enumerate(rows):
            if len(row.tokens) > largest or len(row.images.patches) > max(self.settings.windows):
                records[i] = _record(examples[i], len(row.tokens), "", "prompt_too_long", 0.0)
            else:
                by_bucket[choose_bucket(len(row.tokens), self.settings.prompt_buckets)].append(i)
        for bucket, members in sorted(by_bucket.items()):
            for start in range(0, len(members), self.settings.rows):
                chunk = members[start : start + self.settings.rows]
                records.update(self._ask_chunk(params, examples, rows, chunk, bucket))
                on_progress(len(records))
        return [records[i] for i in range(len(examples))]

    def _ask_chunk(self, params, examples, rows, chunk, bucket) -> dict[int, dict[str, Any]]:
        windows = max(len(rows[i].images.patches) for i in chunk)
        batch = make_batch(
            [rows[i] for i in chunk],
            num_rows=self.settings.rows,
            num_tokens=bucket,
            num_windows=choose_bucket(windows, self.settings.windows),
        )
        ids = prompt_ids([examples[i].example_id for i in chunk], self.settings.rows)
        rollouts = jax.device_get(
            self.sample(params, place_batch(batch, self.mesh), jax.random.key(0), ids)
        )
        texts = [
            decode_completion(self.processor, rollouts.tokens[at, 0, : rollouts.lengths[at, 0]])
            for at in range(len(chunk))
        ]
        grades = grade_completions(
            texts,
            [examples[i] for i in chunk],
            [bool(rollouts.stopped[at, 0]) for at in range(len(chunk))],
            needs_think=self.settings.needs_think,
        )
        return {
            i: _record(
                examples[i], len(rows[i].tokens), text, grade.reason, grade.accuracy, grade.details
            )
            for i, text, grade in zip(chunk, texts, grades, strict=True)
        }


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
