r"""What an answer scores in each form that a user's own policy can ask for.

    choice     1 when it is the gold choice
    number     1 when |x - gold| <= max(tolerance, relative_tolerance * |gold|)
    regex      1 when the whole answer matches the pattern
    tool_call  0.5 * (right tool) + 0.5 * mean over the arguments, by the metrics of tool_calls.py
    python     what the user's function says, in [0, 1]; 0 when it raises, hangs or says NaN

`details` of the Grade keeps the sub-scores and, in `problem`, why an answer could not be read
("no_number", "no_choice", ...), so that the reason is a metric.

Source: paper section 3 (the weights of a tool call); the forms are this project's.
Next: trimpi_jax/grading/grader.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.answer_forms import (
    Choice,
    FieldMetric,
    Number,
    Pattern,
    Python,
    matches,
    normalize,
    parse_choice,
    parse_form,
    parse_number,
)
from data_pipelines.example import Example
from data_pipelines.own_policy.user_function import call_user_function
from trimpi_jax.grading.answers import GRADER_ERROR, Grade, find_boxes, format_reason
from trimpi_jax.grading.text_similarity import DEFAULT_ENCODER, bert_scores, load_encoder
from trimpi_jax.grading.tool_calls import (
    ARGUMENT_WEIGHT,
    FIELD_SCORERS,
    TOOL_WEIGHT,
    parse_call,
)

Score = tuple[float, dict[str, Any]]  # accuracy in [0, 1], details


def score_choice(answer: str, gold: str, form: Choice) -> Score:
    """1 when both are the same choice."""
    chosen = parse_choice(answer, form)
    if chosen is None:
        return 0.0, {"problem": "no_choice"}
    return float(chosen == parse_choice(gold, form)), {}


def score_number(answer: str, gold: str, form: Number) -> Score:
    """1 when within the tolerance; `error` is the absolute difference."""
    found, expected = parse_number(answer, form.unit), parse_number(gold, form.unit)
    if expected is None:
        raise ValueError(f"the gold answer '{gold}' is no number; rebuild the dataset")
    if found is None:
        return 0.0, {"problem": "no_number"}
    error = abs(found - expected)
    allowed = max(form.tolerance, form.relative_tolerance * abs(expected))
    # 12.1 is within 0.1 of 12: decimal fractions are not exact in binary
    slack = 1e-9 * max(abs(found), abs(expected), 1.0)
    return float(error <= allowed + slack), {"error": error}


def score_pattern(answer: str, gold: str, form: Pattern) -> Score:
    """1 when the whole answer matches."""
    found = matches(form.pattern, answer, gold)
    return (0.0, {"problem": "pattern_timeout"}) if found is None else (float(found), {})


def grade_own_calls(
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    needs_think: bool,
) -> list[Grade]:
    """Grades of tool calls: half for the tool's name, half for the mean over the arguments.

    Each argument has the metric that the gold call's tool gives it. Arguments are those of the gold
    call and of the given one: a missing and a needless one score 0.
    """
    answers = [boxed_answer(text) for text in texts]
    forms = [parse_form(example.meta["answer_form"]) for example in examples]
    calls = [parse_call(answer) for answer in answers]
    golds = [parse_call(example.answer)[0] for example in examples]
    fields: list[dict[str, float]] = []
    # encoder -> (call, field, (said, gold)): all texts of a batch are compared at once
    compared: dict[str, list[tuple[int, str, tuple[str, str]]]] = {}
    for i, ((call, _), gold, form) in enumerate(zip(calls, golds, forms, strict=True)):
        if gold is None:
            raise ValueError(f"a gold answer is no tool call: {examples[i].answer[:200]}")
        metrics = form.tools[gold[0]]
        given = call[1] if call else {}
        scores: dict[str, float] = {}
        for name in dict.fromkeys((*gold[1], *given)):
            scores[name] = 0.0
            if name not in given or name not in gold[1]:
                continue
            found, wanted = given[name], gold[1][name]
            if (
                metrics[name].metric == "text"
                and isinstance(found, str)
                and isinstance(wanted, str)
            ):
                encoder = form.text_encoder or DEFAULT_ENCODER
                compared.setdefault(encoder, []).append((i, name, (found, wanted)))
            else:
                scores[name] = score_argument(found, wanted, metrics[name])
        fields.append(scores)
    encoders = [""] * len(texts)
    for model, places in compared.items():
        encoder = load_encoder(model)
        similarities = bert_scores([pair for _, _, pair in places], encoder)
        for (i, name, _), similarity in zip(places, similarities, strict=True):
            fields[i][name], encoders[i] = similarity, encoder.name
    grades = []
    for i, (call, reason) in enumerate(calls):
        gold = golds[i]
        assert gold is not None
        tool = float(call is not None and call[0] == gold[0])
        scores = fields[i]
        # a call without arguments: nothing can be wrong with them once the tool is right
        arguments = sum(scores.values()) / len(scores) if scores else tool
        details = {
            "tool": tool,
            "arguments": arguments,
            "fields": scores,
            "call": reason,
            "text_encoder": encoders[i],
        } | ({"problem": reason} if call is None else {})
        accuracy = TOOL_WEIGHT * tool + ARGUMENT_WEIGHT * arguments
        grades.append(
            _grade(texts[i], bool(stopped[i]), needs_think, answers[i], accuracy, details)
        )
    return grades


def score_argument(found: Any, gold: Any, metric: FieldMetric) -> float:
    """One argument of a tool call, in [0, 1]."""
    if metric.metric == "number":
        one, other = _as_number(found), _as_number(gold)
        if one is None or other is None:
            return 0.0
        return float(abs(one - other) <= metric.tolerance + 1e-9 * max(abs(one), abs(other), 1.0))
    return FIELD_SCORERS[metric.metric](found, gold)


def grade_form(
    score: Callable[[str, str, Any], Score],
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    needs_think: bool,
) -> list[Grade]:
    """Grades of completions whose boxed answer is scored by `score(answer, gold, form)`."""
    grades = []
    for text, example, ended in zip(texts, examples, stopped, strict=True):
        answer = boxed_answer(text)
        form = parse_form(example.meta["answer_form"])
        accuracy, details = (
            (0.0, {"problem": "no_box"}) if answer is None else score(answer, example.answer, form)
        )
        grades.append(_grade(text, bool(ended), needs_think, answer, accuracy, details))
    return grades


def grade_python(
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    needs_think: bool,
) -> list[Grade]:
    """Grades by the user's function; what raises, hangs or says NaN scores 0 and is counted.

    Raises:
        ValueError: the function's file is gone, was changed, or cannot be imported.
    """
    answers = [boxed_answer(text) for text in texts]
    by_file: dict[Python, list[int]] = {}
    for i, example in enumerate(examples):
        if answers[i] is not None:  # without a box there is nothing to ask about
            by_file.setdefault(parse_form(example.meta["answer_form"]), []).append(i)
    scored: dict[int, Score] = {}
    for form, places in by_file.items():
        calls = [
            {
                "answer": answers[i],
                "gold": examples[i].answer,
                "example": examples[i].meta.get("facts", {}),
            }
            for i in places
        ]
        verdicts = call_user_function(
            form.file, form.function, form.time_limit_s, calls, sha256=form.sha256
        )
        for i, verdict in zip(places, verdicts, strict=True):
            problem = {"problem": "function_error", GRADER_ERROR: verdict.error}
            scored[i] = verdict.score, verdict.details | (problem if verdict.error else {})
    return [
        _grade(
            text,
            bool(stopped[i]),
            needs_think,
            answers[i],
            *scored.get(i, (0.0, {"problem": "no_box"})),
        )
        for i, text in enumerate(texts)
    ]


def boxed_answer(text: str) -> str | None:
    """The last boxed answer, spaces collapsed; None = there is none."""
    boxes = find_boxes(text)
    return normalize(boxes[-1][1]) if boxes else None


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        return parse_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def _grade(text, ended, needs_think, answer, accuracy, details) -> Grade:
    reason = format_reason(text, stopped=ended, needs_think=needs_think)
    return Grade(accuracy, float(reason == "ok"), answer, reason, details)
