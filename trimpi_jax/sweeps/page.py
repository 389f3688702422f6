"""The page of a sweep, and the same tables as Markdown: verdicts, main table, the paper's others.

    DIR/report.html     one self-contained page
    DIR/report.md       its tables

In: the sweep and its results. The paper's figures stand beside ours; a cell without a finished run
says "not run".

Next: trimpi_jax/sweep.py
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from trimpi_jax.io.curves import COLOURS, Curve, plot_lines, svg_address
from trimpi_jax.io.paper_figures import FIGURES, SAVED, SUITE_FIGURES
from trimpi_jax.io.report import render_template
from trimpi_jax.sweeps.plan import AWARE, CHANGED, FREE, Claim, Column, Row, Run, Sweep
from trimpi_jax.sweeps.records import DONE, FAILED, Found, write_whole
from trimpi_jax.sweeps.tables import (
    NOT_RUN,
    VERDICTS,
    Results,
    Value,
    cell,
    difference,
    done_records,
    interval_note,
    judge_claims,
    mean_over_seeds,
)

NONE = "–"
SUITE_WORDS = {FREE: "without policy", AWARE: "policy in context", CHANGED: "changed policy"}


class Section(NamedTuple):
    """A table with its heading."""

    key: str
    title: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""


def write_page(
    sweep: Sweep, runs: Sequence[Run], results: Results, found: Found, root: Path
) -> None:
    """Write report.html and report.md; each appears complete or not at all."""
    sections = make_sections(sweep, runs, results, found)
    facts = make_facts(sweep, runs, results)
    overviews, curves = make_plots(sweep, results)
    page = render_template(
        "sweep.html.jinja",
        title=sweep.name,
        facts=facts,
        sections=sections,
        overviews=overviews,
        curves=curves,
    )
    for name, text in (("report.html", page), ("report.md", markdown(sweep, facts, sections))):
        write_whole(root / name, text)


def make_facts(sweep: Sweep, runs: Sequence[Run], results: Results) -> dict[str, str]:
    """What stands at the head of the page."""
    states = collections.Counter(record["status"] for record in results.values())
    machines = {
        f"{r['machine']['cores']} cores, {r['machine']['system']}"
        for r in results.values()
        if "machine" in r
    }
    codes = sorted({record["code_sha256"][:12] for record in results.values()})
    facts = {
        "sweep": sweep.name,
        "note": sweep.note,
        "runs": f"{states[DONE]} done, {states[FAILED]} failed,"
        f" {len(runs) - len(results)} not run, of {len(runs)}",
        "seeds": ", ".join(map(str, sweep.seeds)),
        "code": ", ".join(codes),
        "machines": "; ".join(sorted(machines)),
        "seconds of all runs": f"{sum(r['wall_s'] for r in results.values()):.0f}",
        "claims": _count_verdicts(sweep, results),
    }
    return {name: text for name, text in facts.items() if text}


def _count_verdicts(sweep: Sweep, results: Results) -> str:
    counts = collections.Counter(one.verdict for one in judge_claims(sweep, results))
    return ", ".join(f"{word}: {counts[word]}" for word in VERDICTS)


def make_sections(
    sweep: Sweep, runs: Sequence[Run], results: Results, found: Found
) -> list[Section]:
    """Every table of the page that has something to say."""
    made = [verdict_table(sweep, results), main_table(sweep, results)]
    made += [
        detail_table(sweep, column, results)
        for column in sweep.columns
        if any(done_records(results, row.name, column.name) for row in sweep.rows)
    ]
    made += [
        override_table(sweep, results),
        suite_table(sweep, results, "referral", *REFERRAL),
        suite_table(sweep, results, "branching", *BRANCHING),
        forgetting_table(sweep, results),
        efficiency_table(sweep, results),
        run_table(runs, results),
        stale_table(found),
    ]
    return [section for section in made if section.rows]


def verdict_table(sweep: Sweep, results: Results) -> Section:
    """The paper's claims, one line a claim and column."""
    labels = {row.name: row.label for row in sweep.rows}
    rows, missing = [], {}
    for one in judge_claims(sweep, results):
        if one.verdict == NOT_RUN:  # one line for all its tasks
            missing.setdefault(one.claim, []).append((one.where, one.why))
            continue
        rows.append(
            [
                one.claim.text,
                one.where,
                one.verdict,
                one.value.signed if one.value else one.why,
                interval_note(one.value),
                describe_claim(one.claim, labels),
            ]
        )
    rows += [
        [
            claim.text,
            "; ".join(where for where, _ in parts),
            NOT_RUN,
            NONE,
            parts[0][1] if len({why for _, why in parts}) == 1 else NONE,
            describe_claim(claim, labels),
        ]
        for claim, parts in missing.items()
    ]
    return Section(
        "verdicts",
        "What the paper claims, and what these runs say",
        ["claim", "task", "verdict", "difference, points [95 %]", "interval", "compared"],
        rows,
        "A claim holds where the whole 95 % interval of the paired difference lies above what is"
        " claimed, does not hold where it lies below, and otherwise these runs cannot tell. Seeds"
        " are paired: the same policies, pictures and questions. One interval in twenty misses what"
        " it is about, so of this many claims some verdicts are chance.",
    )


