r"""Grade a tool call: tool accuracy, argument scores by field type, overall.

    gold   {"name": "DrawBox", "arguments": {"image": "a.jpg", "bbox": "(0, 0, 10, 10)"}}
    said   {"name": "DrawBox", "arguments": {"image": "a.jpg", "bbox": "(0, 0, 10, 5)"}}
    tool 1.0, image 1.0, bbox 0.5 -> arguments 0.75 -> overall 0.5 * 1.0 + 0.5 * 0.75 = 0.875

    exact        equal values of one type (texts without spaces at their ends)
    text         BERTScore, see trimpi_jax/grading/text_similarity.py
    expression   1 when both evaluate to the same number, by a safe arithmetic evaluator
    bbox         intersection over union; a malformed box scores 0

The argument score is the mean over all fields that the gold call or the said call has; a field that
one of them leaves out takes the tool's default, and scores 0 when there is none. Texts come from a
model: whatever they are, the result is a score and a reason, within milliseconds.

Source: paper section 3 (metrics; overall is the accuracy reward).
Next: trimpi_jax/grading/grader.py
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import simpleeval

from data_pipelines.example import Example
from trimpi_jax.grading.answers import Grade, find_boxes, format_reason
from trimpi_jax.grading.text_similarity import DEFAULT_ENCODER, bert_scores, load_encoder

TOOL_WEIGHT, ARGUMENT_WEIGHT = 0.5, 0.5  # paper section 3
RELATIVE_TOLERANCE = 1e-6  # two expressions have one value: ours, the paper gives none
MAX_EXPRESSION_CHARACTERS = 1000
MAX_NUMBER_BITS = 2048  # of a whole number inside an expression
CALL_REASONS = ("ok", "no_box", "no_json", "no_call")

_VERSION = re.compile(r"_v\d+$")
_MATH_PREFIX = re.compile(r"\bmath\s*\.\s*(?=[a-z])")  # GTA's Calculator offers the math module
_NUMBER = r"\s*([+-]?\d{1,9}(?:\.\d{0,9})?)\s*"
_BBOX = re.compile(rf"\s*\({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\)\s*")
_ABSENT: Any = object()


@dataclasses.dataclass(frozen=True)
class CallScore:
    """What a call is worth. `reason` is one of CALL_REASONS."""

    tool: float  # 1.0 = the name is right, version included
    arguments: float  # mean over fields
    fields: dict[str, float]
    reason: str
    text_encoder: str = ""  # what compared the texts; "" = there were none to compare

    @property
    def overall(self) -> float:
        """The accuracy reward."""
        return TOOL_WEIGHT * self.tool + ARGUMENT_WEIGHT * self.arguments


def grade_tool_calls(
    texts: Sequence[str],
    examples: Sequence[Example],
    stopped: Sequence[bool],
    needs_think: bool,
) -> list[Grade]:
    """Grades of completions whose boxed answer is a tool call.

    `details` has the sub-scores: `tool`, `arguments`, the mean over the fields of each kind
    (`exact`, `text`, `expression`, `bbox`; those that occur), every field in `fields`, the encoder
    that compared texts, and in `problem` why no call could be read.
    """
    said = [boxes[-1][1] if (boxes := find_boxes(text)) else None for text in texts]
    forms = [example.meta.get("answer_form", {}) for example in examples]
    scores = score_calls(said, [example.answer for example in examples], forms)
    grades = []
    for text, answer, ended, form, score in zip(texts, said, stopped, forms, scores, strict=True):
        reason = format_reason(text, stopped=bool(ended), needs_think=needs_think)
        by_kind: dict[str, list[float]] = {}
        for name, value in score.fields.items():
            by_kind.setdefault(form.get("fields", {}).get(name, "exact"), []).append(value)
        details: dict[str, Any] = {
            "tool": score.tool,
            "arguments": score.arguments,
            **{kind: _mean(values) for kind, values in sorted(by_kind.items())},
            "fields": score.fields,
        }
        if score.text_encoder:
            details["text_encoder"] = score.text_encoder
        if score.reason != "ok":
            details["problem"] = score.reason
        parsed = None if answer is None else answer.strip()
        grades.append(Grade(score.overall, float(reason == "ok"), parsed, reason, details))
    return grades


def score_calls(
    said: Sequence[str | None], gold: Sequence[str], forms: Sequence[Mapping[str, Any]]
) -> list[CallScore]:
    """Scores of said calls (JSON texts; None = nothing was boxed) against gold calls.

    A form may have `fields` (argument -> exact, text, expression or bbox; exact when absent),
    `defaults` (tool without version -> argument -> value), `text_encoder`, `text_layer` and
    `text_baseline`.

    Raises:
        ValueError: a gold call that is none, or a field kind that does not exist: broken data.
    """
    fields: list[dict[str, float]] = []
    tools: list[float] = []
    reasons: list[str] = []
    texts: dict[tuple, list[tuple[int, str, str, str]]] = {}  # encoder -> (call, field, said, gold)
    for i, (text, gold_text, form) in enumerate(zip(said, gold, forms, strict=True)):
        wanted, why = parse_call(gold_text)
        if wanted is None:
            raise ValueError(f"a gold answer is no tool call ({why}): {gold_text[:200]}")
        call, reason = parse_call(text)
        name, arguments = call if call else ("", {})
        reasons.append(reason)
        tools.append(float(name == wanted[0]))
        defaults = form.get("defaults", {}).get(_VERSION.sub("", wanted[0]), {})
        scores: dict[str, float] = {}
        for field in dict.fromkeys((*wanted[1], *arguments)):
            expected = wanted[1].get(field, defaults.get(field, _ABSENT))
            given = arguments.get(field, defaults.get(field, _ABSENT) if call else _ABSENT)
            kind = form.get("fields", {}).get(field, "exact")
            if expected is _ABSENT or given is _ABSENT:
                scores[field] = 0.0
            elif kind == "text" and isinstance(given, str) and isinstance(expected, str):
                scores[field] = 0.0  # filled in below, all texts at once
                encoder = (
                    form.get("text_encoder", DEFAULT_ENCODER),
                    form.get("text_layer"),
                    float(form.get("text_baseline", 0.0)),
                )
                texts.setdefault(encoder, []).append((i, field, given, expected))
            else:
                scores[field] = _scorer(kind)(given, expected)
        fields.append(scores)
    encoders = [""] * len(said)
    for (model, layer, baseline), places in texts.items():
        pairs = [(given, expected) for _, _, given, expected in places]
        encoder = load_encoder(model, layer)
        found = bert_scores(pairs, encoder, baseline=baseline)
        for (i, field, _, _), score in zip(places, found, strict=True):
            fields[i][field] = score
            encoders[i] = encoder.name + (f", baseline {baseline:g}" if baseline else "")
    return [
        CallScore(tool, _argument_score(scores, reason), scores, reason, encoder)
        for tool, scores, reason, encoder in zip(tools, fields, reasons, encoders, strict=True)
    ]


def _argument_score(fields: Mapping[str, float], reason: str) -> float:
    """Mean over fields; a call without any argument to give is right, no call is wrong."""
    if reason != "ok":
        return 0.0
    return _mean(list(fields.values())) if fields else 1.0


def parse_call(text: str | None) -> tuple[tuple[str, dict[str, Any]] | None, str]:
    """(name, arguments) of a JSON tool call, or None; and one of CALL_REASONS."""
    if text is None:
        return None, "no_box"
    try:
        call = json.loads(text, strict=False)  # line ends inside strings are forgiven
    except (ValueError, RecursionError):
        return None, "no_json"
    if not isinstance(call, dict):
        return None, "no_call"
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None, "no_call"
    return (name, arguments), "ok"


def exact_score(given: Any, expected: Any) -> float:
    """1 when type and value agree; texts are compared without the spaces at their ends."""
    if isinstance(given, str) and isinstance(expected, str):
        return float(given.strip() == expected.strip())
    return float(type(given) is type(expected) and given == expected)


def expression_score(given: Any, expected: Any) -> float:
    """1 when both texts evaluate to one number."""
    if not isinstance(given, str) or not isinstance(expected, str):
        return 0.0
    if given.strip() == expected.strip():
        return 1.0
    a, b = evaluate_expression(given), evaluate_expression(expected)
    if a is None or b is None:
        return 0.0
    return float(math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12))


def bbox_score(given: Any, expected: Any) -> float:
    """Intersection over union of two boxes `(x1, y1, x2, y2)`; malformed boxes score 0."""
    a, b = parse_bbox(given), parse_bbox(expected)
    if a is None or b is None:
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def parse_bbox(text: Any) -> tuple[float, float, float, float] | None:
    """Four numbers in `(x1, y1, x2, y2)` with x1 < x2 and y1 < y2, or None."""
    found = _BBOX.fullmatch(text) if isinstance(text, str) else None
    if not found:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def evaluate_expression(text: str) -> float | None:
    """The number of an arithmetic expression in Python's notation, or None.

    Numbers, + - * / // % **, brackets, lists, and functions and constants of `math`. Everything
    else is refused: attributes, comparisons, comprehensions, lambdas, texts, whole numbers of more
    than MAX_NUMBER_BITS bits.
    """
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as for "1(2)"
            tree = ast.parse(_MATH_PREFIX.sub("", text.strip()), mode="eval")
        value = float(_check_number(_make_evaluator().eval(text, previously_parsed=tree.body)))
    except _REFUSED:
        return None
    return value if math.isfinite(value) else None


_REFUSED = (
    simpleeval.InvalidExpression,
    SyntaxError,
    ArithmeticError,
    ValueError,
    TypeError,
    RecursionError,
    MemoryError,
)


def _make_evaluator() -> simpleeval.SimpleEval:
    """simpleeval with nothing but arithmetic: the node types not listed here do not exist."""
    evaluator = simpleeval.SimpleEval(
        operators=_OPERATORS, functions=dict(_FUNCTIONS), names=dict(_CONSTANTS)
    )
    nodes: dict[type[ast.AST], Any] = {
        kind: evaluator.nodes[kind]
        for kind in (ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant)
    }
    nodes[ast.List] = nodes[ast.Tuple] = lambda node: [evaluator._eval(e) for e in node.elts]
    evaluator.nodes = nodes
    return evaluator


def _bounded(operate: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on real numbers of bounded size."""

    def checked(*operands: Any) -> Any:
        for operand in operands:
            _check_number(operand)
        return _check_number(operate(*operands))

    return checked


