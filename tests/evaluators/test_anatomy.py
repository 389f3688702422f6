"""The replay of answers by hand: every cause once, the branching error on paper, hostile texts."""

import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.clevr_policy.crops import Crop
from data_pipelines.clevr_policy.tree import sample_tree
from data_pipelines.clevr_policy.wording import chain_of_thought
from data_pipelines.example import Example, completion_text, encode_png
from tests.data_pipelines.policy_reader import BLUE_SPHERE, GREEN_CUBE, RED_CUBE, RED_CYLINDER
from tests.evaluators.completions import (
    ask_about,
    ask_call,
    bent_completions,
    call,
    gold,
    model_texts,
)
from tests.evaluators.completions import objects as scenes
from trimpi_jax.evaluators.anatomy import describe_anatomy, dissect, summarize_anatomy
from trimpi_jax.evaluators.branching import branching_error
from trimpi_jax.evaluators.thoughts import boxed_answer, conditions_of, parse_thought
from trimpi_jax.grading.grader import grade_completions

CROP = Crop("1.1", RED_CUBE, encode_png(np.full((28, 28, 3), 99, np.uint8)))
SEEN = "I see: red small metal cube A, blue large rubber sphere B.\n"
FIRST = "Condition 1: any color red? A. True: go to Condition 1.1\n"
SECOND = "Condition 1.1: any shape cube? red small metal cube. True: respond with Case 3"


def record(example: Example, text: str) -> dict:
    (grade,) = grade_completions([text], [example], [True])
    return {
        "completion": text,
        "accuracy": grade.accuracy,
        "format": grade.reason,
        "details": grade.details,
    }


def summarize(examples, records) -> dict:
    found = [dissect(*pair) for pair in zip(examples, records, strict=True)]
    return summarize_anatomy(examples, records, found)


def cause(thought: str, answer: str = "Case 3", example: Example | None = None) -> tuple[str, int]:
    example = example or ask_about()
    found = dissect(example, record(example, completion_text(thought, answer)))
    return found["cause"], found["step"]


def test_objects_may_be_called_by_letter_or_by_words():
    thought = parse_thought(
        "I see: red small metal cube A, blue large rubber sphere, green small metal cube A.\n"
        "Condition 1: any size small? A, blue large rubber sphere, Q. True: go to Condition 1.1"
    )
    assert thought.seen == (
        "red small metal cube", "blue large rubber sphere", "green small metal cube",
    )  # fmt: skip
    named = thought.citations[0].matching
    assert named == ("red small metal cube", "blue large rubber sphere", "Q")


@pytest.mark.parametrize("depth", [2, 6])
def test_a_thought_is_read_back_as_it_was_written(depth):
    rng = np.random.default_rng(depth)
    for i in range(8):
        tree = sample_tree(rng, f"L{depth}-Karitu", depth)
        example = ask_about(RED_CUBE, BLUE_SPHERE, GREEN_CUBE, tree=tree)
        thought = parse_thought(gold(example))
        assert [cited.section for cited in thought.citations] == example.meta["path"]
        assert set(thought.seen or ()) == {
            "red small metal cube", "blue large rubber sphere", "green small rubber cube",
        }  # fmt: skip
        conditions = conditions_of(example)
        for cited in thought.citations:
            asked = conditions[cited.section]
            assert (cited.attribute, cited.value) == (asked.attribute, asked.value)
            assert cited.answer == bool(cited.matching)
        assert f"Case {thought.citations[-1].case}" == example.answer
        shown = [example.meta["path"][i % len(example.meta["path"])]]
        pictured = parse_thought(chain_of_thought(tree, [RED_CUBE, BLUE_SPHERE], shown))
        plain = parse_thought(chain_of_thought(tree, [RED_CUBE, BLUE_SPHERE]))
        assert [c._replace(pictured=False) for c in pictured.citations] == list(plain.citations)
        assert {c.section for c in pictured.citations if c.pictured} <= set(shown)


