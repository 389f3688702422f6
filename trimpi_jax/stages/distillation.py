r"""Distillation: the actor that reads the policy answers, and SFT imitates where it was right.

    questions   of training, round after round, shuffled by seed
    answers     n of each a round, the policy in the prompt            rollouts/engine.py
    verdicts    wrong, cut off or unthinking ones are dropped          grading/, stages/make_cot.py
    Examples    (question, its own thought, its own answer)            data_pipelines/building.py
    SFT         under the prompt without the policy                    stages/sft.py

The rival of PolicyRollout at an equal number of completions: the same samples of the same prompt,
imitated instead of compared. The actor that answers stays the one that the stage began with.

What was asked, dropped (and why) and kept stands in the manifest of `data/`; every verdict, with
the text of what was dropped, in `answers.jsonl`, which is also what a killed run goes on from.

Source: a row that the paper lacks; distilling context, arXiv:2209.15189; filtering by the answer,
arXiv:2308.01825.
Next: trimpi_jax/stages/sft.py
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.building import write_dataset
from data_pipelines.example import Example
from data_pipelines.shards import check_dataset, read_manifest
from data_pipelines.streaming import iter_split
from trimpi_jax.grading.answers import RewardWeights, find_boxes
from trimpi_jax.grading.rewards import FAILED, check_failures, reward_completions
from trimpi_jax.inputs.encode import policy_key
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.processor import decode_completion
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import Engine, Weights, ask
from trimpi_jax.stages.make_cot import ACCEPTED, Journal, count_rejected, find_thought
from trimpi_jax.stages.result_files import digest
from trimpi_jax.types import Rollouts

SAMPLING, ORDER = 2, 3  # folded into the seed: what the randomness is for
SPLIT = "cot"  # what was kept, with the thoughts
TOO_LONG = "prompt_too_long"  # the reason of a question that fits no bucket: never sampled


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """What is sampled, and what of it is kept."""

    rollouts: int  # completions in all
    samples: int  # of a question and round
    sample_prompts: int  # questions sampled at a time
    max_new_tokens: int
    seed: int
    dtype: str = "float32"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    compact_every: int = 0
    min_accuracy: float = 1.0
    kept_per_question: int = 0  # most right answers to a question; 0 = all
    max_failed_grades: float = 0.05

    def __post_init__(self):
        problems = []
        if min(self.rollouts, self.samples, self.sample_prompts) < 1:
            problems.append("rollouts, samples and sample_prompts must be >= 1")
        elif self.rollouts % self.samples:
            problems.append(
                f"rollouts {self.rollouts} is not a multiple of samples {self.samples}: a question"
                " gets all its samples"
            )
        if self.temperature <= 0 and self.samples > 1:
            problems.append("temperature 0 says the same every time: samples must be 1")
        if not 0 < self.min_accuracy <= 1:
            problems.append(f"min_accuracy must be in (0, 1], got {self.min_accuracy}")
        if self.kept_per_question < 0:
            problems.append("kept_per_question must be >= 0")
        if not 0 <= self.max_failed_grades <= 1:
            problems.append("max_failed_grades is a share")
        if problems:
            raise ValueError("distillation: " + "; ".join(problems))

    @property
    def sampler(self) -> SamplerSettings:
        """The sampler's part."""
        return SamplerSettings(
            self.samples,
            self.max_new_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.dtype,
            self.compact_every,
        )


