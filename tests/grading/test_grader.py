"""One door for all answer forms: grades come back in order, an unknown form is named."""

import pytest

from data_pipelines.example import Example
from trimpi_jax.grading.answers import find_boxes
from trimpi_jax.grading.grader import grade_completions


def example(answer, **meta):
    return Example("e", (), "q", answer, meta=meta)


def test_grades_come_back_in_the_order_of_the_texts():
    examples = [example("Case 1"), example("Case 2", answer_form={"form": "exact"})]
    texts = ["<think>a</think>\\boxed{Case 1}", "\\boxed{Case 1}"]
    first, second = grade_completions(texts, examples, [True, True])
    assert (first.accuracy, first.format) == (1.0, 1.0)
    assert (second.accuracy, second.reason) == (0.0, "no_think")


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match=r"unknown answer forms \['telepathy'\]"):
        grade_completions(["x"], [example("y", answer_form={"form": "telepathy"})], [True])


def test_a_box_may_hold_json():
    text = 'a \\boxed{{"name": "OCR_v1", "arguments": {}}} b \\boxed{c} \\boxed{open'
    assert [content for _, content, _ in find_boxes(text)] == [
        '{"name": "OCR_v1", "arguments": {}}',
        "c",
    ]
