"""The tools, the calling rules and their wording: the one place that names a version.

    OCR, profile (age 30, credits 620, account B)
      rule 3   250 < credits <= 750 and account_type is A or B -> OCR_v4

The same tables make the policy document, pick the gold call and say how each argument is graded, so
they cannot disagree. An override is another `RuleBook`: new thresholds, versions dealt anew.

Source: paper section 3 (tools, rules, metrics); the argument names are those of GTA's toolmeta.json
(open-compass/GTA, Apache-2.0). The descriptions are ours.
Next: data_pipelines/gta_policy/tasks.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

POLICY_NAME = "GTAPolicy"
ACCOUNT_TYPES = ("A", "B", "C", "D")
K_CLOSED, K_OPEN = 1, 4  # paper section 3: results to ask for, one right answer / open-ended

FieldKind = Literal["exact", "text", "expression", "bbox"]
# paper section 3: how an argument is compared
FIELD_KINDS: dict[str, FieldKind] = {
    **dict.fromkeys(("position", "color", "image", "k", "top1"), "exact"),
    **dict.fromkeys(
        ("attribute", "text", "query", "command", "annotation", "keywords", "instruction"), "text"
    ),
    "expression": "expression",
    "bbox": "bbox",
}


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a tool. `kind` is text, image, int or bool, as in GTA's toolmeta.json."""

    name: str
    kind: str = "text"
    optional: bool = False
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool type; `versions` 0 means it has one nameless version."""

    name: str
    versions: int
    description: str
    arguments: tuple[Argument, ...]


_IMAGE = Argument("image", "image")
_BBOX = Argument("bbox")

TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "Calculator",
            0,
            "Evaluates one arithmetic expression and returns the number; functions of Python's"
            " math module may be used.",
            (Argument("expression"),),
        ),
        Tool(
            "OCR",
            5,
            "Reads all text of an image; returns one line per text with its box,"
            " `(x1, y1, x2, y2) TEXT`.",
            (_IMAGE,),
        ),
        Tool(
            "CountGivenObject",
            4,
            "Counts the objects that fit an English description; returns an integer.",
            (_IMAGE, Argument("text")),
        ),
        Tool("ImageDescription", 5, "Returns a short description of an image.", (_IMAGE,)),
        Tool(
            "GoogleSearch",
            3,
            "Searches the web; returns the first k results as text.",
            (Argument("query"), Argument("k", "int", True, 10)),
        ),
        Tool(
            "RegionAttributeDescription",
            2,
            "Describes one attribute of the region of an image inside a box.",
            (_IMAGE, _BBOX, Argument("attribute")),
        ),
        Tool(
            "TextToBbox",
            0,
            "Finds objects by an English description; returns boxes `(x1, y1, x2, y2)` with scores,"
            " only the best one when top1 is true.",
            (_IMAGE, Argument("text"), Argument("top1", "bool", True, True)),
        ),
        Tool(
            "Plot",
            0,
            "Runs Python code, given as a Markdown block, whose function `solution()` returns a"
            " matplotlib figure; returns the image.",
            (Argument("command"),),
        ),
        Tool(
            "MathOCR",
            0,
            "Reads the mathematical expression of an image; returns LaTeX.",
            (_IMAGE,),
        ),
        Tool(
            "Solver",
            0,
            "Runs Python code, given as a Markdown block, whose function `solution()` solves"
            " equations with sympy and returns the answer as a string.",
            (Argument("command"),),
        ),
        Tool(
            "DrawBox",
            0,
            "Draws a box on an image, with an annotation if one is given; returns the image.",
            (_IMAGE, _BBOX, Argument("annotation", "text", True, None)),
        ),
        Tool(
            "AddText",
            0,
            "Writes text on an image; position is the left-bottom corner `(x, y)`, or l, m or r"
            " (left, middle, right) followed by t, m or b (top, middle, bottom), such as `mt`;"
            " returns the image.",
            (
                _IMAGE,
                Argument("text"),
                Argument("position"),
                Argument("color", "text", True, "red"),
            ),
        ),
        Tool(
            "TextToImage",
            3,
            "Makes an image from keywords separated by commas.",
            (Argument("keywords"),),
        ),
        Tool(
            "ImageStylization",
            3,
            "Changes an image as an instruction says; returns the image.",
            (_IMAGE, Argument("instruction")),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Who asks. The rules look at nothing else."""

    age: int
    credits: int
    account_type: str

    def __post_init__(self):
        if self.account_type not in ACCOUNT_TYPES or self.age < 0 or self.credits < 0:
            raise ValueError(f"no profile: {self}; account types are {ACCOUNT_TYPES}")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A range of `age` or `credits` (bounds that are None are open), or a set of account types."""

    field: str
    at_least: int | None = None
    above: int | None = None
    below: int | None = None
    up_to: int | None = None
    among: tuple[str, ...] = ()

    def holds(self, profile: Profile) -> bool:
        """Whether the profile satisfies it."""
        value = getattr(profile, self.field)
        if self.among:
            return value in self.among
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.up_to is None or value <= self.up_to)
        )

    def __str__(self) -> str:
        """`250 < credits <= 750`, `account_type is A or B`."""
        if self.among:
            return f"{self.field} is {_either(self.among)}"
        low = self.at_least if self.at_least is not None else self.above
        high = self.below if self.below is not None else self.up_to
        high_sign = "<" if self.below is not None else "<="
        if low is None:
            return f"{self.field} {high_sign} {high}"
        if high is None:
            return f"{self.field} {'>=' if self.at_least is not None else '>'} {low}"
        low_sign = "<=" if self.at_least is not None else "<"
        return f"{low} {low_sign} {self.field} {high_sign} {high}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """When all conditions hold, the tool's version is `version`."""

    number: int  # in the policy document
    tool: str
    when: tuple[Condition, ...]
    version: int

    def holds(self, profile: Profile) -> bool:
        """Whether the profile satisfies every condition."""
        return all(condition.holds(profile) for condition in self.when)

    def __str__(self) -> str:
        conditions = " and ".join(map(str, self.when))
        return f"if {conditions}, call {self.tool}_v{self.version}"


