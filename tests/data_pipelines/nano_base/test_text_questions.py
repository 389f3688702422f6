"""Text questions: right answers by a second reading, and a split that never mixes."""

import re

import numpy as np
import pytest

from data_pipelines.nano_base.text_questions import (
    FAMILIES,
    is_held_out_question,
    make_text_question,
)


def answer_again(query: str) -> str:
    """The answer, worked out from the words of the question alone."""
    words = re.sub("[.?:,]", "", query).split()
    match words:
        case ["What", "is", a, "plus", b]:
            return str(int(a) + int(b))
        case ["Which", "is", "larger", a, "or", b]:
            return a if int(a) > int(b) else b
        case ["Sort", *digits]:
            return " ".join(sorted(digits))
        case ["Repeat", *said]:
            return " ".join(said)
        case ["Last", "word", "of", *said]:
            return said[-1]
    raise AssertionError(query)


@pytest.mark.parametrize("held_out", [True, False])
def test_answers_are_right_and_sides_never_mix(held_out):
    rng = np.random.default_rng(int(held_out))
    families = set()
    for _ in range(300):
        question = make_text_question(rng, held_out=held_out)
        assert question.answer == answer_again(question.query)
        assert is_held_out_question(question.query) == held_out
        assert not question.images
        families.add(question.meta["family"])
    assert families == set(FAMILIES)


def test_equal_generators_give_equal_questions():
    drawn = [make_text_question(np.random.default_rng(5), held_out=False) for _ in range(2)]
    assert drawn[0] == drawn[1]