def _check_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise ValueError("too large")
    return value


def _power(base: Any, exponent: Any) -> Any:
    """`base ** exponent`, refused before it is computed when the result would be too large."""
    if abs(base) > 1 and exponent * math.log2(abs(base)) > MAX_NUMBER_BITS:
        raise ValueError("too large")
    return base**exponent


def _small(function: Callable[..., int]) -> Callable[..., int]:
    """A function of whole numbers that grows fast, for arguments up to 170."""

    def checked(*numbers: Any) -> int:
        if any(abs(number) > 170 for number in numbers):
            raise ValueError("too large")
        return function(*numbers)

    return checked


def _of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """min, max and sum over numbers or one list of them."""

    def checked(*given: Any) -> Any:
        numbers = given[0] if len(given) == 1 and isinstance(given[0], list) else list(given)
        return function([_check_number(number) for number in numbers])

    return checked


_OPERATORS = {
    ast.Add: _bounded(operator.add),
    ast.Sub: _bounded(operator.sub),
    ast.Mult: _bounded(operator.mul),
    ast.Div: _bounded(operator.truediv),
    ast.FloorDiv: _bounded(operator.floordiv),
    ast.Mod: _bounded(operator.mod),
    ast.Pow: _bounded(_power),
    ast.UAdd: _bounded(operator.pos),
    ast.USub: _bounded(operator.neg),
}
_FUNCTIONS = {
    **{
        name: _bounded(getattr(math, name))
        for name in (
            "sqrt cbrt exp log log2 log10 floor ceil trunc fabs hypot degrees radians gcd lcm"
            " sin cos tan asin acos atan atan2 sinh cosh tanh"
        ).split()
    },
    **{name: _bounded(_small(getattr(math, name))) for name in ("factorial", "comb", "perm")},
    **{
        name: _of_numbers(function) for name, function in (("min", min), ("max", max), ("sum", sum))
    },
    "abs": _bounded(abs),
    "round": _bounded(round),
    "pow": _bounded(_power),
    "int": _bounded(int),
    "float": _bounded(float),
    "len": len,
}
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}


def _scorer(kind: str) -> Callable[[Any, Any], float]:
    if kind not in FIELD_SCORERS:
        raise ValueError(f"unknown field kind {kind!r}; there are {sorted(FIELD_SCORERS)}")
    return FIELD_SCORERS[kind]


FIELD_SCORERS: Mapping[str, Callable[[Any, Any], float]] = {
    "exact": exact_score,
    "text": exact_score,  # values that are no texts, such as an annotation that is null
    "expression": expression_score,
    "bbox": bbox_score,
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
