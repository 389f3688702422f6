"""What is said, word for word, for one tree and one scene; and that text and tree agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.clevr.scene import ATTRIBUTES
from data_pipelines.clevr_policy import wording
from data_pipelines.clevr_policy.tree import follow, sample_tree
from data_pipelines.example import completion_text
from tests.data_pipelines.policy_reader import (
    BLUE_SPHERE,
    GREEN_CUBE,
    RED_CUBE,
    RED_CYLINDER,
    TREE,
    make_object,
    read_policy,
)
from trimpi_jax.grading.answers import grade_completion

SEEDS = st.integers(0, 2**32 - 1)

POLICY = """\
The policy of L2-Karitu. Start at Condition 1 with every object in focus. After True only the \
matching objects stay in focus; after False the focus stays.
# Condition 1: any color red?
- True: go to Condition 1.1
- False: go to Condition 1.2
# Condition 1.1: any shape cube?
- True: respond with Case 3
- False: respond with Case 1
# Condition 1.2: any size small?
- True: respond with Case 4
- False: respond with Case 2"""

QUERY = (
    "According to the policy L2-Karitu, what should be the response for the given image?"
    " Think inside <think></think> and put the final answer inside \\boxed{}."
)

YES_YES = """\
I see: red small metal cube A, red large rubber cylinder B, blue large rubber sphere C.
Condition 1: any color red? A, B. True: go to Condition 1.1
Condition 1.1: any shape cube? A. True: respond with Case 3"""

NO_YES = """\
I see: blue large rubber sphere A, green small rubber cube B.
Condition 1: any color red? none. False: go to Condition 1.2
Condition 1.2: any size small? B. True: respond with Case 4"""


def test_the_policy_document():
    assert wording.policy_text(TREE) == POLICY


def test_the_query():
    assert wording.query("L2-Karitu") == QUERY


def test_the_chain_of_thought():
    scene = (BLUE_SPHERE, RED_CYLINDER, RED_CUBE)
    assert wording.chain_of_thought(TREE, scene) == YES_YES
    assert wording.chain_of_thought(TREE, (GREEN_CUBE, BLUE_SPHERE)) == NO_YES


def test_the_answer_and_the_completion():
    assert wording.answer(39) == "Case 39"
    assert completion_text("I see.", "Case 3") == "<think>I see.</think>\\boxed{Case 3}"
    assert completion_text("", "Case 3") == "\\boxed{Case 3}"


def test_objects_are_named_by_colour_then_size_material_shape():
    words = [  # in the order of ATTRIBUTES, not of the alphabet
        "gray large metal cylinder",
        "red small rubber sphere",
        "red small metal cube",
        "red large rubber cube",
        "blue small rubber cube",
        "blue small rubber sphere",
        "yellow small rubber cube",
    ]
    things = [make_object(text, column=float(i)) for i, text in enumerate(words)]
    shuffled = [things[i] for i in (3, 6, 0, 5, 1, 4, 2)]
    assert wording.in_naming_order(shuffled) == things
    assert wording.describe_objects(shuffled) == ", ".join(words)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_a_reader_of_the_document_finds_the_very_tree(seed, depth):
    tree = sample_tree(np.random.default_rng(seed), "L-Test", depth)
    assert read_policy(wording.policy_text(tree)) == tree.root


OBJECTS = st.builds(
    lambda *words: make_object(" ".join(words)),
    *(st.sampled_from(ATTRIBUTES[name]) for name in ("color", "size", "material", "shape")),
)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 6), st.lists(OBJECTS, min_size=1, max_size=5))
def test_the_chain_of_thought_follows_the_document(seed, depth, objects):
    tree = sample_tree(np.random.default_rng(seed), "L-Test", depth)
    policy, cot = wording.policy_text(tree), wording.chain_of_thought(tree, objects)
    visits, case = follow(tree, objects)
    steps = cot.splitlines()[1:]
    assert len(steps) == len(visits)
    for step, visit in zip(steps, visits, strict=True):
        # the question and the consequence are lines of the document as they stand
        title = f"Condition {visit.condition.section}: "
        question, *consequences = policy.split(f"# {title}")[1].splitlines()[:3]
        assert step.startswith(f"{title}{question} ")
        said = step.split(". ")[-1]
        assert f"- {said}" in consequences
        assert said.startswith(f"{visit.answer}: ")
        assert ("? none. " in step) == (not visit.answer)
    assert steps[-1].endswith(f": respond with {wording.answer(case)}")


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(OBJECTS, min_size=1, max_size=5))
def test_a_gold_completion_gets_full_marks(seed, objects):
    tree = sample_tree(np.random.default_rng(seed), "L2-Test", 2)
    gold = wording.answer(follow(tree, objects)[1])
    text = completion_text(wording.chain_of_thought(tree, objects), gold)
    grade = grade_completion(text, gold, stopped=True)
    assert (grade.accuracy, grade.format, grade.parsed, grade.reason) == (1.0, 1.0, gold, "ok")


def test_the_query_never_repeats_the_policy():
    for line in POLICY.splitlines():
        assert line not in QUERY
    assert "Condition" not in QUERY


@pytest.mark.parametrize("word", ["<think>", "</think>", "\\boxed{"])
def test_no_document_holds_the_marks_of_the_format(word):
    assert word not in POLICY
    assert word not in YES_YES
