r"""Read a ClevrPolicy chain of thought back: what was seen, which Conditions were cited, and how.

    I see: red small metal cube A, blue large rubber sphere B.
    Condition 1: any color red? A. True: go to Condition 1.1
    └─ Citation(section "1", color, red, matching (red small metal cube,), answer True, goes_to 1.1)

Objects may also be called by their words in place of their letters.

In: what a model said, any text. Out: a Thought; what a line lacks is None. Nothing here raises.

Source: the wording of `data_pipelines/clevr_policy/wording.py`, -T and -M.
Next: trimpi_jax/evaluators/anatomy.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_pipelines.clevr_policy.tree import Condition, iter_conditions, tree_from_json
from data_pipelines.example import Example
from trimpi_jax.grading.answers import find_boxes

WORD_ORDER = ("color", "size", "material", "shape")  # of an object's words, as wording.py has them

_SECTION = r"(\d{1,3}(?:\.\d{1,3}){0,40})"
_VISIT = re.compile(rf"\bcondition +{_SECTION} ?:", re.I)
_MENTION = re.compile(rf"\bcondition +{_SECTION}", re.I)
_SEEN = re.compile(r"\bI see: *([^\n]*)")
_QUESTION = re.compile(r"\bany +(\w+) +(\w+)( \(pictured\))? ?\?", re.I)
_ANSWER = re.compile(r"\b(True|False) ?:", re.I)
_CALLED = re.compile(r"(.*\S) ([A-Z]{1,2})")  # an object and its letter
_CONSEQUENCE = re.compile(
    rf"\b(?:go to condition +{_SECTION}|respond with case +(\d{{1,6}}))", re.I
)


class Citation(NamedTuple):
    """One visit of a Condition as a model tells it."""

    section: str
    attribute: str | None
    value: str | None
    pictured: bool  # it says that the policy shows the value by a picture
    matching: tuple[str, ...] | None  # the objects that it names as satisfying the question
    answer: bool | None
    goes_to: str | None  # section
    case: int | None


class Thought(NamedTuple):
    """A chain of thought. `seen` is None where it does not begin with what is seen."""

    seen: tuple[str, ...] | None
    citations: tuple[Citation, ...]


def parse_thought(text: str) -> Thought:
    """The Thought of a completion: of all that stands before its last boxed answer."""
    text = reasoning_of(text)
    visits = list(_VISIT.finditer(text))
    seen = _SEEN.search(text[: visits[0].start()] if visits else text)
    ends = [*(visit.start() for visit in visits), len(text)][1:]
    things, letters = _read_objects(seen[1] if seen else "")
    return Thought(
        None if seen is None else things,
        tuple(
            _read_visit(visit[1], text[visit.end() : end], letters)
            for visit, end in zip(visits, ends, strict=True)
        ),
    )


def reasoning_of(text: str) -> str:
    """What stands before the last boxed answer; all of it where nothing is boxed."""
    boxes = find_boxes(text)
    return text[: boxes[-1][0]] if boxes else text


def boxed_answer(text: str) -> str | None:
    """The content of the last box; None = there is none."""
    boxes = find_boxes(text)
    return boxes[-1][1] if boxes else None


def cited_sections(text: str) -> list[str]:
    """Ids of all Conditions that a text names, in order of their first mention."""
    return list(dict.fromkeys(match[1] for match in _MENTION.finditer(reasoning_of(text))))


def split_objects(text: str) -> tuple[str, ...]:
    """`a, b.` as ("a", "b"); `none` is nothing."""
    things = [" ".join(part.split()) for part in text.strip().rstrip(".").split(",")]
    return tuple(thing for thing in things if thing and thing.lower() != "none")


def having(things: Sequence[str], attribute: str, value: str) -> tuple[str, ...]:
    """The objects, told in four words, whose attribute has the value."""
    if attribute not in WORD_ORDER:
        return ()
    place = WORD_ORDER.index(attribute)
    return tuple(
        thing
        for thing in things
        if len(w := thing.split()) == len(WORD_ORDER) and w[place] == value
    )


def has_tree(example: Example) -> bool:
    """Whether the Example carries its decision tree and its scene (ClevrPolicy)."""
    return "tree" in example.meta and "gold_cot" in example.meta


def conditions_of(example: Example) -> dict[str, Condition]:
    """Section -> Condition of the policy that the Example's answer follows."""
    root = tree_from_json(example.meta["tree"])
    return {condition.section: condition for condition in iter_conditions(root)}


def scene_of(example: Example) -> tuple[str, ...]:
    """The objects of the scene in words: the gold chain of thought begins with all of them."""
    first, _, _ = example.meta["gold_cot"].partition("\n")
    return parse_thought(first).seen or ()


def _read_objects(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(the objects in words, letter -> object); of two with one letter the first keeps it."""
    things, letters = [], {}
    for part in split_objects(text):
        called = _CALLED.fullmatch(part)
        things.append(called[1] if called else part)
        if called:
            letters.setdefault(called[2], called[1])
    return tuple(things), letters


def _read_visit(section: str, body: str, letters: Mapping[str, str]) -> Citation:
    question = _QUESTION.search(body)
    start = question.end() if question else 0
    verdict = _ANSWER.search(body, start)
    consequence = _CONSEQUENCE.search(body, verdict.end() if verdict else start)
    matching = None
    if question and verdict:
        named = split_objects(body[start : verdict.start()].strip(" ."))
        matching = tuple(letters.get(name, name) for name in named)
    goes_to, case = consequence.groups() if consequence else (None, None)
    return Citation(
        section,
        question[1].lower() if question else None,
        question[2].lower() if question else None,
        bool(question and question[3]),
        matching,
        verdict[1].lower() == "true" if verdict else None,
        goes_to,
        None if case is None else int(case),
    )