def describe_claim(claim: Claim, labels: Mapping[str, str]) -> str:
    """`A − B, policy in context, > −5`."""
    first, second = labels[claim.first], labels.get(claim.second, "")
    suites = [SUITE_WORDS.get(claim.suite, claim.suite)]
    if claim.second_suite and claim.second_suite != claim.suite:
        suites.append(SUITE_WORDS.get(claim.second_suite, claim.second_suite))
        text = f"{first}, {suites[0]}" + (f" − {second}, {suites[1]}" if second else "")
    else:
        text = (f"{first} − {second}" if second else first) + f", {suites[0]}"
    unit = " a question of depth" if claim.grows else ""
    return f"{text}, more than {claim.more_than:g}{unit}"


def main_table(sweep: Sweep, results: Results) -> Section:
    """Rows and columns of the paper's main table, the paper's figures beneath ours."""
    rows = []
    for row in sweep.rows:
        cells = [row.label]
        for column in sweep.columns:
            value = cell(results, row.name, column.name, row.shows)
            cells.append(f"{_lines(value) if value else NOT_RUN}\npaper {paper_text(row, column)}")
        rows.append(cells)
    return Section(
        "main",
        "Main table",
        ["method", *(column.label for column in sweep.columns)],
        rows,
        "Accuracy in % (GTA: overall score) on unseen pictures, greedy decoding, without the policy"
        " in the prompt; the first row with it. Mean of the seeds and its 95 % interval. The"
        " paper's figures are of Qwen2.5-VL 3B and 7B on its own policies: context, not a target.",
    )


def _lines(value: Value | None) -> str:
    """The interval on a line of its own: columns stay narrow, numbers whole."""
    return f"{value.mean:.1f}\n[{value.low:.1f}, {value.high:.1f}]" if value else NONE


def paper_text(row: Row, column: Column) -> str:
    """`31.6 (3B), 47.0 (7B)`, or a dash."""
    figures = FIGURES.get(column.paper, {}).get(row.paper, {}) if row.paper else {}
    return ",\n".join(f"{value:.2f} ({size})" for size, value in figures.items()) or NONE


def detail_table(sweep: Sweep, column: Column, results: Results) -> Section:
    """One column in full: three prompts, form, what training took."""
    rows = []
    for row in sweep.rows:
        records = done_records(results, row.name, column.name)
        values = [cell(results, row.name, column.name, suite) for suite in SUITE_WORDS]
        own = values[list(SUITE_WORDS).index(row.shows)]
        if not records:
            rows.append([row.label, *[NOT_RUN] * 3, *[NONE] * 5])
            continue
        form = mean_over_seeds(results, row.name, column.name, ("suites", row.shows, "format_rate"))
        numbers = [
            statistics.fmean(record[key] for record in records)
            for key in ("steps", "rollouts", "train_s")
        ]
        rows.append(
            [
                row.label,
                *(_lines(value) for value in values),
                NONE if form is None else f"{100 * form:.1f}",
                *(f"{number:,.0f}" for number in numbers),
                interval_note(own),
            ]
        )
    return Section(
        f"column_{column.name}",
        f"{column.label} in full",
        [
            "method",
            *(f"{words}, % [95 %]" for words in SUITE_WORDS.values()),
            "format, %",
            "steps",
            "rollouts",
            "training s",
            "seeds, interval",
        ],
        rows,
        "Steps, rollouts and seconds are those of all stages of the row, as if it had been trained"
        " alone; compiling included. RL rows have the same limit of rollouts.",
    )