def distil(
    engine: Engine,
    params: Any,
    questions: tuple[Path, str],
    folder: Path,
    settings: DistillationSettings,
    about: Mapping[str, Any],
    progress: Progress,
) -> Path:
    """Sample, judge, write; returns the dataset whose split SPLIT is to be imitated.

    Args:
        engine: of the run.
        params: of the actor that reads the policy.
        questions: (dataset, split) of what is asked.
        folder: of the stage; gets answers.jsonl and data/.
        settings: see `DistillationSettings`.
        about: what the answers depend on beside the settings: the actor, the dataset.
        progress: where bars and lines go.

    Raises:
        ValueError: the folder holds answers of others, or none was right.
        RuntimeError: too many answers could not be graded.
    """
    out, identity = folder / "data", _identity(settings, about)
    if out.exists():
        found = check_dataset(out)["recipe"].get("distillation", {})
        if found.get("identity") != digest(identity):
            raise ValueError(f"{out} holds answers of another actor or other settings; delete it")
        progress.say(f"distillation: {describe(found)}, sampled before")
        return out
    journal = Journal(folder / "answers.jsonl", identity)
    keys = [policy_key(example) for example in iter_split(*questions)]
    if not keys:
        raise ValueError(f"{questions[0]} has no questions in split '{questions[1]}'")
    plan = plan_rounds(keys, settings)
    with progress.task("answering", settings.rollouts) as bar:
        done, weights = 0, None
        for number, places in plan:
            examples = list(iter_split(*questions, places))
            attempts = range(number * settings.samples, (number + 1) * settings.samples)
            done += len(examples) * settings.samples
            if all(journal.has(e.example_id, a) for e in examples for a in attempts):
                continue
            weights = weights or engine.load(params)
            answer_questions(engine, weights, examples, number, settings, journal)
            bar(done, {})
    facts = summarize(journal.entries) | {"identity": digest(identity), **identity}
    kept = choose_kept(journal.entries, settings.kept_per_question)
    if not kept:
        raise ValueError(
            f"none of {facts['rollouts']} answers to {facts['questions']} questions was right"
            f" ({facts['rejected']}): there is nothing to imitate. The texts are in {journal.path}"
        )
    different = len({(entry["id"], entry["cot"], entry["answer"]) for entry in kept})
    facts |= {"kept": len(kept), "kept_different": different}
    manifest = read_manifest(questions[0])["recipe"]
    recipe = {"dataset": "distillation", "questions": manifest, "distillation": facts}
    write_dataset(out, {SPLIT: _with_answers(questions, kept)}, recipe)
    progress.say(f"distillation: {describe(facts)}")
    return out


def plan_rounds(
    policies: Sequence[str], settings: DistillationSettings
) -> Iterator[tuple[int, list[int]]]:
    """(round, places of questions): each question once a round, until the rollouts are spent.

    A batch is about one policy, which is then read once. The last round takes what is left.

    Args:
        policies: the key of each question's policy.
        settings: see `DistillationSettings`.
    """
    left, number = settings.rollouts // settings.samples, 0
    while left:
        rng = np.random.default_rng([settings.seed, ORDER, number])
        places = [int(place) for place in rng.permutation(len(policies))[:left]]
        left -= len(places)
        groups: dict[str, list[int]] = {}
        for place in places:
            groups.setdefault(policies[place], []).append(place)
        for group in groups.values():
            for start in range(0, len(group), settings.sample_prompts):
                yield number, group[start : start + settings.sample_prompts]
        number += 1


