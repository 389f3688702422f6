"""Ask a model the questions of a split, with or without the policy in the prompt, and grade.

Three of the paper's evaluations differ by the prompt only:

    Main                no policy in the prompt
    Policy In-Context   the original policy put back
    Policy Override     a changed policy of the same name; the gold answer follows it

In: parameters, Examples. Out: one record per question; `summarize` gives counts, intervals and
groups, `summarize_override` says which of the two policies the answers follow.

Source: paper section 5.
Next: trimpi_jax/evaluators/statistics.py
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from data_pipelines.example import Example
from trimpi_jax.evaluators.statistics import break_down, rate, score_records
from trimpi_jax.grading.answers import Grade
from trimpi_jax.grading.grader import answer_form, grade_completions
from trimpi_jax.inputs.batching import plan_buckets
from trimpi_jax.inputs.encode import policy_key
from trimpi_jax.inputs.sizes import SizeReader
from trimpi_jax.io.agreement import gather
from trimpi_jax.models.processor import decode_completion
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import Engine, Weights, ask, prompt_lengths
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import row_share


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
        self.seconds = {"total": 0.0, "grading": 0.0}  # of everything asked so far

    def load(self, params: Any) -> None:
        """Use these weights from now on."""
        self.weights = self.engine.load(params, self.weights)

    def unload(self) -> None:
        """Forget the weights, so that their memory can be used or donated."""
        self.weights = None

    def changed(self, examples: Sequence[Example] = (), **settings: Any) -> Evaluator:
        """An evaluator of the same weights with other settings.

        Args:
            examples: their prompts fit, with and without the policy; none = the same buckets.
            settings: fields of `EvaluationSettings`.
        """
        engine = self.engine
        if examples:
            reader = SizeReader(engine.processor)
            sizes = [reader.measure(example) for example in examples]
            prompts = [size.free for size in sizes] + [size.aware for size in sizes if size.aware]
            fitting = PromptSizes(
                plan_buckets([prompt.tokens for prompt in prompts]),
                plan_buckets([prompt.windows for prompt in prompts], rounded=False),
            )
            engine = dataclasses.replace(engine, sizes=fitting)
        other = Evaluator(engine, dataclasses.replace(self.settings, **settings))
        other.weights, other.seconds = self.weights, self.seconds
        return other

    def ask(
        self,
        examples: Sequence[Example],
        *,
        policy_in_prompt: bool,
        on_progress: Callable[[int], None] = lambda done: None,
        on_records: Callable[[Mapping[int, dict[str, Any]]], None] = lambda records: None,
    ) -> list[dict[str, Any]]:
        """One record per Example, in order; a prompt that fits no bucket is counted as wrong.

        Args:
            examples: the questions.
            policy_in_prompt: whether each Example's policy is in its prompt.
            on_progress: told how many have been answered.
            on_records: told the records of a batch, by place in `examples`, as soon as it is done.
        """
        started = time.perf_counter()
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
            answered = self._ask_chunk(examples, chunk, policy_in_prompt)
            records.update(answered)
            on_records(answered)
            on_progress(len(records))
        self.seconds["total"] += time.perf_counter() - started
        return [records[i] for i in range(len(examples))]

    def _ask_chunk(
        self, examples: Sequence[Example], chunk: Sequence[int], aware: bool
    ) -> dict[int, dict[str, Any]]:
        """Each process answers and grades its share of the chunk; all know all records."""
        share = row_share(self.engine.mesh)
        own = self._ask_own(examples, chunk[share.number :: share.count], aware)
        told = share.of_leaders(gather(list(own.items()), "answers"))
        return {i: record for part in told for i, record in part}

    def _ask_own(
        self, examples: Sequence[Example], chunk: Sequence[int], aware: bool
    ) -> dict[int, dict[str, Any]]:
        engine, rows = self.engine, self.settings.rows
        assert self.weights is not None, "load weights first"
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
            i: _record(examples[i], 0, "", Grade(0.0, 0.0, None, "prompt_too_long"))
            for i in chunk
            if examples[i].example_id in too_long
        }
        texts = [
            decode_completion(engine.processor, rollouts.tokens[at, 0, : rollouts.lengths[at, 0]])
            for at in range(len(questions.examples))
        ]
        started = time.perf_counter()
        grades = grade_completions(
            texts,
            questions.examples,
            [bool(ended) for ended in rollouts.stopped[:, 0]],
            needs_think=self.settings.needs_think,
        )
        self.seconds["grading"] += time.perf_counter() - started
        places = [i for i in chunk if i not in records]
        lengths = prompt_lengths(questions, aware=aware)
        for i, count, text, grade in zip(places, lengths, texts, grades, strict=True):
            records[i] = _record(examples[i], count, text, grade)
        return records


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, rates, the Wilson 95 % interval of the accuracy, and the same for every group.

    `score` is the mean accuracy: more than the share of right answers where a grader gives parts of
    a point (tool calls, functions). `details` are the means of the graders' numbers, `problems`
    counts why answers could not be graded, `text_encoders` are what compared texts, `groups` are
    broken down by policy, depth, leaf, family, tool.
    """
    well_formed = sum(record["format"] == "ok" for record in records)
    return score_records(records) | {
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
        "groups": break_down(records),
    }