@pytest.mark.parametrize(
    ("thought", "answer", "expected"),
    [
        (SEEN + FIRST + SECOND, "Case 3", ("right", 0)),
        (FIRST + SECOND, "Case 3", ("right", 0)),  # nothing is said about what is seen
        (SEEN + FIRST + SECOND.replace("cube?", "sphere?"), "Case 3", ("right_but_flawed", 0)),
        (SEEN + FIRST + SECOND, "Case 1", ("other_answer", 2)),
        (SEEN + FIRST.replace("1.1", "1.3") + SECOND, "Case 1", ("missing_section", 1)),
        (
            SEEN + FIRST.replace("1.1", "1.3") + SECOND.replace("1.1", "1.3"),
            "Case 1",
            ("missing_section", 1),
        ),
        (
            SEEN + FIRST + SECOND.replace("Condition 1.1", "Condition 1.7"),
            "Case 1",
            ("missing_section", 2),
        ),
        (SEEN + SECOND, "Case 1", ("wrong_section", 1)),
        (
            SEEN + "Condition 1: any color blue? none. False: go to Condition 1.2\n",
            "Case 1",
            ("wrong_rule", 1),
        ),
        (
            "I see: blue small metal cube.\n"
            "Condition 1: any color red? none. False: go to Condition 1.2\n"
            "Condition 1.2: any size small? blue small metal cube. True: respond with Case 4",
            "Case 4",
            ("perception", 1),
        ),
        (
            SEEN + "Condition 1: any color red? none. False: go to Condition 1.2\n"
            "Condition 1.2: any size small? red small metal cube. True: respond with Case 4",
            "Case 4",
            ("slip", 1),
        ),
        (SEEN + FIRST.replace("1.1", "1.2"), "Case 4", ("wrong_branch", 1)),
        (SEEN + FIRST + SECOND.replace("Case 3", "Case 1"), "Case 1", ("wrong_branch", 2)),
        (SEEN + FIRST, "Case 1", ("incomplete", 1)),
        (SEEN + FIRST + "Condition 1.1: any shape cube?", "Case 1", ("incomplete", 2)),
        (SEEN, "Case 1", ("no_reasoning", 0)),
        ("It must be so.", "Case 1", ("no_reasoning", 0)),
    ],
)
def test_the_first_flaw_is_the_cause(thought, answer, expected):
    assert cause(thought, answer) == expected


def test_without_a_box_the_cause_is_the_format_and_the_flaws_are_told():
    example = ask_about()
    text = SEEN + FIRST.replace("1.1", "1.3")
    found = dissect(example, record(example, text))
    assert (found["cause"], found["flaws"]) == (
        "format", {"format": 1, "missing_section": 1, "incomplete": 1},
    )  # fmt: skip


def test_a_prompt_that_was_too_long_is_no_mistake_of_reasoning():
    row = {"completion": "", "accuracy": 0.0, "format": "prompt_too_long", "details": {}}
    assert dissect(ask_about(), row)["cause"] == "prompt_too_long"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(bent_completions())
def test_every_wrong_answer_has_a_cause_and_every_flawless_one_is_right(pair):
    example, text = pair
    row = record(example, text)
    found = dissect(example, row)
    assert found["cause"] not in ("wrong", "partly_right")
    if not found["flaws"]:
        assert row["accuracy"] == 1.0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scenes)
def test_gold_completions_have_no_flaw(things):
    example = ask_about(*things)
    found = dissect(example, record(example, gold(example)))
    assert (found["cause"], found["flaws"]) == ("right", {})
    assert found["objects_right"] == found["objects"] == len(things)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(model_texts)
def test_no_text_is_an_exception(text):
    for example in (ask_about(), ask_about(RED_CYLINDER, crops=(CROP,)), ask_call()):
        dissect(example, record(example, text))
        branching_error([example], [text])
    boxed_answer(text)