def override_table(sweep: Sweep, results: Results) -> Section:
    """Policy Override: accuracy, and which policy answers follow where the two disagree."""
    rows = []
    for row, column in _finished(sweep, results):
        value = cell(results, row.name, column.name, CHANGED)
        if value is None:
            continue
        path = ("suites", CHANGED, "follows")
        follows = [
            mean_over_seeds(results, row.name, column.name, (*path, which, "accuracy"))
            for which in ("prompt", "trained")
        ]
        paper = SUITE_FIGURES[CHANGED].get(column.paper, {}).get(row.paper)
        rows.append(
            [
                row.label,
                column.label,
                value.text,
                *(NONE if rate is None else f"{100 * rate:.1f}" for rate in follows),
                NONE if paper is None else f"{paper:.2f}",
            ]
        )
    return Section(
        "override",
        "Policy Override",
        [
            "method",
            "task",
            "accuracy, % [95 %]",
            "follows the prompt, %",
            "follows the weights, %",
            "paper, 7B",
        ],
        rows,
        "A changed policy of the same name stands in the prompt, and gold answers follow it. The"
        " two shares are over the questions on which the two policies disagree.",
    )


class Measured(NamedTuple):
    """A number of a suite's summary."""

    title: str
    header: str
    path: tuple[str, ...]
    more: tuple[tuple[str, tuple[str, ...]], ...]  # further columns: counts, header and path
    of: tuple[str, ...]  # how many answers there are: counts are shown as shares of them
    note: str


REFERRAL = Measured(
    "Policy Referral",
    "score, 0 to 10",
    ("suites", "referral", "score"),
    (
        ("wholly true answers, %", ("suites", "referral", "all_true")),
        ("answers that cite nothing, %", ("suites", "referral", "cites_nothing")),
    ),
    ("suites", "referral", "count"),
    "Is what the reasoning says about the policy true? Checked by program, every citation; the"
    " paper's is an LLM's judgement of 100 answers.",
)
BRANCHING = Measured(
    "Branching error",
    "mean absolute difference, per 2,000 answers",
    ("suites", "anatomy", "branching", "per_2000"),
    (
        (
            "answers that cite a Condition that is not there, %",
            ("suites", "anatomy", "branching", "answers_with_missing_section"),
        ),
    ),
    ("suites", "anatomy", "branching", "count"),
    "How often each Condition is cited, against the gold chains; lower is better. It depends on the"
    " number of Conditions, so depths cannot be compared.",
)


def suite_table(
    sweep: Sweep,
    results: Results,
    suite: str,
    title: str,
    header: str,
    path: tuple[str, ...],
    more: Sequence[tuple[str, tuple[str, ...]]],
    of: tuple[str, ...],
    note: str,
) -> Section:
    """One number of a suite by row and column, beside the paper's."""
    rows = []
    for row, column in _finished(sweep, results):
        value = mean_over_seeds(results, row.name, column.name, path)
        if value is None:
            continue
        counts = [mean_over_seeds(results, row.name, column.name, where) for _, where in more]
        answers = mean_over_seeds(results, row.name, column.name, of)
        paper = SUITE_FIGURES[suite].get(column.paper, {}).get(row.paper)
        rows.append(
            [
                row.label,
                column.label,
                f"{value:.2f}",
                *(
                    f"{100 * count / answers:.1f}" if count is not None and answers else NONE
                    for count in counts
                ),
                NONE if paper is None else f"{paper:.2f}",
            ]
        )
    headers = ["method", "task", header, *(name for name, _ in more), "paper, 7B"]
    return Section(suite, title, headers, rows, note + " Means over seeds.")


def forgetting_table(sweep: Sweep, results: Results) -> Section:
    """General benchmarks after training."""
    names: dict[str, None] = {}
    for record in results.values():
        if record["status"] == DONE:
            names |= dict.fromkeys(record["suites"].get("forgetting", {}))
    rows = []
    for row, column in _finished(sweep, results):
        path = ("suites", "forgetting")
        scores = [
            mean_over_seeds(results, row.name, column.name, (*path, name, "score"))
            for name in names
        ]
        if any(score is not None for score in scores):
            told = (NONE if score is None else f"{100 * score:.1f}" for score in scores)
            rows.append([row.label, column.label, *told])
    return Section(
        "forgetting",
        "Forgetting",
        ["method", "task", *(f"{name}, score in %" for name in names)],
        rows,
        "What else the model can still do; the untrained base is the first row. Means over seeds.",
    )