def summarize_override(
    records: Sequence[dict[str, Any]], examples: Sequence[Example], *, needs_think: bool
) -> dict[str, Any]:
    """Which policy the answers follow, where the changed and the trained one disagree.

    Three shares of the questions on which they disagree: `prompt` (the changed policy that is in
    the prompt), `trained` (the one in the weights, `meta["trained_answer"]`), `neither`.
    """
    differing = [
        (record, example)
        for record, example in zip(records, examples, strict=True)
        if example.meta.get("trained_answer", example.answer) != example.answer
    ]
    grades = grade_completions(
        [record["completion"] for record, _ in differing],
        [dataclasses.replace(e, answer=e.meta["trained_answer"]) for _, e in differing],
        [record["format"] != "cut_off" for record, _ in differing],
        needs_think=needs_think,
    )
    prompt = sum(record["accuracy"] == 1.0 for record, _ in differing)
    trained = sum(
        grade.accuracy == 1.0 and record["accuracy"] < 1.0
        for grade, (record, _) in zip(grades, differing, strict=True)
    )
    count = len(differing)
    return {
        "prompt": rate(prompt, count),
        "trained": rate(trained, count),
        "neither": rate(count - prompt - trained, count),
    }


def groups_of(example: Example) -> dict[str, str]:
    """What a question is counted under: policy, depth, leaf, family, tool; as far as it has them.

    The leaf is the gold answer where answers are one of few: an outcome of a policy, or a choice.
    """
    meta = example.meta
    found = {"policy": example.policy_name, "depth": meta.get("depth"), "family": family(meta)}
    if answer_form(example)["form"] in ("exact", "choice"):
        found["leaf"] = example.answer
    found["tool"] = meta.get("tool")
    return {kind: str(name) for kind, name in found.items() if name not in (None, "")}


def family(meta: Mapping[str, Any]) -> str:
    """The task family: what the dataset calls so, or the task."""
    return str(meta.get("family") or meta.get("task") or "")


def _mean_details(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    numbers: dict[str, list[float]] = collections.defaultdict(list)
    for record in records:
        for name, value in record["details"].items():
            if isinstance(value, int | float):
                numbers[name].append(float(value))
    return {name: sum(values) / len(values) for name, values in sorted(numbers.items())}


def _record(example: Example, prompt_tokens: int, text: str, grade: Grade) -> dict[str, Any]:
    return {
        "example_id": example.example_id,
        "policy_name": example.policy_name,
        "answer": example.answer,
        "completion": text,
        "parsed": grade.parsed,
        "accuracy": grade.accuracy,
        "format": grade.reason,
        "prompt_tokens": prompt_tokens,
        "details": grade.details,
        "groups": groups_of(example),
    }