def test_the_summary_by_hand():
    example = ask_about()
    texts = [
        gold(example),
        completion_text(SEEN + SECOND, "Case 1"),
        completion_text(SEEN.replace("blue", "green") + FIRST.replace("1.1", "1.3"), "Case 9"),
    ]
    summary = summarize([example] * 3, [record(example, text) for text in texts])
    assert (summary["count"], summary["wrong"]) == (3, 2)
    assert summary["causes"] == {"right": 1, "wrong_section": 1, "missing_section": 1}
    assert summary["flaws"] == {
        "wrong_section": 1, "other_answer": 1, "missing_section": 1, "incomplete": 1,
    }  # fmt: skip
    assert summary["steps"] == {"missing_section": {1: 1}, "wrong_section": {1: 1}}
    assert summary["scenes"] == {
        "count": 3, "told": 3, "exact": 2, "objects": 6, "objects_told": 6, "objects_right": 5,
    }  # fmt: skip
    lines = dict(describe_anatomy(summary))
    assert lines["wrong_section"] == "33.3 % (1/3)" and lines["scenes told exactly"] == "2/3"


def test_the_branching_error_on_paper():
    yes, no = ask_about(), ask_about(BLUE_SPHERE)  # gold: 1, 1.1 and 1, 1.2
    texts = [gold(yes), "Condition 1: any color red? True: go to Condition 1.3"]
    found = branching_error([yes, no, ask_call()], [*texts, "Condition 9:"])
    # said 1: 2, 1.1: 1, 1.3: 1; gold 1: 2, 1.1: 1, 1.2: 1; so (0 + 0 + 1 + 1) / 4
    assert found["distribution"] == {"1": [2, 2], "1.1": [1, 1], "1.2": [0, 1], "1.3": [1, 0]}
    assert (found["mean_absolute_difference"], found["per_2000"]) == (0.5, 500.0)
    assert (found["count"], found["left_out"], found["answers_with_missing_section"]) == (2, 1, 1)
    assert found["missing_sections"] == {"1.3": 1}
    assert branching_error([], [])["mean_absolute_difference"] is None


@pytest.mark.parametrize(
    ("gold_call", "said", "expected", "wrong"),
    [
        (("OCR_v4", {"image": "a"}), call("OCR_v4", image=" a "), "right", []),
        (("OCR_v4", {"image": "a"}), call("OCR_v3", image="a"), "wrong_version", []),
        (("OCR_v4", {"image": "a"}), call("MathOCR", image="a"), "wrong_tool", []),
        (("OCR_v4", {"image": "a"}), call("OCR_v4", image="b"), "wrong_argument", ["image"]),
        (("OCR_v4", {"image": "a"}), call("OCR_v4"), "argument_missing", ["image"]),
        (("OCR_v4", {"image": "a"}), call("OCR_v4", image="a", k=1), "argument_unknown", ["k"]),
        (("OCR_v4", {"image": "a"}), "<think>x</think>\\boxed{OCR_v4}", "no_call", []),
        (("OCR_v4", {"image": "a"}), "<think>x</think>OCR_v4", "format", []),
        (("Calculator", {"expression": "2*3"}), call("Calculator", expression="6"), "right", []),
        (
            ("GoogleSearch_v1", {"query": "x", "k": 10}),
            call("GoogleSearch_v1", query="x"),  # k has the default 10
            "right",
            [],
        ),
    ],
)
def test_what_is_wrong_with_a_call(gold_call, said, expected, wrong):
    name, arguments = gold_call
    example = ask_call(name, **arguments)
    (accuracy,) = [1.0 if expected == "right" else 0.3]
    row = {"completion": said, "accuracy": accuracy, "format": "ok", "details": {}}
    found = dissect(example, row)
    assert found["cause"] == expected
    assert [field for field, bad in found.get("fields", {}).items() if bad] == wrong


def test_texts_and_boxes_of_calls():
    example = ask_call("DrawBox", image="a", bbox="(0, 0, 10, 10)", annotation="a cat")
    said = call("DrawBox", image="a", bbox="(0, 0, 10, 6)", annotation="one cat")
    row = {"completion": said, "accuracy": 0.9, "format": "ok", "details": {}}
    found = dissect(example, row)
    assert (found["cause"], found["fields"]["bbox"]) == ("other_words", False)
    far = call("DrawBox", image="a", bbox="(0, 0, 10, 4)", annotation="a cat")
    assert dissect(example, row | {"completion": far})["cause"] == "wrong_argument"
    summary = summarize([example, example], [row, row | {"completion": far}])
    assert summary["fields"] == {"image": [0, 2], "bbox": [1, 2], "annotation": [1, 2]}
