"""The suites: what can be asked of a model. A suite is a function of a `Context`.

Source: paper section 5.
Next: trimpi_jax/stages/evaluate_model.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.example import Example
from data_pipelines.shards import read_manifest
from data_pipelines.streaming import read_split
from trimpi_jax.evaluators.anatomy import describe_anatomy, dissect, summarize_anatomy
from trimpi_jax.evaluators.efficiency import (
    POLICY_FACTORS,
    describe_efficiency,
    find_break_even,
    fit_policy_cost,
    measure_throughput,
    repeat_policy,
)
from trimpi_jax.evaluators.forgetting import (
    ForgettingSettings,
    describe_benchmark,
    read_benchmarks,
    summarize_benchmark,
)
from trimpi_jax.evaluators.judge import (
    JudgeSettings,
    choose_responses,
    describe_judged,
    judge_referral,
)
from trimpi_jax.evaluators.pressure import (
    describe_pressure,
    judge_pressure,
    make_pressure,
    summarize_pressure,
)
from trimpi_jax.evaluators.questions import Evaluator, summarize, summarize_override
from trimpi_jax.evaluators.recital import (
    describe_recital,
    make_recital,
    score_recital,
    summarize_recital,
)
from trimpi_jax.evaluators.referral import BEST as MOST_REFERRAL
from trimpi_jax.evaluators.referral import (
    can_check_exactly,
    describe_referral,
    score_referral,
    summarize_referral,
)
from trimpi_jax.evaluators.statistics import format_rate
from trimpi_jax.inputs.encode import policy_key
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.processor import encode_completion
from trimpi_jax.stages.result_files import digest, open_records, question_digest, read_result

PRESSED = 100  # questions that are pressed upon; ours, as many as the paper judges for referral
SHOWN_GROUPS = ("policy", "depth", "family", "tool")  # in the terminal; leaves are in the JSON
MOST_GROUPS = 12  # of one kind, in the terminal


class Unavailable(ValueError):
    """A suite cannot be run with this data or config; says why and what would make it run."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a suite may use. `folder` keeps its half-done work; `identity` is what is evaluated."""

    evaluator: Evaluator  # its weights are loaded; `evaluator.changed(...)` for other settings
    params: Any  # the same weights, for programs of a suite's own
    config: ConfigDict  # of the run; every size is a number; a suite's options: config.eval.SUITE
    data: Path  # folder of the dataset, with a manifest
    folder: Path  # where results are kept
    seed: int
    progress: Progress
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has_split(self, split: str) -> bool:
        """Whether the dataset has questions of this split."""
        splits = read_manifest(self.data)["splits"]
        return split in splits and splits[split]["count"] > 0

    def read(self, split: str) -> list[Example]:
        """The first `config.eval.examples` Examples of a split.

        Raises:
            Unavailable: the dataset has no such split, or it is empty.
        """
        if not self.has_split(split):
            found = sorted(read_manifest(self.data)["splits"])
            raise Unavailable(f"{self.data} has no questions in a split '{split}'; it has {found}")
        return list(read_split(self.data, split, self.config.eval.examples))

    def questions(self) -> list[Example]:
        """What Main asks: `config.eval.split`, the test set unless something is being tuned."""
        return self.read(self.config.eval.get("split", "test"))  # older runs do not name it

    def option(self, suite: str, name: str, default: Any) -> Any:
        """`config.eval.SUITE.NAME`, or the default."""
        return self.config.eval.get(suite, ConfigDict()).get(name, default)

    def ask(
        self,
        name: str,
        examples: Sequence[Example],
        *,
        policy_in_prompt: bool,
        evaluator: Evaluator | None = None,
    ) -> list[dict[str, Any]]:
        """One record per Example, in order; goes on where an earlier start was stopped.

        Args:
            name: of these questions within `folder`: the suite's, or SUITE-PART.
            examples: the questions; their ids are unique.
            policy_in_prompt: whether each Example's policy is in its prompt.
            evaluator: another than the context's, see `Evaluator.changed`.

        Raises:
            Unavailable: there is no question.
        """
        if not examples:
            raise Unavailable(f"the set of questions {name} is empty")
        evaluator = evaluator or self.evaluator
        settings = [dataclasses.asdict(evaluator.settings), evaluator.engine.sizes]
        facts = [dict(self.identity), policy_in_prompt, settings, question_digest(examples)]
        path = self.folder / f"{name}.records.jsonl"
        with open_records(path, digest(facts)) as kept:
            missing = [e for e in examples if e.example_id not in kept.records]
            before = len(examples) - len(missing)
            if before and missing:
                self.progress.say(f"{name}: going on behind {before} answers of an earlier start")
            with self.progress.task(f"ask {name}", len(examples)) as bar:
                bar(before, {})
                evaluator.ask(
                    missing,
                    policy_in_prompt=policy_in_prompt,
                    on_progress=lambda done: bar(before + done, {}),
                    on_records=lambda records: kept.append(records.values()),
                )
            return [kept.records[example.example_id] for example in examples]


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """What a suite found. Everything is JSON-able."""

    summary: dict[str, Any]
    records: list[
        dict[str, Any]
    ]  # one a question; "groups", "accuracy" and "answer" allow --against
    lines: list[tuple[str, str]]  # (what, result) for the terminal


