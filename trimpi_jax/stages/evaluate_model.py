"""Run suites on one model, keep their results, lay them side by side.

The same suites run inside training (stages/pipeline.py) and on a folder
(stages/evaluate_folder.py). A suite whose file has the same identity (config, model, data, seed,
number of questions) is not run again.

Source: paper section 5.
Next: trimpi_jax/stages/evaluate_folder.py
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trimpi_jax.evaluators.statistics import compare_records
from trimpi_jax.io.agreement import is_first, of_first
from trimpi_jax.stages.result_files import read_result, versions, write_json
from trimpi_jax.stages.suites import SUITES, Context, Unavailable


def run_suites(
    context: Context, names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run suites that have no result yet: (name -> content of its file, name -> why left out).

    Of several processes each answers its part of the questions, all know all answers, and the first
    one writes.
    """
    if is_first():
        context.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        path = context.folder / f"{name}.json"
        identity = dict(context.identity) | {"suite": name}
        found = of_first(lambda path=path: read_result(path), f"results of {name}")
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
        if not is_first():
            continue
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


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Suite -> its file, of a folder of results.

    Raises:
        ValueError: there is none.
    """
    folder = folder.expanduser()
    found = {name: read_result(folder / f"{name}.json") for name in SUITES}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise ValueError(
            f"{folder} holds no results of an evaluation ({', '.join(SUITES)}); evaluate that model"
            " first, its last line names the folder"
        )
    return results