def efficiency_table(sweep: Sweep, results: Results) -> Section:
    """Prompt tokens and prefill time without and with the policy; the same for every row."""
    rows = []
    for column in sweep.columns:
        row = next((r for r in sweep.rows if done_records(results, r.name, column.name)), None)
        if row is None:
            continue
        pairs = {
            "prompt_tokens": [("suites", suite, "prompt_tokens") for suite in (FREE, AWARE)],
            "prefill_ms": [("prefill_ms", view) for view in ("policy_free", "policy_aware")],
        }
        cells = [column.label]
        for what, paths in pairs.items():
            free, aware = (mean_over_seeds(results, row.name, column.name, p) for p in paths)
            if free is None or not aware:
                cells += [NONE, NONE, NONE]
                continue
            cells += [f"{free:.1f} / {aware:.1f}", f"{100 * (1 - free / aware):.1f} %"]
            cells.append(f"{SAVED[what]} %")
        rates = [
            mean_over_seeds(
                results, row.name, column.name, ("suites", "efficiency", how, "requests_per_s")
            )
            for how in ("internalized", "in_context", "policy_cached")
        ]
        cells.append(" / ".join(NONE if rate is None else f"{rate:.1f}" for rate in rates))
        rows.append(cells)
    return Section(
        "efficiency",
        "Efficiency",
        [
            "task",
            "prompt tokens, without / with the policy",
            "saved",
            "paper, up to",
            "prefill ms, without / with",
            "saved",
            "paper, up to",
            "requests a second: without / with / policy cached",
        ],
        rows,
    )


def run_table(runs: Sequence[Run], results: Results) -> Section:
    """Every run of the sweep and what became of it."""
    rows = []
    for run in runs:
        record = results.get(run.name)
        if record is None:
            rows.append([run.name, NOT_RUN, NONE, NONE, NONE])
            continue
        stages = record.get("stages", [])
        own = [s["stage"] for s in stages if s["trained_by"] == run.name]
        rows.append(
            [
                run.name,
                record["status"],
                f"{record['wall_s']:.0f}",
                ", ".join(own) or NONE,
                record.get("reason", NONE),
            ]
        )
    return Section(
        "runs",
        "Runs",
        ["run", "state", "seconds", "stages that it trained itself", "reason"],
        rows,
        "Stages with the same settings, data, code and stages before them are trained once and used"
        " by all rows; seconds are what this run added.",
    )


def stale_table(found: Found) -> Section:
    """Results of other code or configs: told, never counted."""
    current = {record["code_sha256"] for record in found.results.values()}
    rows = [
        [
            str(record["run"]),
            str(record.get("status", "")),
            str(record.get("code_sha256", ""))[:12],
            "config or base model" if record.get("code_sha256") in current else "code or packages",
        ]
        for record in found.stale
    ]
    return Section(
        "stale",
        "Stale results, not counted",
        ["run", "state", "code", "what is other"],
        rows,
        "They belong to other code, package versions, configs or base models than the runs above.",
    )


def _finished(sweep: Sweep, results: Results) -> list[tuple[Row, Column]]:
    return [
        (row, column)
        for column in sweep.columns
        for row in sweep.rows
        if done_records(results, row.name, column.name)
    ]


def make_plots(sweep: Sweep, results: Results) -> tuple[list[Curve], list[Curve]]:
    """(accuracy by row in every column; the gain of PoRo over depth and training curves by row)."""
    overviews = [
        plot_rows(sweep, column, results)
        for column in sweep.columns
        if any(done_records(results, row.name, column.name) for row in sweep.rows)
    ]
    plots = []
    for claim in sweep.claims:
        if claim.grows and (plot := plot_gain(sweep, claim, results)):
            plots.append(plot)
    for column in sweep.columns:
        plots += plot_training(sweep, column, results)
    return overviews, plots