def answer_questions(
    engine: Engine,
    weights: Weights,
    examples: Sequence[Example],
    number: int,
    settings: DistillationSettings,
    journal: Journal,
) -> None:
    """Note the verdicts of one batch in a round.

    Samples depend on (seed, round, question, sample number) only.

    Raises:
        RuntimeError: too many of the batch could not be graded; nothing of it was noted.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), SAMPLING)
    rows = settings.sample_prompts
    asked, rollouts = ask(
        engine,
        weights,
        examples,
        settings.sampler,
        jax.random.fold_in(key, number),
        aware=True,
        num_rows=rows,
        max_chunk=rows,
    )
    first, count = number * settings.samples, settings.samples
    texts = _texts(engine, rollouts)
    found = reward_completions(
        texts,
        [example for example in asked.examples for _ in range(count)],
        rollouts.stopped.astype(bool).reshape(-1).tolist(),
        RewardWeights(),
    )
    check_failures(found.failures, len(texts), settings.max_failed_grades, "distillation")
    for example_id in asked.dropped:
        for attempt in range(first, first + count):
            _note(journal, example_id, attempt, TOO_LONG)
    for i, (text, grade) in enumerate(zip(texts, found.grades, strict=True)):
        q, g = divmod(i, count)
        thought, reason = "", grade.reason
        if reason != FAILED:
            ended = bool(rollouts.stopped[q, g])
            thought, reason = find_thought(text, ended, grade, settings.min_accuracy)
        kept: dict[str, Any] = {"text": text}
        if reason == ACCEPTED:
            kept = {"cot": thought, "answer": find_boxes(text)[-1][1].strip()}
        kept["tokens"] = int(rollouts.lengths[q, g])
        _note(journal, asked.examples[q].example_id, first + g, reason, **kept)


def choose_kept(entries: Sequence[Mapping[str, Any]], per_question: int) -> list[Mapping[str, Any]]:
    """The first right answers to each question, at most `per_question` (0 = all).

    Equal ones among them stay: how often the actor says something is what is imitated.
    """
    taken: collections.Counter[str] = collections.Counter()
    kept = []
    for entry in sorted(entries, key=lambda entry: (entry["id"], entry["attempt"])):
        full = per_question and taken[entry["id"]] == per_question
        if entry["reason"] == ACCEPTED and not full:
            taken[entry["id"]] += 1
            kept.append(entry)
    return kept


def summarize(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, JSON-able: questions, rollouts, right ones, why others were dropped, tokens."""
    sampled = [entry for entry in entries if entry["reason"] != TOO_LONG]
    right = [entry for entry in sampled if entry["reason"] == ACCEPTED]
    return {
        "questions": len({entry["id"] for entry in entries}),
        "questions_answered": len({entry["id"] for entry in right}),
        "rollouts": len(sampled),
        "right": len(right),
        "right_share": len(right) / max(len(sampled), 1),
        "rejected": count_rejected(entries),
        "completion_tokens": sum(entry["tokens"] for entry in sampled),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The counts in words."""
    return (
        f"{facts['rollouts']} answers to {facts['questions']} questions,"
        f" {facts['right']} right ({100 * facts['right_share']:.1f} %), to"
        f" {facts['questions_answered']} of them; {facts['kept']} kept, {facts['kept_different']}"
        f" different; dropped: {facts['rejected'] or 'none'}"
    )


def _note(journal: Journal, example_id: str, attempt: int, reason: str, **kept: Any) -> None:
    """Unless a run that was killed in this batch has noted it: the same samples come again."""
    if not journal.has(example_id, attempt):
        journal.note(example_id, attempt, reason, **kept)


def _texts(engine: Engine, rollouts: Rollouts) -> list[str]:
    """Of all completions, question after question."""
    rows, count = rollouts.lengths.shape
    return [
        decode_completion(engine.processor, rollouts.tokens[q, g, : int(rollouts.lengths[q, g])])
        for q in range(rows)
        for g in range(count)
    ]


def _identity(settings: DistillationSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers and the choice among them depend on."""
    options = dataclasses.asdict(settings)
    del options["sample_prompts"], options["compact_every"]  # of speed only
    return json.loads(json.dumps({**about, "settings": options}))


def _with_answers(
    questions: tuple[Path, str], kept: Sequence[Mapping[str, Any]]
) -> Iterator[Example]:
    """The kept answers as Examples, in the order of the questions."""
    answers: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for entry in kept:
        answers[entry["id"]].append(entry)
    for example in iter_split(*questions):
        for entry in answers.get(example.example_id, ()):
            source = {"mode": "distillation", "generator": "actor", "attempt": entry["attempt"]}
            yield dataclasses.replace(
                example,
                example_id=f"{example.example_id}#{entry['attempt']}",
                cot=entry["cot"],
                answer=entry["answer"],
                meta=example.meta | {"cot_source": source, "gold_answer": example.answer},
            )
