"""The suites: what can be asked of a model, and how a suite's result is kept.

    DIR/main.json              a finished suite: identity, versions, summary, one record a question
    DIR/main.records.jsonl     a half-done one: the records so far, where the next start goes on
    DIR/results.json           all suites together, without the records

A suite is a function of a `Context` that gives a `SuiteResult`. The same suites run inside training
(stages/pipeline.py) and on a folder (stages/evaluate_folder.py). A suite whose file has the same
identity (config, model, data, seed, number of questions) is not run again.

Source: paper section 5.
Next: trimpi_jax/stages/evaluate_folder.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.table import Table
from rich.text import Text

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
from trimpi_jax.evaluators.statistics import compare_records, format_rate
from trimpi_jax.inputs.encode import policy_key
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.processor import encode_completion

PACKAGES = ("trimpi_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "tokenizers")
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
        facts = [dict(self.identity), policy_in_prompt, settings, _question_digest(examples)]
        with _RecordFile(self.folder / f"{name}.records.jsonl", _digest(facts)) as kept:
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
    records = context.ask("main", context.read("test"), policy_in_prompt=False)
    summary = summarize(records)
    return SuiteResult(summary, records, describe(summary))


def run_in_context(context: Context) -> SuiteResult:
    """Policy In-Context: the same questions with their policy in the prompt."""
    records = context.ask("in_context", context.read("test"), policy_in_prompt=True)
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
    examples = context.read("test")
    records = answers_of_main(context, "anatomy", examples)
    found = [dissect(*pair) for pair in zip(examples, records, strict=True)]
    summary = summarize_anatomy(examples, records, found)
    told = [record | {"anatomy": one} for record, one in zip(records, found, strict=True)]
    return SuiteResult(summary, told, describe_anatomy(summary))


def run_referral(context: Context) -> SuiteResult:
    """Policy Referral of Main, exact; a record's accuracy is its score / 10."""
    examples = context.read("test")
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
    examples = context.read("test")
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
    questions = make_recital(context.read("test"), context.seed)
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
    made = make_pressure(context.read("test")[:count], context.seed)
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
    examples = [e for e in context.read("test") if e.policy_text]
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
    found = _read_result(context.folder / "main.json")
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


