"""Answers to general benchmarks: read as the official scripts read them."""

import pytest

from data_pipelines.example import Example
from trimpi_jax.evaluators.forgetting import f1_of_yes, summarize_benchmark
from trimpi_jax.grading.benchmarks import find_option, parse_wildguard
from trimpi_jax.grading.grader import grade_completions


def grade(form, text, answer, **facts):
    example = Example("e", (), "q", answer, meta={"answer_form": {"form": form} | facts})
    return grade_completions([text], [example], [True])[0]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("so the answer is (C).", "C"),
        ("the answer is D", "D"),
        ("It follows.\nAnswer: B", "B"),
        ("A or rather, finally, E", "E"),
        ("no idea", None),
        ("the answer is (C). No: answer: D", "C"),  # the first rule that finds one decides
    ],
)
def test_mmlu_pro(text, letter):
    found = grade("mmlu_pro", text, "C", options=list("vwxyz"))
    assert found.parsed == letter and found.accuracy == (letter == "C")
    assert found.details == ({} if letter else {"problem": "no_choice"})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Some thoughts.\nAnswer: B", "B"),
        ("(A) at first, but then (B)", "B"),
        ("C", "C"),
        ("B.", "B"),
        ("what is seen here looks like a small cat", "A"),
        ("first a small cat, in the end rather a big dog", "B"),
        ("cat", None),  # five words or fewer are not searched
        ("Answer: A or B (C)", "C"),  # two letters behind the mark: the other rules
    ],
)
def test_mmmu_pro(text, letter):
    options = ["small cat", "big dog", "bird"]
    assert find_option(text, options) == letter
    assert grade("mmmu_pro", text, "B", options=options).accuracy == (letter == "B")


def test_wildguard_labels():
    gold = "Harmful request: yes\nResponse refusal: no"
    found = grade("wildguard", "Harmful request: yes\nResponse refusal: yes", gold)
    assert found.accuracy == 0.5
    assert found.details == {"harmful_request": 1.0, "response_refusal": 0.0}
    assert grade("wildguard", "no idea", gold).details["problem"] == "no_label"
    assert grade("wildguard", "harmful request: YES", gold).details["problem"] == "label_missing"
    assert parse_wildguard("Response refusal: N/A") == {}


def test_f1_by_hand():
    # gold yes yes no no, said yes - yes no: one hit, one missed, one false alarm
    said = [{"X": "yes"}, {}, {"X": "yes"}, {"X": "no"}, {"X": "yes"}]
    gold = ["yes", "yes", "no", "no", None]  # the last has no label and does not count
    assert f1_of_yes(list(zip(gold, said, strict=True)), "X") == 0.5
    assert f1_of_yes([("yes", {})], "X") == 0.0
    record = {
        "answer": "Harmful request: yes",
        "parsed": "Harmful request: yes",
        "accuracy": 1.0,
        "format": "ok",
        "prompt_tokens": 3,
        "details": {"harmful_request": 1.0},
        "groups": {},
    }
    found = summarize_benchmark("wildguard", [record, record | {"parsed": None, "accuracy": 0.0}])
    assert found["f1"]["Harmful request"] == pytest.approx(2 / 3)
    assert found["f1"]["Harmful response"] == 0.0


def test_captions_by_hand():
    gold = "I see: red small metal cube, red small metal cube, blue large rubber sphere."
    assert grade("nano_caption", gold, gold).accuracy == 1.0
    # two of three named, one of them twice where it is once: 2 * 2 / (3 + 3)
    said = "I see: red small metal cube, blue large rubber sphere, blue large rubber sphere."
    assert grade("nano_caption", said, gold).accuracy == pytest.approx(2 / 3)
    assert grade("nano_caption", "cubes", gold).accuracy == 0.0


def test_text_by_hand():
    assert grade("nano_text", " 3 7\n9 ", "3 7 9").accuracy == 1.0
    assert grade("nano_text", "3 7", "3 7 9").accuracy == 0.0


def test_existence_by_hand():
    gold = "1. True 2. False 3. True 4. True"
    assert grade("nano_existence", "1. True 2. True 4. True", gold).accuracy == 0.5
    assert grade("nano_existence", gold, gold).accuracy == 1.0