@dataclasses.dataclass(frozen=True)
class RuleBook:
    """The version rules of one policy: for every versioned tool exactly one rule fits a profile."""

    rules: tuple[Rule, ...]

    def rule_of(self, tool: str, profile: Profile) -> Rule | None:
        """The rule that picks the version; None for a tool without versions."""
        fitting = [rule for rule in self.rules if rule.tool == tool and rule.holds(profile)]
        return fitting[0] if fitting else None

    def versioned_name(self, tool: str, profile: Profile) -> str:
        """`OCR_v4`; a tool without versions keeps its name."""
        rule = self.rule_of(tool, profile)
        return f"{tool}_v{rule.version}" if rule else tool


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The numbers in the version rules; the defaults are the paper's."""

    low: int = 250  # credits
    middle: int = 500  # credits
    high: int = 750  # credits
    adult: int = 21  # years
    senior: int = 60  # years

    def __post_init__(self):
        if not (0 < self.low < self.middle < self.high and 0 < self.adult < self.senior):
            raise ValueError(f"thresholds must rise: {self}")


def make_rule_book(
    thresholds: Thresholds | None = None, versions: Mapping[str, tuple[int, ...]] | None = None
) -> RuleBook:
    """The rules of the paper, or the same questions with other numbers.

    Args:
        thresholds: of credits and age.
        versions: tool -> the versions of its rules, in their order; absent = the paper's.
    """
    t = thresholds or Thresholds()

    def accounts(letters: str) -> Condition:
        return Condition("account_type", among=tuple(letters))

    def credits(**bounds: Any) -> Condition:
        return Condition("credits", **bounds)

    def age(**bounds: Any) -> Condition:
        return Condition("age", **bounds)

    between = credits(above=t.low, up_to=t.high)
    table: dict[str, list[tuple[tuple[Condition, ...], int]]] = {  # paper section 3
        "ImageDescription": [
            ((accounts("A"),), 5),
            ((accounts("BC"), credits(above=t.middle)), 4),
            ((accounts("BC"), credits(up_to=t.middle)), 3),
            ((accounts("D"), credits(above=t.middle)), 2),
            ((accounts("D"), credits(up_to=t.middle)), 1),
        ],
        "OCR": [
            ((credits(up_to=t.low),), 5),
            ((between, accounts("AB")), 4),
            ((between, accounts("CD")), 3),
            ((credits(above=t.high), age(below=t.adult)), 2),
            ((credits(above=t.high), age(at_least=t.adult)), 1),
        ],
        "GoogleSearch": [
            ((age(below=t.adult),), 1),
            ((age(at_least=t.adult), credits(below=t.middle)), 2),
            ((age(at_least=t.adult), credits(at_least=t.middle)), 3),
        ],
        "TextToImage": [
            ((accounts("ABC"),), 1),
            ((accounts("D"), credits(above=t.middle)), 2),
            ((accounts("D"), credits(up_to=t.middle)), 3),
        ],
        "RegionAttributeDescription": [((accounts("AB"),), 2), ((accounts("CD"),), 1)],
        "CountGivenObject": [
            ((credits(below=t.low),), 1),
            ((credits(at_least=t.low, below=t.middle),), 2),
            ((credits(at_least=t.middle, below=t.high),), 3),
            ((credits(at_least=t.high),), 4),
        ],
        "ImageStylization": [
            ((age(below=t.adult),), 1),
            ((age(at_least=t.adult, below=t.senior),), 2),
            ((age(at_least=t.senior),), 3),
        ],
    }
    rules: list[Rule] = []
    for tool, rows in table.items():
        dealt = (versions or {}).get(tool, tuple(version for _, version in rows))
        if sorted(dealt) != sorted(range(1, TOOLS[tool].versions + 1)):
            raise ValueError(f"{tool} has versions 1..{TOOLS[tool].versions}, got {dealt}")
        for (when, _), version in zip(rows, dealt, strict=True):
            rules.append(Rule(len(rules) + 1, tool, when, version))
    return RuleBook(tuple(rules))


