"""Each answer form by hand, through the one door `grade_completions`."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.answer_forms import gold_problem, parse_form, parse_number
from data_pipelines.example import Example, completion_text
from data_pipelines.own_policy.user_function import file_sha256
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.grading.rewards import reward_completions


def grade(form, gold, *answers, facts=None):
    """Grades of well-formed completions with these answers."""
    example = Example("e", (), "q", gold, meta={"answer_form": form, "facts": facts or {}})
    texts = [completion_text("so", answer) for answer in answers]
    count = len(answers)
    return grade_completions(texts, [example] * count, [True] * count)


def accuracies(form, gold, *answers):
    return [one.accuracy for one in grade(form, gold, *answers)]


def test_choice():
    form = {"form": "choice", "choices": ["Full refund", "No refund"]}
    answers = ("full  REFUND", "No refund", "Some refund")
    assert accuracies(form, "Full refund", *answers) == [1, 0, 0]
    assert grade(form, "Full refund", "Some refund")[0].details == {"problem": "no_choice"}
    assert accuracies(form | {"ignore_case": False}, "Full refund", "full refund") == [0]


def test_number():
    form = {"form": "number", "tolerance": 0.1, "unit": "EUR"}
    answers = ("12", "EUR 12.1", "11.9 EUR", "12.11", "1,2", "twelve", "nan", "1e400")
    assert accuracies(form, "12.00", *answers) == [1, 1, 1, 0, 0, 0, 0, 0]
    assert grade(form, "12.00", "12.11")[0].details["error"] == pytest.approx(0.11)
    relative = {"form": "number", "relative_tolerance": 0.01}
    assert accuracies(relative, "1,000", "1010", "1011", "990") == [1, 0, 1]
    assert accuracies({"form": "number"}, "0.3", "0.30", ".3", "0.31") == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("-1,234.5", -1234.5), ("−2", -2), ("+.5", 0.5), ("1.", 1.0), ("3e2", 300.0), ("12,34", None),
     ("", None), (".", None), ("1 2", None), ("9" * 65, None), ("0x10", None), ("1_000", None)],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_parse_number_reads_what_python_writes(value):
    assert parse_number(repr(value)) == value


def test_regex():
    form = {"form": "regex", "pattern": r"(?i)(?:case\s*)?{answer}"}
    assert accuracies(form, "R-7.1", "case R-7.1", "r-7.1", "R-7x1", "R-7.1 or R-8") == [1, 1, 0, 0]


def test_a_pattern_that_never_ends_is_stopped():
    form = {"form": "regex", "pattern": r"(a|aa)+$|x"}
    (found,) = grade(form, "x", "a" * 60 + "b")  # 2^40 ways to try without the limit
    assert (found.accuracy, found.details) == (0, {"problem": "pattern_timeout"})


TOOLS = {
    "form": "tool_call",
    "tools": {
        "refund": {"order": "exact", "amount": {"metric": "number", "tolerance": 0.5}},
        "mark": {"box": "bbox", "note": "exact"},
    },
}


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def test_tool_call_by_hand():
    gold = call("refund", order="A1", amount=10)
    scores = accuracies(
        TOOLS,
        gold,
        gold,
        call("refund", order="A1", amount="10.4"),
        call("refund", order="A2", amount=10),  # half of the arguments
        call("refund", order="A1"),  # one is missing
        call("refund", order="A1", amount=10, why="x"),  # one too many: 2 of 3
        call("mark", order="A1", amount=10),  # another tool
        "not json",
        '["refund"]',
    )
    assert scores == pytest.approx([1, 1, 0.75, 0.75, 0.5 + 1 / 3, 0.5, 0, 0])
    details = grade(TOOLS, gold, call("refund", order="A1", amount=11))[0].details
    assert details["fields"] == {"amount": 0.0, "order": 1.0}
    assert (details["tool"], details["arguments"], details["call"]) == (1.0, 0.5, "ok")


def test_metrics_shared_with_gta():
    form = {
        "form": "tool_call",
        "tools": {"mark": {"box": "bbox", "sum": "expression", "note": "text"}},
    }
    gold = call("mark", box="(0, 0, 10, 10)", sum="2 * 3", note="a cracked mug")
    same, half, text = grade(
        form,
        gold,
        call("mark", box="(0, 0, 10, 10)", sum="6", note="a cracked mug"),
        call("mark", box="(0, 0, 10, 5)", sum="__import__('os')", note="a cracked mug"),
        call("mark", box="(0, 0, 10, 10)", sum="6", note="the mug has a crack"),
    )
    assert same.accuracy == 1
    assert half.details["fields"] == {"box": 0.5, "sum": 0.0, "note": 1.0}
    assert half.accuracy == pytest.approx(0.5 + 0.5 * 1.5 / 3)
    assert 0.5 < text.details["fields"]["note"] < 1
    assert "all-MiniLM-L6-v2-int8" in text.details["text_encoder"]


def test_python_function(tmp_path):
    file = tmp_path / "grade.py"
    file.write_text(
        "def grade(answer, gold, example):\n"
        "    if answer == 'bad': raise ValueError('oh')\n"
        "    return {'score': 0.25 * (answer == gold) + 0.5, 'age': example['age']}\n"
    )
    form = {"form": "python", "file": str(file), "sha256": file_sha256(file)}
    right, wrong, bad = grade(form, "x", "x", "y", "bad", facts={"age": 3})
    assert (right.accuracy, right.format, right.details) == (0.75, 1.0, {"age": 3.0})
    assert wrong.accuracy == 0.5
    assert (bad.accuracy, bad.format) == (0.0, 1.0)
    assert bad.details == {"problem": "function_error", "grader_error": "ValueError: oh"}
    example = Example("e", (), "q", "x", meta={"answer_form": form, "facts": {"age": 3}})
    texts = [completion_text("so", answer) for answer in ("x", "bad")]
    counted = reward_completions(texts, [example] * 2, [True] * 2, RewardWeights(0.9, 0.1))
    assert counted.rewards == pytest.approx([0.775, 0.0])
    assert counted.failures == [("e", texts[1], "ValueError: oh")]


def test_no_box_is_a_reason_in_every_form(tmp_path):
    python = {"form": "python", "file": str(tmp_path / "never_run.py")}
    choice = {"form": "choice", "choices": ["a", "b"]}
    golds = ((choice, "a"), ({"form": "number"}, "1"), (TOOLS, call("refund")), (python, "a"))
    for form, gold in golds:
        example = Example("e", (), "q", gold, meta={"answer_form": form})
        (found,) = grade_completions(["I will not say"], [example], [True])
        assert (found.accuracy, found.reason, found.parsed) == (0, "no_think", None)
        assert found.details["problem"] == "no_box"


@given(st.text(max_size=60))
def test_no_text_of_a_model_is_an_exception(answer):
    forms = {
        "choice": ({"form": "choice", "choices": ["a", "b"]}, "a"),
        "number": ({"form": "number", "tolerance": 1.0}, "1"),
        "regex": ({"form": "regex", "pattern": "{answer}!?"}, "a"),
        "tool_call": (TOOLS, call("mark", box="(0, 0, 1, 1)", note="n")),
    }
    for form, gold in forms.values():
        (found,) = grade(form, gold, answer)
        assert 0 <= found.accuracy <= 1


@pytest.mark.parametrize(
    ("form", "gold", "problem"),
    [
        ({"form": "choice", "choices": ["a", "b"]}, "c", "none of the choices"),
        ({"form": "number", "unit": "EUR"}, "12 USD", "no number (unit 'EUR')"),
        ({"form": "regex", "pattern": "[0-9]+"}, "x", "does not match its own pattern"),
        (TOOLS, "{}", "a tool call is"),
        (TOOLS, call("refund", colour="red"), "does not name"),
        (TOOLS, call("refund", amount="much"), "has the metric number"),
    ],
)
def test_gold_answers_that_nobody_could_give(form, gold, problem):
    assert problem in gold_problem(gold, parse_form(form))
