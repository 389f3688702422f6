"""The gallery of a report: questions with pictures, every model's answers, what went wrong.

In: runs with their records, and the test split of each workdir. Out: plain dicts for the template,
which escapes every text. Wrong answers are preferred: what the last models got right fills up.

Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from data_pipelines.example import IMAGE_FORMATS, Example, decode_image
from data_pipelines.streaming import iter_split
from trimpi_jax.io.curves import data_address
from trimpi_jax.io.results import VIEWS, RunResults

SIDE_PX = 640  # the longer side of a picture in the page
KEPT_BYTES = 60_000  # smaller files go into the page as they are
PROBLEMS = {
    "cut_off": "cut off at the length limit",
    "no_think": "no reasoning block",
    "repeated_think": "more than one reasoning block",
    "no_box": "no boxed answer",
    "text_around": "text around the boxed answer",
    "prompt_too_long": "prompt fits no bucket, not asked",
}


def make_gallery(runs: Sequence[RunResults], size: int) -> list[dict[str, Any]]:
    """At most `size` questions a run; runs with the same questions share them."""
    questions: dict[tuple[str, ...], dict[str, Any]] = {}
    wanted = [choose_questions(run, size) for run in runs]
    everything = set().union(*wanted)
    for run in runs:
        if not size or not (run.data / "manifest.json").is_file():
            continue  # results may outlive their data
        found = [e for e in iter_split(run.data, "test") if e.example_id in everything]
        answers = index_answers(run, {example.example_id for example in found})
        for example in found:
            # runs may have other questions under the same name
            key = (example.example_id, example.query, example.answer, example.policy_text)
            if key not in questions:
                questions[key] = show_question(example)
            shown = [show_answer(example, *answer) for answer in answers[example.example_id]]
            questions[key]["answers"].extend(shown)
    return [question for question in questions.values() if question["answers"]]


def choose_questions(run: RunResults, size: int) -> set[str]:
    """Ids of questions to show: half wrong, half right by the last model, spread over the split."""
    for view, _, _ in VIEWS:
        if records := run.models[-1].records.get(view):
            wrong = [record["example_id"] for record in records if record["accuracy"] < 1.0]
            right = [record["example_id"] for record in records if record["accuracy"] == 1.0]
            num_wrong = min(len(wrong), max(size - len(right), (size + 1) // 2))
            return set(_spread(wrong, num_wrong)) | set(_spread(right, size - num_wrong))
    return set()


def index_answers(run: RunResults, names: set[str]) -> dict[str, list[tuple[str, bool, str, dict]]]:
    """Per question: (model, whether it is the run's last, view, record) in the order of the run."""
    found: dict[str, list[tuple[str, bool, str, dict]]] = {name: [] for name in names}
    for model in run.models:
        causes = {
            record["example_id"]: record["anatomy"]["cause"]
            for record in model.suites.get("anatomy", {}).get("records", [])
        }
        for view, words, _ in VIEWS:
            for record in model.records.get(view, []):
                if record["example_id"] not in names:
                    continue
                if view == "policy_free" and record["example_id"] in causes:
                    record = record | {"cause": causes[record["example_id"]]}
                last = model is run.models[-1]
                found[record["example_id"]].append((run.title(model), last, words, record))
    return found


def show_question(example: Example) -> dict[str, Any]:
    """A question without answers."""
    return {
        "id": example.example_id,
        "policy": example.policy_name,
        "images": [
            {
                "address": picture_address(encoded, example.example_id),
                "text": f"Picture {number} of {len(example.images)}"
                f" of test question {example.example_id}",
            }
            for number, encoded in enumerate(example.images, start=1)
        ],
        "query": example.query,
        "answer": example.answer,
        "gold": example.meta.get("gold_cot") or example.cot,
        "answers": [],
    }


def show_answer(
    example: Example, model: str, last: bool, view: str, record: dict[str, Any]
) -> dict[str, Any]:
    """What one model said in one view."""
    gold = example.meta.get("gold_cot") or example.cot
    wrong = record["accuracy"] < 1.0
    return {
        "model": model,
        "last": last,
        "view": view,
        "verdict": _verdict(record["accuracy"]),
        "kind": what_went_wrong(record),
        "parsed": record.get("parsed") or "",
        "completion": record["completion"],
        "departure": first_departure(record["completion"], gold) if wrong else None,
        "details": _details(record),
    }


def what_went_wrong(record: dict[str, Any]) -> str:
    """One short phrase; "" for a right and well-formed answer."""
    if record["format"] != "ok":
        return PROBLEMS.get(record["format"], str(record["format"]))
    cause = record.get("cause", "")  # of the error anatomy, where it was run
    if cause and cause != "right":
        return str(cause).replace("_", " ")
    if problem := record.get("details", {}).get("problem"):
        return str(problem)
    return "" if record["accuracy"] == 1.0 else "wrong answer"


def first_departure(completion: str, gold: str) -> dict[str, Any] | None:
    """The first line of the reasoning that is not the gold one's: where to start to look."""
    thought = re.search(r"<think>(.*?)(?:</think>|$)", completion, re.S)
    if not gold.strip() or not thought:
        return None
    said = [line.strip() for line in thought[1].strip().splitlines()]
    wanted = [line.strip() for line in gold.strip().splitlines()]
    for number in range(max(len(said), len(wanted))):
        one = said[number] if number < len(said) else "(nothing)"
        other = wanted[number] if number < len(wanted) else "(nothing)"
        if one != other:
            return {"line": number + 1, "said": one, "gold": other}
    return None


def count_problems(runs: Sequence[RunResults]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of how often what went wrong, per model, without / with the policy."""
    columns = [(run, model) for run in runs for model in run.models]
    counts: dict[str, list[list[int]]] = {}
    for place, (run, model) in enumerate(columns):
        names = {r["example_id"] for records in model.records.values() for r in records}
        alone = dataclasses.replace(run, models=[model])
        for answers in index_answers(alone, names).values():
            for _, _, words, record in answers:
                if kind := what_went_wrong(record):
                    row = counts.setdefault(kind, [[0, 0] for _ in columns])
                    row[place][[words for _, words, _ in VIEWS].index(words)] += 1
    ordered = sorted(counts.items(), key=lambda item: -sum(map(sum, item[1])))
    rows = [[kind, *(f"{free} / {aware}" for free, aware in row)] for kind, row in ordered]
    return ["what went wrong", *(run.title(model) for run, model in columns)], rows


def picture_address(encoded: bytes, where: str) -> str:
    """A picture as a data address; large ones become smaller JPEGs."""
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        kind = Image.MIME.get(image.format or "", "")
    if len(encoded) <= KEPT_BYTES and kind in ("image/png", "image/jpeg", "image/webp"):
        return data_address(encoded, kind)
    small = Image.fromarray(decode_image(encoded, where))
    small.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=88)
    return data_address(buffer.getvalue(), "image/jpeg")


def options_of(questions: Iterable[dict[str, Any]], name: str) -> list[str]:
    """The values that answers have under a name, for a filter; in order of appearance."""
    answers = (answer for question in questions for answer in question["answers"])
    return [value for value in dict.fromkeys(answer[name] for answer in answers) if value]


def _verdict(accuracy: float) -> str:
    if accuracy == 1.0:
        return "right"
    return "partly right" if accuracy > 0 else "wrong"


def _details(record: dict[str, Any]) -> str:
    """The grader's sub-scores as one line."""
    numbers = record.get("details", {}).items()
    return ", ".join(
        f"{name} {value:.2f}"
        for name, value in numbers
        if isinstance(value, int | float) and not isinstance(value, bool)
    )


def _spread(names: Sequence[str], count: int) -> list[str]:
    count = min(count, len(names))
    return [names[i * len(names) // count] for i in range(count)]