def run_suites(
    context: Context, names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run suites that have no result yet: (name -> content of its file, name -> why left out)."""
    context.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        path = context.folder / f"{name}.json"
        identity = dict(context.identity) | {"suite": name}
        found = _read_result(path)
        if found is not None and found["identity"] == identity:
            context.progress.say(f"{name}: evaluated before, skipped ({path})")
            results[name] = found
            continue
        evaluator = context.evaluator
        before, started = dict(evaluator.seconds), time.perf_counter()
        try:
            result = SUITES[name](context)
        except Unavailable as error:
            left_out[name] = str(error)
            context.progress.say(f"{name}: left out; {error}")
            continue
        seconds = {part: evaluator.seconds[part] - before[part] for part in before}
        results[name] = {
            "identity": identity,
            "versions": versions(),
            "seconds": {
                "suite": time.perf_counter() - started,
                "asking": seconds["total"],  # of this start; a continued one asked fewer
                "grading": seconds["grading"],
            },
            "summary": result.summary,
            "lines": [list(line) for line in result.lines],
            "records": result.records,
        }
        write_json(path, results[name])
        for pattern in (f"{name}.records.jsonl", f"{name}-*.records.jsonl"):
            for half_done in context.folder.glob(pattern):
                half_done.unlink()
    return results, left_out


def compare_results(
    results: Mapping[str, Mapping[str, Any]], other: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    """Suite -> the two models on the same questions, for suites that both have.

    Raises:
        ValueError: there is none, or the questions differ.
    """
    shared = [name for name in results if name in other]
    if not shared:
        raise ValueError(
            f"the other model was asked {sorted(other)}, this one {sorted(results)}: nothing to"
            " compare"
        )
    compared = {}
    for name in shared:
        pair = results[name], other[name]
        if any("answer" not in record for one in pair for record in one["records"]):
            continue  # a suite without gold answers has nothing to pair
        data = [one["identity"].get("data_sha256") for one in pair]
        if data[0] != data[1]:
            raise ValueError(f"{name}: the two models were asked about other datasets ({data})")
        compared[name] = compare_records(pair[0]["records"], pair[1]["records"], seed=seed)
    return compared


def result_table(
    results: Mapping[str, Mapping[str, Any]], against: Mapping[str, Mapping[str, Any]]
) -> Table:
    """The table for the terminal."""
    table = Table(title="Evaluation, greedy decoding; [95 % interval]")
    table.add_column("suite")
    table.add_column("what")
    table.add_column("result", justify="right")
    for name, result in results.items():
        lines = [*result["lines"]]
        if name in against:
            lines += describe_comparison(against[name])
        for number, (what, text) in enumerate(lines):
            # names from a dataset are text, never rich's markup
            table.add_row(name if number == 0 else "", Text(what), Text(text))
        table.add_section()
    return table


def describe_comparison(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `compare_records` found, in words."""
    low, high = 100 * found["score_difference_low"], 100 * found["score_difference_high"]
    lines = [
        (
            "against the other model",
            f"{100 * found['score_difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
            f" on {found['count']} questions",
        ),
        (
            "only this / only the other is right",
            f"{found['first_right_only']} / {found['second_right_only']},"
            f" McNemar p {_small(found['mcnemar_p'])}",
        ),
    ]
    if found["only_in_first"] or found["only_in_second"]:
        lines.append(
            (
                "questions of one model only, left out",
                f"{found['only_in_first']} / {found['only_in_second']}",
            )
        )
    return lines


def _small(p: float) -> str:
    return f"= {p:.3g}" if p > 1e-300 else "< 1e-300"  # below that a float is 0


def make_identity(config: ConfigDict, data: Path) -> dict[str, Any]:
    """What decides a result beside the model: digests of config and data, and the seed."""
    manifest = read_manifest(data)
    shards = {
        name: [shard["sha256"] for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    return {
        "config_sha256": _digest(json.loads(config.to_json())),
        "dataset": manifest["recipe"].get("dataset", ""),
        "data_sha256": _digest(shards),
        "seed": config.seed,
    }


def folder_digest(folder: Path) -> str:
    """sha256 of the files of a model folder or checkpoint: names and contents."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """What computed a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_json(path: Path, content: Any) -> None:
    """A JSON file, complete or absent."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


class _RecordFile:
    """Records of half-done questions: a line with the key, then one line a record.

    Lines of another key, or after one that a kill cut short, are dropped.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _RecordFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(self._whole_lines())
        if not lines or lines[0] != {"key": self.key}:
            lines = [{"key": self.key}]
        self.records = {record["example_id"]: record for record in lines[1:]}
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def append(self, records: Any) -> None:
        """Keep more records, on disk at once."""
        for record in records:
            self.records[record["example_id"]] = record
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        if self.path.is_file():
            for text in self.path.read_text().splitlines():
                try:
                    yield json.loads(text)
                except json.JSONDecodeError:
                    return


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Suite -> its file, of a folder of results.

    Raises:
        ValueError: there is none.
    """
    folder = folder.expanduser()
    found = {name: _read_result(folder / f"{name}.json") for name in SUITES}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise ValueError(
            f"{folder} holds no results of an evaluation ({', '.join(SUITES)}); evaluate that model"
            " first, its last line names the folder"
        )
    return results


def _read_result(path: Path) -> dict[str, Any] | None:
    """A suite's file; None where there is none or it is no result."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "identity" in found else None


def _question_digest(examples: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        facts = [example.example_id, example.query, example.answer, example.policy_text]
        total.update(json.dumps(facts).encode())
        for image in (*example.images, *example.policy_images):
            total.update(hashlib.sha256(image).digest())
    return total.hexdigest()


def _digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
