"""task.toml and a line of examples.jsonl: what may stand there, checked with the line it stands on.

    task.toml        name, [prompt], [answer], [split], [images]
    examples.jsonl   one object a line: images, query, answer and, if there are any, id, cot,
                     profile, history, split, group, pattern

Next: data_pipelines/own_policy/folder.py
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_pipelines.answer_forms import FORM_NAMES, AnswerForm, parse_json

PLACEHOLDERS = ("policy", "profile", "history", "query", "instruction")
CHAT_MARKS = re.compile(r"<\|[a-z_]+\|>")  # <|im_end|> and the like would end or fake a message
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one, UTF-8 cannot
Text = Annotated[str, Field(min_length=1)]


class Problem(NamedTuple):
    """One thing that is wrong, and where; line 0 = the whole file."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Prompt(_Strict):
    """How the user's message is worded. An absent profile or history leaves nothing behind."""

    template: str = "$profile${history}According to the policy $policy: $query $instruction"
    instruction: str = "Think inside <think></think> and put the final answer inside \\boxed{}."

    @field_validator("template")
    @classmethod
    def _known_placeholders(cls, template: str) -> str:
        form = string.Template(template)
        if not form.is_valid():
            raise ValueError("a lone $ in the template; write $$ for a dollar sign")
        found = form.get_identifiers()
        if unknown := [name for name in found if name not in PLACEHOLDERS]:
            raise ValueError(f"unknown placeholders {unknown}; there are {list(PLACEHOLDERS)}")
        if "query" not in found:
            raise ValueError("the template has no $query")
        return template


class Split(_Strict):
    """Which examples are kept for the test. No effect where the examples say it themselves."""

    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: int = 0
    allow_shared_images: bool = False  # the same picture in train and test, where examples say so


class Images(_Strict):
    """Larger pictures are scaled down to this size when the shards are written."""

    max_pixels: Annotated[int, Field(ge=784, le=40_000_000)] = 1_003_520  # 1,280 cells of 28x28 px


class Task(_Strict):
    """task.toml."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    answer: AnswerForm
    prompt: Prompt = Prompt()
    split: Split = Split()
    images: Images = Images()


class Turn(_Strict):
    """One earlier message of the conversation."""

    role: Text
    text: Text


class Line(_Strict):
    """A line of examples.jsonl."""

    images: Annotated[list[Text], Field(min_length=1)]
    query: Text
    answer: str | int | float | dict[str, Any]
    id: Text | None = None
    cot: str = ""
    profile: dict[str, str | int | float | bool] = {}
    history: list[Turn] = []
    split: Literal["train", "test"] | None = None
    group: Text | None = None  # examples of one group stay on the same side of the split
    pattern: str | None = None  # answer form regex: this example's own pattern


def read_task(text: str, file: str) -> tuple[Task | None, list[Problem]]:
    """The task, or what is wrong with it."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = int(at[1]) if at else text.count("\n") + 1  # else it says "at end of document"
        return None, [Problem(file, line, f"no TOML: {error}")]
    try:
        return Task.model_validate(values), []
    except ValidationError as error:
        return None, [
            Problem(file, toml_line(text, path), message) for path, message in explain(error)
        ]


def read_line(text: str, file: str, number: int) -> tuple[Line | None, list[Problem]]:
    """The example of one line, or what is wrong with it."""
    try:
        values = parse_json(text)
    except ValueError as error:
        return None, [Problem(file, number, str(error))]
    if not isinstance(values, dict):
        return None, [Problem(file, number, f"expected an object {{...}}, got {text[:40]!r}")]
    try:
        return Line.model_validate(values), []
    except ValidationError as error:
        return None, [Problem(file, number, message) for _, message in explain(error)]


def explain(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """pydantic's problems as (path of keys, one sentence), one each."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        # a value of a union is refused once by each of its types: one sentence for all
        path = _without_tags(item["loc"])
        if item["type"] == "union_tag_invalid":
            path = (*path, "form")
        found.setdefault(path, []).append(dict(item))
    return [(path, _sentence(path, items)) for path, items in found.items()]


def toml_line(text: str, path: Sequence[str]) -> int:
    """The line on which a key of a TOML text stands; of its table where it is missing; else 0."""
    table: tuple[str, ...] = ()
    best, best_depth = 0, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([^\]#]+?)\s*\]+", line):
            table = _toml_keys(header[1])
            here = table
        elif pair := re.match(
            r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*[\w"'-]+)*)\s*=""", line
        ):
            here = (*table, *_toml_keys(pair[1]))
        else:
            continue
        depth = len(here)
        if depth > best_depth and tuple(path[:depth]) == here:
            best, best_depth = number, depth
    return best


def check_text(text: str, what: str) -> list[str]:
    """What in a text would be taken for a mark of the prompt or of the answer's format."""
    problems = []
    if marks := sorted(set(CHAT_MARKS.findall(text))):
        problems.append(f"{what} contains the chat marks {marks}, which the model reads as control")
    if "<image>" in text:
        problems.append(f"{what} contains <image>, which marks the place of a picture")
    if LONE_SURROGATE.search(text):
        problems.append(f"{what} contains a half of a surrogate pair, which is no letter")
    return problems


def _without_tags(path: Sequence[Any]) -> tuple[str, ...]:
    """Without what pydantic adds for unions: the form of the answer, the type of a value."""
    parts = [str(part) for part in path]
    if parts[:1] == ["answer"] and parts[1:2] and parts[1] in FORM_NAMES:
        del parts[1]
    if len(parts) > 1 and (parts[-1] in ("str", "int", "float", "bool") or "dict[" in parts[-1]):
        del parts[-1]
    return tuple(parts)


def _sentence(path: Sequence[str], items: Sequence[Mapping[str, Any]]) -> str:
    where = ".".join(path) or "the file"
    item = items[0]
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "missing" or item["input"] is None:
        return f"{where} is absent"
    if kind == "extra_forbidden":
        return f"unknown key {where}"
    if kind in ("string_too_short", "too_short"):
        return f"{where} is empty"
    if kind == "union_tag_not_found":
        return f"{where}.form is absent; there are {', '.join(FORM_NAMES)}"
    if kind == "union_tag_invalid":
        return f"{where} '{item['ctx']['tag']}' is unknown; there are {', '.join(FORM_NAMES)}"
    if kind == "value_error":
        return f"{where}: {message}"
    expected = " or ".join(
        dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in items)
    )
    return f"{where}: expected {expected}, got {item['input']!r:.60}"


def _toml_keys(dotted: str) -> tuple[str, ...]:
    keys = re.findall(r""""([^"]*)"|'([^']*)'|([\w-]+)""", dotted)
    return tuple(next(filter(None, groups), "") for groups in keys)