def plot_rows(sweep: Sweep, column: Column, results: Results) -> Curve:
    """Three markers a row: without policy, in context, changed policy."""
    figure = Figure(figsize=(7.2, 1.1 + 0.5 * len(sweep.rows)), layout="constrained")
    axes = figure.subplots()
    said = []
    for number, (suite, words) in enumerate(SUITE_WORDS.items()):
        points = [
            (place + 0.22 * (number - 1), row.label, value)
            for place, row in enumerate(sweep.rows)
            if (value := cell(results, row.name, column.name, suite))
        ]
        if not points:
            continue
        means = [value.mean for _, _, value in points]
        reach = [
            [max(v.mean - v.low, 0) for _, _, v in points],
            [max(v.high - v.mean, 0) for _, _, v in points],
        ]
        places = [place for place, _, _ in points]
        axes.errorbar(
            means,
            places,
            xerr=reach,
            fmt="os^"[number],
            color=COLOURS[number],
            capsize=3,
            label=words,
        )
        said += [f"{label} {words} {value.mean:.1f} %" for _, label, value in points]
    labels = [row.label for row in sweep.rows]
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% (bars: 95 % intervals)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, ncols=3, loc="outside upper left")
    return Curve(f"{column.label}: accuracy by method", svg_address(figure), "; ".join(said))


def plot_gain(sweep: Sweep, claim: Claim, results: Results) -> Curve | None:
    """The difference of a claim's rows against depth, a line a variant; None = one depth only."""
    variants: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for column in sweep.columns:
        value, _, _ = difference(results, claim, column.name)
        if value is not None and column.depth:
            variants.setdefault(column.paper[:2], []).append((column.depth, value))
    if sum(map(len, variants.values())) < 1:
        return None
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.subplots()
    said = []
    for number, ((_, variant), points) in enumerate(variants.items()):
        depths = [depth for depth, _ in points]
        means = [value.mean for _, value in points]
        reach = [[v.mean - v.low for _, v in points], [v.high - v.mean for _, v in points]]
        axes.errorbar(
            depths, means, yerr=reach, fmt="o-", color=COLOURS[number], capsize=3, label=variant
        )
        said += [f"{variant} depth {d}: {v.signed}" for d, v in points]
    axes.axhline(0, color="#57606a", linewidth=1)
    axes.set_xticks(sorted({column.depth for column in sweep.columns if column.depth}))
    axes.set_xlabel("depth of the policies")
    axes.set_ylabel("points [95 %]")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return Curve(f"{claim.text}: gain against depth", svg_address(figure), "; ".join(said))


TRAINING = (
    ("rl", "rollouts/accuracy_free", "accuracy of policy-free rollouts", "share of right answers"),
    (
        "rl",
        "rollouts/accuracy_aware",
        "accuracy of policy-aware rollouts",
        "share of right answers",
    ),
    ("vm_cpt", "train/loss", "loss of VM-CPT", "nats per target token"),
    ("cot_sft", "train/loss", "loss of CoT SFT", "nats per target token"),
)


def plot_training(sweep: Sweep, column: Column, results: Results) -> list[Curve]:
    """Curves of the stages, means over seeds, a line a row; rows that share a stage share one."""
    plots = []
    for stage, metric, title, unit in TRAINING:
        lines, seen = [], set()
        for row in sweep.rows:
            found = []
            for record in done_records(results, row.name, column.name):
                for one in record["stages"]:
                    if one["stage"].partition("_")[2] == stage and metric in one["curves"]:
                        found.append((one["key"], one["curves"][metric]))
            keys = tuple(key for key, _ in found)
            if found and keys not in seen:
                seen.add(keys)
                colour = COLOURS[len(lines) % len(COLOURS)]
                style = "-" if len(lines) < len(COLOURS) else "--"
                lines.append((row.label, _mean_curve([c for _, c in found]), colour, style))
        if lines:
            plots.append(plot_lines(f"{column.label}: {title}", unit, lines))
    return plots


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[int, float]]:
    values: dict[int, list[float]] = collections.defaultdict(list)
    for curve in curves:
        for step, value in curve:
            values[int(step)].append(value)
    full = max(map(len, values.values()))  # runs that ended early do not bend the mean
    return [(s, statistics.fmean(v)) for s, v in sorted(values.items()) if len(v) == full]


def markdown(sweep: Sweep, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The tables as Markdown."""
    parts = [f"# {_plain(sweep.name)}", ""]
    parts += [f"- {name}: {_plain(text)}" for name, text in facts.items()]
    for section in sections:
        parts += ["", f"## {_plain(section.title)}", ""]
        parts.append("| " + " | ".join(map(_plain, section.headers)) + " |")
        parts.append("|---" * len(section.headers) + "|")
        parts += ["| " + " | ".join(map(_plain, row)) + " |" for row in section.rows]
        if section.note:
            parts += ["", section.note]
    return "\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