Suite = Callable[[Context], SuiteResult]


def run_main(context: Context) -> SuiteResult:
    """Main: unseen images, no policy in the prompt."""
    records = context.ask("main", context.questions(), policy_in_prompt=False)
    summary = summarize(records)
    return SuiteResult(summary, records, describe(summary))


def run_in_context(context: Context) -> SuiteResult:
    """Policy In-Context: the same questions with their policy in the prompt."""
    records = context.ask("in_context", context.questions(), policy_in_prompt=True)
    summary = summarize(records)
    return SuiteResult(summary, records, describe(summary))


def run_override(context: Context) -> SuiteResult:
    """Policy Override: a changed policy of the same name in the prompt; gold answers follow it."""
    examples = context.read("override")
    records = context.ask("override", examples, policy_in_prompt=True)
    needs_think = context.evaluator.settings.needs_think
    follows = summarize_override(records, examples, needs_think=needs_think)
    summary = summarize(records) | {"follows": follows}
    lines = describe(summary)
    for which, words in (("prompt", "the prompt's"), ("trained", "the trained")):
        if follows[which]["count"]:
            lines.append(
                (f"follows {words} policy, where they differ", format_rate(follows[which]))
            )
    return SuiteResult(summary, records, lines)


def run_anatomy(context: Context) -> SuiteResult:
    """Error anatomy of Main: what went wrong in each answer, and the branching error."""
    examples = context.questions()
    records = answers_of_main(context, "anatomy", examples)
    found = [dissect(*pair) for pair in zip(examples, records, strict=True)]
    summary = summarize_anatomy(examples, records, found)
    told = [record | {"anatomy": one} for record, one in zip(records, found, strict=True)]
    return SuiteResult(summary, told, describe_anatomy(summary))


def run_referral(context: Context) -> SuiteResult:
    """Policy Referral of Main, exact; a record's accuracy is its score / 10."""
    examples = context.questions()
    if not all(map(can_check_exactly, examples)):
        raise Unavailable(
            "these policies have neither a tree nor numbered rules that citations could be checked"
            " against; the suite referral_judge asks an LLM"
        )
    records = answers_of_main(context, "referral", examples)
    scores = [
        score_referral(example, record["completion"])
        for example, record in zip(examples, records, strict=True)
    ]
    summary = summarize_referral(scores)
    told = [
        record | {"accuracy": score["score"] / MOST_REFERRAL, "referral": score}
        for record, score in zip(records, scores, strict=True)
        if score["score"] is not None
    ]
    return SuiteResult(summary, told, describe_referral(summary))


