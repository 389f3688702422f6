"""What a family function gives: a task before its images have numbers.

    menu(rng, name) -> Draft        name(0), name(1), ... are the names its images will have

The helpers make the steps that many families share, each with what the tool would return.

Next: data_pipelines/gta_policy/families/documents.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.gta_policy.catalogue import K_CLOSED, K_OPEN
from data_pipelines.gta_policy.drawing import Box, Line, read_lines
from data_pipelines.gta_policy.tasks import Step

Name = Callable[[int], str]
POSITIONS = {
    "top left": "lt",
    "top middle": "mt",
    "top right": "rt",
    "bottom left": "lb",
    "bottom middle": "mb",
    "bottom right": "rb",
}
INKS = ("red", "blue", "green", "purple", "orange")


@dataclasses.dataclass(frozen=True)
class Draft:
    """Encoded images and what is asked about them."""

    images: tuple[bytes, ...]
    request: str
    steps: tuple[Step, ...]
    answer: str
    open_ended: bool = False


Family = Callable[[np.random.Generator, Name], Draft]


def pick(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """One of the values."""
    return values[int(rng.integers(len(values)))]


def pick_some(rng: np.random.Generator, values: Sequence[Any], count: int) -> list[Any]:
    """Different ones of the values, in random order."""
    return [values[i] for i in rng.permutation(len(values))[:count]]


def number_text(value: float) -> str:
    """A number as the Calculator prints it."""
    return f"{value:.10g}"


def box_text(box: Box) -> str:
    """`(x1, y1, x2, y2)`."""
    return str(tuple(map(int, box)))


def ocr(image: str, lines: Sequence[Line], why: str) -> Step:
    """Read all text."""
    return Step("OCR", {"image": image}, why, read_lines(lines))


def describe(image: str, description: str) -> Step:
    """Describe one of several images."""
    why = f"There are several images and {image} has not been described yet."
    return Step("ImageDescription", {"image": image}, why, description)


def count(image: str, text: str, number: int, why: str) -> Step:
    """Count objects."""
    return Step("CountGivenObject", {"image": image, "text": text}, why, str(number))


def calculate(expression: str, value: float, why: str) -> Step:
    """Evaluate an expression whose value is known here."""
    return Step("Calculator", {"expression": expression}, why, number_text(value))


def search(query: str, results: Sequence[str], why: str, *, open_ended: bool) -> Step:
    """Search the web; k is the rule's."""
    k = K_OPEN if open_ended else K_CLOSED
    found = "\n".join(f"{n}. {result}" for n, result in enumerate(results[:k], start=1))
    return Step("GoogleSearch", {"query": query, "k": k}, why, found)


def find_box(image: str, text: str, box: Box, score: int, why: str) -> Step:
    """Find the best box."""
    arguments = {"image": image, "text": text, "top1": True}
    return Step("TextToBbox", arguments, why, f"{box_text(box)}, score {score}")


def made_of(image: str) -> str:
    """The name of the image that a tool makes in answer to a request about `image`."""
    return image.replace(".jpg", "_made.jpg")


def add_text(image: str, text: str, where: str, color: str, why: str) -> Step:
    """Write on an image; `where` is a key of POSITIONS."""
    arguments = {"image": image, "text": text, "position": POSITIONS[where], "color": color}
    return Step("AddText", arguments, why, made_of(image))
