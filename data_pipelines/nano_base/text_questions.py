"""Small questions without an image, for the nano base's general ability.

    sum      What is 7 plus 5?                      12
    larger   Which is larger, 12 or 9?              12
    repeat   Repeat: cube red seven.                cube red seven
    last     Last word of: cube red seven.          seven
    sort     Sort: 7 3 9.                           3 7 9

A tenth of all questions, by a hash of their words, is for tests only (`held_out`).

Next: data_pipelines/nano_base/general.py
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_pipelines.clevr.scene import ATTRIBUTES
from data_pipelines.example import Example

WORDS = (
    *(value for values in ATTRIBUTES.values() for value in values),
    *"zero one two three four five six seven eight nine".split(),
)
FAMILIES = ("sum", "larger", "repeat", "last", "sort")
HELD_OUT_SHARE = 10  # one in so many questions


def make_text_question(rng: np.random.Generator, *, held_out: bool) -> Example:
    """A question of a random family; `held_out` says from which side of the split."""
    while True:
        family = str(rng.choice(FAMILIES))
        query, answer = _draw(rng, family)
        if is_held_out_question(query) == held_out:
            return Example("", (), query, answer, meta={"task": "text", "family": family})


def is_held_out_question(query: str) -> bool:
    """True for questions that no training may use."""
    return hashlib.sha256(query.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _draw(rng: np.random.Generator, family: str) -> tuple[str, str]:
    if family == "sum":
        a, b = rng.integers(0, 10, 2).tolist()
        return f"What is {a} plus {b}?", f"{a + b}"
    if family == "larger":
        a, b = (rng.choice(100, 2, replace=False)).tolist()
        return f"Which is larger, {a} or {b}?", f"{max(a, b)}"
    if family == "sort":
        digits = rng.choice(10, 3, replace=False).tolist()
        return f"Sort: {_spaced(digits)}.", _spaced(sorted(digits))
    words = [str(word) for word in rng.choice(WORDS, int(rng.integers(2, 6)), replace=False)]
    if family == "repeat":
        return f"Repeat: {' '.join(words)}.", " ".join(words)
    return f"Last word of: {' '.join(words)}.", words[-1]


def _spaced(digits: list[int]) -> str:
    return " ".join(map(str, digits))
