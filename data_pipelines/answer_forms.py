r"""The forms an answer can have: what `meta["answer_form"]` may say, and how each form is read.

    exact      Case 3                            the same text, spaces collapsed
    choice     Full refund                       one of a list
    number     12.50                             a number within a tolerance
    regex      RMA-0412                          what a pattern accepts
    tool_call  {"name": ..., "arguments": ...}   a JSON call, each argument with a metric of its own
    python     anything                          what a function of the user says it is worth

Here is what a form is and how its text is parsed; what an answer scores is said in
trimpi_jax/grading/answer_forms.py alone. A gold answer is checked with the same parsers that read
the model's answers, so a task cannot ask for an answer that its own grader would refuse.

Next: data_pipelines/own_policy/task.py
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

PATTERN_TIME_S = 0.5  # a pattern that backtracks for ever is stopped; matches take microseconds
GOLD_MARK = "{answer}"  # in a pattern: the gold answer, escaped
MAX_NUMBER_LETTERS = 64  # longer ones are no amounts, and int("9" * 10000) is slow

_SPACES = re.compile(r"\s+")
_NUMBER = re.compile(
    r"(?P<sign>[-+−]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<part>\.\d*)?(?P<power>[eE][-+]?\d{1,3})?"
)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Exact(_Form):
    """The boxed answer equals the gold answer; case matters."""

    form: Literal["exact"] = "exact"


class Choice(_Form):
    """One of `choices`."""

    form: Literal["choice"] = "choice"
    choices: Annotated[list[str], Field(min_length=2)]
    ignore_case: bool = True

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[str]) -> list[str]:
        keys = [normalize(choice).casefold() for choice in choices]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"choices must differ by more than case and spaces; twice: {twice}")
        if "" in keys:
            raise ValueError("a choice is empty")
        return choices


class Number(_Form):
    """Right when |x - gold| <= max(tolerance, relative_tolerance * |gold|)."""

    form: Literal["number"] = "number"
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    relative_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unit: str = ""  # may stand before or after the number; "" = none is allowed


class Pattern(_Form):
    """Right when the whole answer matches `pattern`; `{answer}` in it stands for the gold answer.

    An example may bring a pattern of its own.
    """

    form: Literal["regex"] = "regex"
    pattern: str = GOLD_MARK

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        if problem := pattern_problem(pattern):
            raise ValueError(problem)
        return pattern


class FieldMetric(_Form):
    """How one argument of a tool call is compared."""

    metric: Literal["exact", "number", "text", "expression", "bbox"]
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # of metric "number" only

    @model_validator(mode="after")
    def _has_effect(self) -> FieldMetric:
        if self.tolerance and self.metric != "number":
            raise ValueError(f"tolerance has no effect on the metric '{self.metric}'")
        return self


class ToolCall(_Form):
    """A JSON object {"name", "arguments"}; `tools` says which arguments there are and their metric.

    An argument's metric is a name, or a table {metric = "number", tolerance = 0.5}.
    """

    form: Literal["tool_call"] = "tool_call"
    tools: Annotated[dict[str, dict[str, FieldMetric]], Field(min_length=1)]
    text_encoder: str = ""  # of the metric text: a name or a folder; "" = the default one

    @field_validator("tools", mode="before")
    @classmethod
    def _short_form(cls, tools: Any) -> Any:
        if not isinstance(tools, dict):
            return tools
        return {
            tool: {
                name: {"metric": metric} if isinstance(metric, str) else metric
                for name, metric in fields.items()
            }
            if isinstance(fields, dict)
            else fields
            for tool, fields in tools.items()
        }

    @model_validator(mode="after")
    def _has_effect(self) -> ToolCall:
        metrics = {field.metric for fields in self.tools.values() for field in fields.values()}
        if self.text_encoder and "text" not in metrics:
            raise ValueError("text_encoder has no effect: no argument has the metric text")
        return self


class Python(_Form):
    """`function(answer, gold, example) -> float` of a file in the task's folder.

    It runs in a process of its own: see own_policy/user_function.py.
    """

    form: Literal["python"] = "python"
    file: str
    function: str = "grade"
    time_limit_s: Annotated[float, Field(gt=0, le=600)] = 2.0
    sha256: str = ""  # filled in by the build: the function that was checked is the one that runs

    @field_validator("function")
    @classmethod
    def _is_name(cls, function: str) -> str:
        if not function.isidentifier():
            raise ValueError(f"'{function}' is no name of a function")
        return function


FORM_NAMES = ("exact", "choice", "number", "regex", "tool_call", "python")
AnswerForm = Annotated[
    Exact | Choice | Number | Pattern | ToolCall | Python, Field(discriminator="form")
]
_FORMS: TypeAdapter[Any] = TypeAdapter(AnswerForm)


def parse_form(settings: Mapping[str, Any]) -> Any:
    """The answer form of `meta["answer_form"]`.

    Raises:
        ValueError: it is none (pydantic's ValidationError, which lists every problem).
    """
    return _parse_form(json.dumps(settings, sort_keys=True))


@functools.lru_cache(maxsize=64)  # the same few dicts come with every Example
def _parse_form(settings: str) -> Any:
    return _FORMS.validate_json(settings)


def normalize(answer: str) -> str:
    """Spaces collapsed, ends stripped; case matters."""
    return _SPACES.sub(" ", answer).strip()


def parse_choice(text: str, form: Choice) -> str | None:
    """The choice that a text is, as the task spells it; None = it is none of them."""
    key = _choice_key(text, form)
    return next((choice for choice in form.choices if _choice_key(choice, form) == key), None)


def parse_number(text: str, unit: str = "") -> float | None:
    """The number that a text is; None = it is none.

    Thousands may be parted by commas, `unit` may stand before or after, a percent sign is a unit
    like any other.
    """
    text = normalize(text)
    if unit and text.startswith(unit):
        text = text[len(unit) :].strip()
    elif unit and text.endswith(unit):
        text = text[: -len(unit)].strip()
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_NUMBER_LETTERS else None
    if not match or not (match["whole"] or (match["part"] or ".") != "."):
        return None
    value = float(text.replace(",", "").replace("−", "-"))
    return value if abs(value) != float("inf") else None


def pattern_problem(pattern: str) -> str:
    """Why a pattern cannot be used; "" = it can."""
    try:
        regex.compile(pattern.replace(GOLD_MARK, "gold"), regex.V1)
    except regex.error as error:
        return f"the pattern does not compile: {error}"
    return ""


def matches(pattern: str, answer: str, gold: str) -> bool | None:
    """Whether the whole answer matches; None = the pattern ran out of time."""
    filled = pattern.replace(GOLD_MARK, regex.escape(normalize(gold), literal_spaces=True))
    try:
        return bool(regex.fullmatch(filled, normalize(answer), regex.V1, timeout=PATTERN_TIME_S))
    except TimeoutError:
        return None


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN, no key twice.

    Raises:
        ValueError: saying what is wrong with it.
    """

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON value")

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the keys {twice} stand twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError("no JSON: nested too deeply") from None


def gold_problem(gold: str, form: Any) -> str:
    """Why `gold` could never be graded as right; "" = it can. Runs no code of the user."""
    if isinstance(form, Choice) and parse_choice(gold, form) is None:
        return f"'{gold}' is none of the choices {form.choices}"
    if isinstance(form, Number) and parse_number(gold, form.unit) is None:
        unit = f" (unit '{form.unit}')" if form.unit else ""
        return f"'{gold}' is no number{unit}"
    if isinstance(form, Pattern):
        fits = matches(form.pattern, gold, gold)
        if fits is None:
            return f"the pattern {form.pattern!r} takes over {PATTERN_TIME_S} s on '{gold}'"
        return "" if fits else f"'{gold}' does not match its own pattern {form.pattern!r}"
    if isinstance(form, ToolCall):
        return _call_problem(gold, form)
    return ""


def _call_problem(gold: str, form: ToolCall) -> str:
    try:
        call = parse_json(gold)
    except ValueError as error:
        return str(error)
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return 'a tool call is {"name": ..., "arguments": {...}} and nothing else'
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return 'in a tool call "name" is a text and "arguments" an object'
    if name not in form.tools:
        return f"calls the tool '{name}', which [answer.tools] does not describe"
    if unknown := sorted(set(arguments) - set(form.tools[name])):
        return f"gives arguments {unknown} to '{name}', which [answer.tools.{name}] does not name"
    for argument, value in arguments.items():
        if form.tools[name][argument].metric == "number" and not _is_number(value):
            return f"argument '{argument}' of '{name}' has the metric number, but is {value!r}"
    return ""


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return parse_number(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _choice_key(text: str, form: Choice) -> str:
    return normalize(text).casefold() if form.ignore_case else normalize(text)
