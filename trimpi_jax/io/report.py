"""The result table of a run, and one self-contained HTML page of one or several runs.

The page works offline: pictures and plots are inside it, every text is escaped, and its own content
security policy forbids all requests and every script but its own.

In: workdirs as `stages.pipeline` leaves them. Out: a rich table, report.html.

Source: jinja2 (autoescape).
Next: trimpi_jax/train.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from data_pipelines.shards import read_manifest
from trimpi_jax.io.curves import make_curves, make_overview
from trimpi_jax.io.gallery import count_problems, make_gallery, options_of
from trimpi_jax.io.paper_figures import FIGURES, IN_CONTEXT, method_of, task_of
from trimpi_jax.io.results import (
    HEADERS,
    RunResults,
    accuracy_text,
    compare_records,
    comparison_text,
    load_run,
    load_runs,
    result_rows,
    suite_rows,
)

GALLERY = 48  # questions a run; a picture of 168 x 112 px is about 30 kB in the page


def result_table(workdir: Path) -> Table:
    """The table for the terminal."""
    table = Table(title="Unseen images, greedy decoding")
    for number, header in enumerate(HEADERS):
        table.add_column(header, justify="left" if number == 0 else "right")
    for row in result_rows(load_run(workdir)):
        table.add_row(*row)
    return table


def write_report(workdirs: Sequence[Path], path: Path, *, gallery: int = GALLERY) -> None:
    """Write the page; the file appears complete or not at all.

    Args:
        workdirs: of the runs, side by side in this order.
        path: of the page.
        gallery: questions to show a run, 0 = none.

    Raises:
        ValueError, OSError: a folder is no evaluated run, or the page cannot be written.
    """
    if gallery < 0:
        raise ValueError(f"gallery must be >= 0, got {gallery}")
    page = render_page(load_runs(workdirs), gallery)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, path)


def render_page(runs: Sequence[RunResults], gallery: int) -> str:
    """The page as text."""
    questions = make_gallery(runs, gallery)
    js = _own_source("report.js")
    return render_template(
        "report.html.jinja",
        title=", ".join(dict.fromkeys(run.name for run in runs)),
        js=js,
        js_hash=_source_hash(js),
        runs=[about_run(run) for run in runs],
        results=results_section(runs),
        overview=make_overview(runs),
        paper=paper_section(runs),
        curves=make_curves(runs),
        suites=suite_rows(runs),
        problems=count_problems(runs),
        questions=questions,
        filters={name: options_of(questions, name) for name in ("model", "view", "verdict", "kind")}
        | {"policy": list(dict.fromkeys(q["policy"] for q in questions if q["policy"]))},
    )


def render_template(name: str, **values: Any) -> str:
    """A page from a template of this folder; it gets the style and its digest, too."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = _own_source("report.css")
    return environment.get_template(name).render(css=css, css_hash=_source_hash(css), **values)


def about_run(run: RunResults) -> dict[str, Any]:
    """What a run is: facts in a few words, and its whole config."""
    config, data = run.config, run.config.get("data", {})
    try:
        splits = read_manifest(run.data)["splits"]
        examples = ", ".join(f"{name} {split['count']:,}" for name, split in splits.items())
    except (ValueError, OSError, KeyError) as error:
        examples = f"unknown ({error})"
    facts = {
        "run": f"{run.mark} {run.name}".strip(),
        "folder": run.workdir.name,
        "method": config.get("method", ""),
        "base model": config.get("model_dir", "unknown"),
        "dataset": " ".join(
            str(part) for part in (data.get("dataset", "unknown"), data.get("variant", "")) if part
        ),
        "policies": _policies_text(data),
        "examples": examples,
        "seed": config.get("seed", "unknown"),
    }
    return {
        "facts": {name: str(value) for name, value in facts.items() if value != ""},
        "config": json.dumps(config, indent=1, sort_keys=True),
        "name": f"{run.mark} {run.name}".strip(),
    }


RESULT_HEADERS = (*HEADERS[:3], "against the base with the policy in context", *HEADERS[3:])


def results_section(runs: Sequence[RunResults]) -> dict[str, Any]:
    """The main table: the terminal's, and each model against the baseline of its run."""
    rows = []
    for run in runs:
        baseline = run.models[0].records.get("policy_aware", [])
        for model, cells in zip(run.models, result_rows(run), strict=True):
            compared = compare_records(baseline, model.records.get("policy_free", []))
            cells = [*cells[:3], comparison_text(compared), *cells[3:]]
            # brackets on a line of their own: columns stay narrow, numbers whole
            rows.append(
                [re.sub(r" (?=[\[(])", "\n", cell) if at else cell for at, cell in enumerate(cells)]
            )
    return {"headers": list(RESULT_HEADERS), "rows": rows}


def paper_section(runs: Sequence[RunResults]) -> dict[str, Any] | None:
    """Rows of runs whose task the paper has, beside its figures; None = there are none."""
    rows, sizes = [], {}
    for run in runs:
        figures = FIGURES.get(task_of(run.config), {})
        rl = run.config.get("rl", {})
        for number, model in enumerate(run.models):
            stages = tuple(name.stage.partition("_")[2] for name in run.models[1 : number + 1])
            paper = figures.get(method_of(stages, rl))
            if not paper:
                continue
            view = "policy_aware" if not stages else "policy_free"
            sizes |= dict.fromkeys(paper)
            label = f"{run.mark} {IN_CONTEXT}".strip() if not stages else run.title(model)
            rows.append((label, accuracy_text(model.summaries.get(view)), paper))
    if not rows:
        return None
    return {
        "headers": ["method", "here, %", *(f"paper, {size}, %" for size in sizes)],
        "rows": [
            [label, ours, *(f"{paper[size]:.2f}" if size in paper else "–" for size in sizes)]
            for label, ours, paper in rows
        ],
    }


def _policies_text(data: dict[str, Any]) -> str:
    if "policies" not in data:
        return ""
    depth = f" of depth {data['depth']}" if "depth" in data else ""
    return f"{data['policies']}{depth}"


def _own_source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _source_hash(source: str) -> str:
    """As a content security policy names a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