PAPER_RULES = make_rule_book()


def override_rule_book(seed: int) -> RuleBook:
    """Changed version rules under the same policy name.

    Every rule picks another version than the paper's rule in its place, and all thresholds move.
    """
    rng = np.random.default_rng([seed, 0x0E])
    low, middle, high = (int(rng.integers(a, b)) * 10 for a, b in ((15, 24), (35, 49), (60, 74)))
    thresholds = Thresholds(low, middle, high, int(rng.integers(23, 35)), int(rng.integers(48, 59)))
    versions = {}
    for tool in TOOLS.values():
        original = [rule.version for rule in PAPER_RULES.rules if rule.tool == tool.name]
        dealt = list(original)
        while original and any(a == b for a, b in zip(original, dealt, strict=True)):
            dealt = [original[i] for i in rng.permutation(len(original))]
        versions[tool.name] = tuple(dealt)
    return make_rule_book(thresholds, {name: dealt for name, dealt in versions.items() if dealt})


def policy_text(book: RuleBook) -> str:
    """The policy document that a rule book stands for."""
    lines = [
        f"# {POLICY_NAME}",
        "In every turn, answer with exactly one tool call, a JSON object with the keys name and"
        " arguments. Which version of a tool a user may call depends on the user's profile: age,"
        " credits and account_type.",
        "",
        "## Tools",
        *(f"- {line}" for line in _tool_lines()),
        "",
        "## Calling rules",
    ]
    for tool in dict.fromkeys(rule.tool for rule in book.rules):
        own = [rule for rule in book.rules if rule.tool == tool]
        lines += [f"### {tool}", *(f"Rule {rule.number}: {rule}." for rule in own)]
    lines += ["### All users", *(f"Rule {n}: {text}" for n, text in general_rules(book).values())]
    return "\n".join(lines)


def general_rules(book: RuleBook) -> dict[str, tuple[int, str]]:
    """The rules that ask no profile: key -> (number in the document, text)."""
    texts = {
        "math": "read an image with mathematical expressions with MathOCR instead of OCR.",
        "k": f"call GoogleSearch with k={K_CLOSED} when the question is not open-ended, and with"
        f" k={K_OPEN} when it is.",
        "bbox": "a bbox is written (x1, y1, x2, y2); get it with TextToBbox before calling"
        " RegionAttributeDescription.",
        "describe": "with several images, call ImageDescription on each image that has not been"
        " described yet.",
        "image": "an image argument is an exact image name such as image/image_1.jpg.",
    }
    return {
        key: (number, text)
        for number, (key, text) in enumerate(texts.items(), start=len(book.rules) + 1)
    }


def call_json(name: str, arguments: Mapping[str, Any]) -> str:
    """The canonical text of a tool call, which is an Example's answer."""
    return json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)


def find_argument_problems(tool: str, arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arguments of a call to a tool (by its name without a version)."""
    known = {argument.name: argument for argument in TOOLS[tool].arguments}
    required = {name for name, argument in known.items() if not argument.optional}
    problems = [f"{tool} has no argument {name!r}" for name in sorted(set(arguments) - set(known))]
    problems += [
        f"{tool} needs the argument {name!r}" for name in sorted(required - set(arguments))
    ]
    types = {"text": str, "image": str, "int": int, "bool": bool}
    for name, value in arguments.items():
        if name in known and not (value is None and known[name].optional):
            wanted = types[known[name].kind]
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                problems.append(f"{tool}.{name} is {known[name].kind}, got {value!r}")
    return problems


def answer_form(
    text_encoder: str, text_layer: int | None = None, text_baseline: float = 0.0
) -> dict[str, Any]:
    """How an answer of this dataset is graded; kept in `meta` of every Example.

    `fields` and `defaults` (tool name without version -> its optional arguments) come from the
    catalogue above; the rest says which model compares texts, see
    `trimpi_jax/grading/text_similarity.py`.
    """
    defaults = {
        tool.name: {a.name: a.default for a in tool.arguments if a.optional}
        for tool in TOOLS.values()
    }
    return {
        "form": "gta_call",
        "fields": dict(FIELD_KINDS),
        "defaults": {name: values for name, values in defaults.items() if values},
        "text_encoder": text_encoder,
        "text_layer": text_layer,
        "text_baseline": text_baseline,
    }


def _tool_lines() -> Iterator[str]:
    for tool in TOOLS.values():
        names = [f"{tool.name}_v{i}" for i in range(1, tool.versions + 1)] or [tool.name]
        arguments = ", ".join(map(_signature, tool.arguments))
        yield f"{', '.join(names)} ({arguments}): {tool.description}"


def _signature(argument: Argument) -> str:
    if not argument.optional:
        return argument.name
    default = json.dumps(argument.default) if argument.default is not None else "none"
    return f"{argument.name}={default}"


def _either(letters: tuple[str, ...]) -> str:
    if len(letters) == 1:
        return letters[0]
    return f"{', '.join(letters[:-1])} or {letters[-1]}"