def run_referral_judge(context: Context) -> SuiteResult:
    """Policy Referral of Main by an LLM behind `config.eval.referral_judge.base_url`."""
    options = context.config.eval.get("referral_judge", ConfigDict()).to_dict()
    known = {field.name for field in dataclasses.fields(JudgeSettings)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"config.eval.referral_judge has no {unknown}; it has {sorted(known)}")
    try:
        settings = JudgeSettings(**options)
    except ValueError as error:
        raise Unavailable(f"{error}; all of it under config.eval.referral_judge") from error
    examples = context.questions()
    records = answers_of_main(context, "referral_judge", examples)
    texts = [record["completion"] for record in records]
    kept = context.folder / "referral_judge.replies.jsonl"
    total = len(choose_responses(len(examples), settings.responses))
    with context.progress.task("judge", total) as bar:
        verdicts, summary = judge_referral(
            settings, examples, texts, kept, lambda judged: bar(judged, {})
        )
    return SuiteResult(
        summary, [dataclasses.asdict(verdict) for verdict in verdicts], describe_judged(summary)
    )


def run_recital(context: Context) -> SuiteResult:
    """Recital: the rules themselves, asked without and with the policy in the prompt."""
    questions = make_recital(context.questions(), context.seed)
    if not questions:
        raise Unavailable(
            "recital asks for the Conditions and Cases of a ClevrPolicy and the tool versions of"
            " GTAPolicy; these policies have neither"
        )
    longest = max(
        len(encode_completion(context.evaluator.engine.processor, q.answer)) for q in questions
    )
    room = context.evaluator.settings.max_new_tokens + longest
    evaluator = context.evaluator.changed(questions, max_new_tokens=room)
    summary, told, lines = {}, [], []
    for part, aware in (("without_policy", False), ("with_policy", True)):
        records = context.ask(
            f"recital-{part}", questions, policy_in_prompt=aware, evaluator=evaluator
        )
        scores = [
            score_recital(question, record["completion"])
            for question, record in zip(questions, records, strict=True)
        ]
        summary[part] = summarize_recital(questions, scores)
        lines += describe_recital(summary[part], part.replace("_", " "))
        told += [
            record | {"example_id": f"{record['example_id']}#{part}", **score}
            for record, score in zip(records, scores, strict=True)
        ]
    return SuiteResult(summary, told, lines)


def run_pressure(context: Context) -> SuiteResult:
    """Pressure: behaviour that was internalized, when the conversation pushes against it."""
    count = context.option("pressure", "examples", PRESSED)
    made = make_pressure(context.questions()[:count], context.seed)
    questions = [question for variant in made.values() for question in variant]
    evaluator = context.evaluator.changed(questions)
    records = context.ask("pressure", questions, policy_in_prompt=False, evaluator=evaluator)
    told = [judge_pressure(*pair) for pair in zip(questions, records, strict=True)]
    summary = summarize_pressure(told)
    return SuiteResult(summary, told, describe_pressure(summary))


def run_forgetting(context: Context) -> SuiteResult:
    """Forgetting: general benchmarks from the files that `config.eval.forgetting` names."""
    options = context.config.eval.get("forgetting", ConfigDict()).to_dict()
    known = {field.name for field in dataclasses.fields(ForgettingSettings)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"config.eval.forgetting has no {unknown}; it has {sorted(known)}")
    settings = ForgettingSettings(**options)
    benchmarks = read_benchmarks(settings, context.seed)
    if not benchmarks:
        raise Unavailable(
            "name a file of a benchmark, e.g. --config.eval.forgetting.mmlu_pro=test.parquet, or"
            " for the nano model --config.eval.forgetting.nano=200"
        )
    summary, told, lines = {}, [], []
    for name, questions in benchmarks.items():
        evaluator = context.evaluator.changed(questions, max_new_tokens=settings.max_new_tokens)
        records = context.ask(
            f"forgetting-{name}", questions, policy_in_prompt=False, evaluator=evaluator
        )
        summary[name] = summarize_benchmark(name, records)
        lines += describe_benchmark(name, summary[name])
        told += records
    return SuiteResult(summary, told, lines)


