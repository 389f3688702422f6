"""Tool calls by hand: names, fields, defaults, boxes, expressions, hostile texts."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.example import Example
from data_pipelines.gta_policy.catalogue import FIELD_KINDS, answer_form, call_json
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.grading.text_similarity import DEFAULT_ENCODER
from trimpi_jax.grading.tool_calls import (
    FIELD_SCORERS,
    bbox_score,
    evaluate_expression,
    expression_score,
    parse_bbox,
    score_calls,
)

FORM = answer_form(DEFAULT_ENCODER)


def score(said, gold):
    said = said if isinstance(said, str | None) else call_json(*said)
    return score_calls([said], [call_json(*gold)], [FORM])[0]


def test_the_paper_of_one_call():
    gold = ("DrawBox", {"image": "a.jpg", "bbox": "(0, 0, 10, 10)"})
    found = score(("DrawBox", {"image": "a.jpg", "bbox": "(0, 0, 10, 5)"}), gold)
    assert (found.tool, found.fields, found.arguments) == (1.0, {"image": 1.0, "bbox": 0.5}, 0.75)
    assert found.overall == 0.875


def test_the_version_is_part_of_the_name_and_arguments_still_count():
    found = score(("OCR_v2", {"image": "a.jpg"}), ("OCR_v1", {"image": "a.jpg"}))
    assert (found.tool, found.arguments, found.overall) == (0.0, 1.0, 0.5)


def test_fields_that_are_missing_or_extra_score_zero():
    gold = ("CountGivenObject_v1", {"image": "a.jpg", "text": "cup"})
    assert score(("CountGivenObject_v1", {"image": "a.jpg"}), gold).arguments == 0.5
    extra = score(("CountGivenObject_v1", {"image": "a.jpg", "text": "cup", "k": 1}), gold)
    assert extra.arguments == pytest.approx(2 / 3)


def test_a_field_that_is_left_out_takes_the_tools_default():
    gold = ("AddText", {"image": "a.jpg", "text": "x", "position": "mt", "color": "red"})
    said = {"image": "a.jpg", "text": "x", "position": "mt"}
    assert score(("AddText", said), gold).arguments == 1.0
    assert score(("AddText", said | {"color": "blue"}), gold).arguments == 0.75
    search = ("GoogleSearch_v1", {"query": "x", "k": 4})
    assert score(("GoogleSearch_v1", {"query": "x"}), search).fields["k"] == 0.0  # default 10
    no_note = ("DrawBox", {"image": "a.jpg", "bbox": "(0, 0, 1, 1)"})
    said = {"image": "a.jpg", "bbox": "(0, 0, 1, 1)", "annotation": None}
    assert score(("DrawBox", said), no_note).overall == 1.0


def test_types_are_compared_too():
    gold = ("TextToBbox", {"image": "a.jpg", "text": "x", "top1": True})
    assert score(("TextToBbox", gold[1] | {"top1": 1}), gold).fields["top1"] == 0.0
    assert score(("TextToBbox", gold[1] | {"text": 5}), gold).fields["text"] == 0.0


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "no_box"),
        ("OCR on the image", "no_json"),
        ("[" * 100_000, "no_json"),
        ("9" * 10_000, "no_json"),
        ("[]", "no_call"),
        ('{"name": "OCR_v1"}', "no_call"),
        ('{"name": "OCR_v1", "arguments": "a.jpg"}', "no_call"),
        ('{"name": 3, "arguments": {}}', "no_call"),
    ],
)
def test_what_is_no_call_scores_zero_and_says_why(said, reason):
    found = score(said, ("OCR_v1", {"image": "a.jpg"}))
    assert (found.overall, found.reason) == (0.0, reason)


def test_a_broken_gold_call_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="gold answer is no tool call"):
        score_calls(["{}"], ["Case 3"], [FORM])
    with pytest.raises(ValueError, match="unknown field kind 'telepathy'"):
        score_calls(
            [call_json("T", {"a": 1})], [call_json("T", {"a": 1})], [{"fields": {"a": "telepathy"}}]
        )


def test_every_field_of_the_catalogue_has_a_scorer():
    assert set(FIELD_KINDS.values()) == set(FIELD_SCORERS)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(1, 2, 3, 4)", (1, 2, 3, 4)),
        (" ( 1.5,2 ,3, 4 ) ", (1.5, 2, 3, 4)),
        ("1, 2, 3, 4", None),  # the policy asks for brackets
        ("(1, 2, 3)", None),
        ("(3, 2, 1, 4)", None),
        ("(1, 2, 1, 4)", None),
        ("(nan, 0, 1, 1)", None),
        ("(0, 0, 1e400, 1)", None),
        ([1, 2, 3, 4], None),
        (None, None),
        ("(" * 100_000, None),
        ("(1" + " " * 50_000, None),
    ],
)
def test_boxes_are_read_or_refused(text, box):
    assert parse_bbox(text) == box
    assert bbox_score(text, "(1, 2, 3, 4)") == pytest.approx(
        0.0 if box is None else (box[2] - box[0]) / 2
    )


@given(*[st.tuples(*[st.integers(0, 50)] * 4)] * 2)
def test_iou_is_symmetric_and_bounded(a, b):
    forward, backward = bbox_score(str(a), str(b)), bbox_score(str(b), str(a))
    assert forward == backward
    assert 0.0 <= forward <= 1.0
    assert (forward == 1.0) == (a == b and a[0] < a[2] and a[1] < a[3])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 * 12", 36.0),
        ("(290 // 5) % 7", 2.0),
        ("math.sqrt(16) + 2 ** -1", 4.5),
        ("round(sum([3, 4, 5]) / 3, 2)", 4.0),
        ("max(1, 2.5) - abs(-2)", 0.5),
        ("pi * 2", 6.283185307179586),
    ],
)
def test_arithmetic_is_evaluated(text, value):
    assert evaluate_expression(text) == value


HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "(1).real",
    "9**9**9",
    "pow(9, pow(9, 9))",
    "factorial(10**6)",
    "comb(10**7, 10**6)",
    "10**400 * 10**400 * 10**400",
    "[1] * 10**9",
    "'a' * 10**9",
    "while True: pass",
    "[x for x in range(10**9)]",
    "sum(x for x in range(10**9))",
    "(lambda f: f(f))(lambda f: f(f))",
    "exec('x')",
    "open('/etc/hostname')",
    "(" * 400,
    "-" * 900 + "1",
    "1" * 100_000,
    "\x00",
    "(-8) ** 0.5",
    "1 / 0",
    "1e999",
    "True",
    "1 < 2",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_everything_but_arithmetic_is_refused_at_once(text):
    started = time.process_time()
    value = evaluate_expression(text)
    spent_s = time.process_time() - started
    assert value is None or text.startswith("-")
    assert spent_s < 0.5  # milliseconds; the limit only has to tell them from an endless loop


def test_expressions_are_compared_by_value():
    assert expression_score("36", "3 * 12") == 1.0
    assert expression_score("35", "3 * 12") == 0.0
    assert expression_score("0.1 + 0.2", "0.3") == 1.0
    assert expression_score("oops", "oops") == 1.0  # what cannot be evaluated is compared as text
    assert expression_score(36, "36") == 0.0


def test_completions_are_graded_through_the_one_door():
    gold = call_json("OCR_v4", {"image": "image/image_1.jpg"})
    example = Example("e", (), "q", gold, meta={"answer_form": FORM})
    texts = [
        f"<think>credits 300 and B, so v4</think>\\boxed{{{gold}}}",
        f"\\boxed{{{gold.replace('v4', 'v3')}}}",
        "<think>so</think> OCR",
    ]
    right, unthought, none = grades = grade_completions(texts, [example] * 3, [True] * 3)
    assert (right.accuracy, right.format) == (1.0, 1.0)
    assert right.details == {
        "tool": 1.0,
        "arguments": 1.0,
        "exact": 1.0,
        "fields": {"image": 1.0},
    }
    assert (unthought.accuracy, unthought.format, unthought.reason) == (0.5, 0.0, "no_think")
    assert (none.accuracy, none.details["problem"]) == (0.0, "no_box")
    json.dumps([grade.details for grade in grades])


def test_details_have_the_means_by_kind_of_field():
    arguments = {"image": "a.jpg", "text": "Sold", "position": "mt", "color": "blue"}
    gold = call_json("AddText", arguments)
    said = call_json("AddText", arguments | {"position": "lb", "color": "blue"})
    example = Example("e", (), "q", gold, meta={"answer_form": FORM})
    (grade,) = grade_completions([f"\\boxed{{{said}}}"], [example], [True], needs_think=False)
    assert grade.details["exact"] == pytest.approx(2 / 3)  # image and color, not position
    assert grade.details["text"] == 1.0
    assert grade.details["arguments"] == 0.75
    assert grade.details["text_encoder"].startswith("BERTScore F1, all-MiniLM-L6-v2-int8")


@given(st.text(max_size=80), st.text(max_size=40))
def test_any_text_is_a_score(name, value):
    gold = ("GoogleSearch_v1", {"query": "x", "k": 1})
    found = score(json.dumps({"name": name, "arguments": {"k": value, name: value}}), gold)
    assert 0.0 <= found.overall <= 0.5
    assert score(value, gold).overall == 0.0