def run_efficiency(context: Context) -> SuiteResult:
    """Efficiency: requests and tokens a second without and with the policy; when it pays."""
    examples = [e for e in context.questions() if e.policy_text]
    examples = examples[: context.evaluator.settings.rows]
    if not examples:
        raise Unavailable("efficiency compares with the policy in context; there is no policy text")
    first = policy_key(examples[0])  # one policy, so that it can be cached
    examples = [e for e in examples if policy_key(e) == first]
    longer = {n: [repeat_policy(e, n) for e in examples] for n in POLICY_FACTORS}
    evaluator = context.evaluator.changed(examples)
    summary: dict[str, Any] = {
        "internalized": measure_throughput(evaluator, examples, aware=False),
        "in_context": measure_throughput(evaluator, examples, aware=True),
        "policy_cached": measure_throughput(evaluator, examples, aware=True, share=True),
    }
    free_tokens = summary["internalized"]["prompt_tokens"]
    measured = [summary["internalized"], summary["in_context"]]
    measured += [
        measure_throughput(context.evaluator.changed(longer[n]), longer[n], aware=True)
        for n in POLICY_FACTORS[1:]
    ]
    points = [(m["prompt_tokens"] - free_tokens, m["batch_s"] / m["batch"]) for m in measured]
    _, slope = fit_policy_cost(points)
    summary |= {"points": points, "slope_s": slope}
    steps = [
        line.get("time/step_s", 0.0)
        for path in sorted(context.data.parent.glob("[0-9]*_*/metrics.jsonl"))
        for line in read_metrics(path)
    ]
    if train_s := sum(steps):
        found = find_break_even(slope, train_s, points[1][0])
        summary |= {"train_s": train_s, "break_even": found}
    return SuiteResult(summary, [], describe_efficiency(summary))


def answers_of_main(
    context: Context, name: str, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """The records of the suite Main where it is done, else the same questions asked now."""
    found = read_result(context.folder / "main.json")
    if found is not None and found["identity"] == dict(context.identity) | {"suite": "main"}:
        return found["records"]
    return context.ask(name, examples, policy_in_prompt=False)


SUITES: dict[str, Suite] = {
    "main": run_main,
    "in_context": run_in_context,
    "override": run_override,
    "anatomy": run_anatomy,
    "referral": run_referral,
    "referral_judge": run_referral_judge,
    "recital": run_recital,
    "pressure": run_pressure,
    "forgetting": run_forgetting,
    "efficiency": run_efficiency,
}
PAPER_SUITES = ("main", "in_context", "override")  # what runs when nothing is named


def describe(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a summary of `evaluators/questions.py` says in the terminal."""
    lines = [("right", format_rate(summary))]
    if abs(summary["score"] - summary["accuracy"]) > 1e-9:  # a grader that gives parts of a point
        lines.append(("mean score", f"{100 * summary['score']:.1f}"))
        lines += [(name, f"{100 * value:.1f}") for name, value in summary["details"].items()]
    failures = ", ".join(f"{name} {n}" for name, n in summary["format_failures"].items())
    lines.append(
        ("format", f"{100 * summary['format_rate']:.1f} %" + (f" ({failures})" if failures else ""))
    )
    for problem, count in summary["problems"].items():
        lines.append((f"problem {problem}", str(count)))
    lines.append(("prompt tokens", f"{summary['prompt_tokens']:.0f}"))
    for kind in SHOWN_GROUPS:
        groups = summary["groups"].get(kind, {})
        if 1 < len(groups) <= MOST_GROUPS:
            for name, found in groups.items():
                lines.append((f"{kind} {name}", format_rate(found)))
    return lines
