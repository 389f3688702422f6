"""The rules of a decision tree, counted by hand and held on random trees."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.clevr.scene import ATTRIBUTES, Scene
from data_pipelines.clevr_policy import tree as trees
from data_pipelines.clevr_policy.tree import Case, Condition
from tests.data_pipelines.policy_reader import (
    BLUE_SPHERE,
    GREEN_CUBE,
    RED_CUBE,
    RED_CYLINDER,
    TREE,
    make_object,
)

SEEDS = st.integers(0, 2**32 - 1)


def sample(seed: int, depth: int) -> trees.PolicyTree:
    return trees.sample_tree(np.random.default_rng(seed), "L-Test", depth)


# Depth 6 by hand. A full tree has 64 leaves. A path ends early where all four attributes are used:
#   yes yes yes yes: ends at depth 4, one leaf in the place of four                    64 - 3 = 61
#   four yes in five, the last one a yes (no can be 1st, 2nd, 3rd, 4th): 4 x (2 -> 1)  61 - 4 = 57
#   size, both values no, the rest yes; material likewise: 2 x (2 -> 1)                57 - 2 = 55
@pytest.mark.parametrize(("depth", "cases"), [(1, 2), (2, 4), (4, 16), (6, 55)])
def test_the_number_of_cases_is_the_papers(depth, cases):
    for seed in range(60):
        tree = sample(seed, depth)
        assert tree.num_cases == cases
        assert sorted(trees.case_numbers(tree.root)) == list(range(1, cases + 1))


def check_rules(node, section: str, allowed: dict[str, set[str]], depth: int):
    """A yes retires the attribute below it, a no the value; sections name the path."""
    open_values = {a: values for a, values in allowed.items() if values}
    if isinstance(node, Case):
        assert depth == 0 or not open_values
        return
    assert depth > 0
    assert node.section == section
    assert node.value in open_values[node.attribute]
    check_rules(node.if_true, f"{section}.1", allowed | {node.attribute: set()}, depth - 1)
    fewer = allowed[node.attribute] - {node.value}
    check_rules(node.if_false, f"{section}.2", allowed | {node.attribute: fewer}, depth - 1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 7))
def test_a_yes_retires_the_attribute_and_a_no_the_value(seed, depth):
    tree = sample(seed, depth)
    everything = {attribute: set(values) for attribute, values in ATTRIBUTES.items()}
    check_rules(tree.root, "1", everything, depth)


def test_every_attribute_is_asked_first_equally_often():
    # uniform over the four attributes: 500 of 2000 each, +-5 standard deviations (19.4 each)
    first = [sample(seed, 1).root.attribute for seed in range(2000)]
    counts = {attribute: first.count(attribute) for attribute in ATTRIBUTES}
    assert all(abs(count - 500) < 97 for count in counts.values()), counts


def test_equal_seeds_give_equal_trees():
    assert sample(5, 4) == sample(5, 4)
    assert sample(5, 4) != sample(6, 4)


@pytest.mark.parametrize("depth", [0, -1, 11])
def test_a_depth_out_of_range_is_an_error(depth):
    with pytest.raises(ValueError, match=rf"depth must be in 1\.\.10, got {depth}"):
        sample(0, depth)


@pytest.mark.parametrize(
    ("objects", "answers", "focus", "case"),
    [
        # red? yes, two of them; a cube among these two? yes -> Case 3
        ((RED_CUBE, BLUE_SPHERE, RED_CYLINDER), (True, True), (RED_CUBE,), 3),
        # the green cube is out of focus after "red", so "cube" is a no -> Case 1
        ((RED_CYLINDER, GREEN_CUBE), (True, False), (RED_CYLINDER,), 1),
        # nothing red: the focus stays; the green cube is small -> Case 4
        ((BLUE_SPHERE, GREEN_CUBE), (False, True), (GREEN_CUBE,), 4),
        # nothing red, nothing small: the focus is still everything -> Case 2
        ((BLUE_SPHERE,), (False, False), (BLUE_SPHERE,), 2),
    ],
)
def test_following_a_tree_by_hand(objects, answers, focus, case):
    visits, found = trees.follow(TREE, objects)
    assert found == case
    assert tuple(visit.answer for visit in visits) == answers
    assert visits[-1].focus == focus
    assert [visit.condition.section for visit in visits] == ["1", "1.1" if answers[0] else "1.2"]


OBJECTS = st.builds(
    lambda *words: make_object(" ".join(words)),
    *(st.sampled_from(ATTRIBUTES[name]) for name in ("color", "size", "material", "shape")),
)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 6), st.lists(OBJECTS, min_size=1, max_size=6))
def test_the_focus_only_narrows_and_order_does_not_matter(seed, depth, objects):
    tree = sample(seed, depth)
    visits, case = trees.follow(tree, objects)
    before = set(objects)
    for visit in visits:
        asked = {
            o for o in before if getattr(o, visit.condition.attribute) == visit.condition.value
        }
        assert visit.answer == bool(asked)
        assert set(visit.focus) == (asked or before)
        before = set(visit.focus)
    assert trees.follow(tree, objects[::-1])[1] == case


def test_conditions_come_in_reading_order():
    sections = [node.section for node in trees.iter_conditions(TREE.root)]
    assert sections == ["1", "1.1", "1.2"]
    assert trees.case_numbers(TREE.root) == [3, 1, 4, 2]


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_an_override_is_another_tree_of_the_same_name_and_depth(seed, depth):
    tree = sample(seed, depth)
    # the same generator state would draw the very same tree first
    other = trees.sample_override(np.random.default_rng(seed), tree)
    assert other.root != tree.root
    assert (other.name, other.depth) == (tree.name, tree.depth)


def test_case_shares_count_every_case():
    scenes = [
        Scene("a", (RED_CUBE,)),  # Case 3
        Scene("b", (RED_CUBE, BLUE_SPHERE)),  # Case 3
        Scene("c", (BLUE_SPHERE,)),  # Case 2
        Scene("d", (GREEN_CUBE,)),  # Case 4
    ]
    assert trees.case_shares(TREE, scenes) == {1: 0.0, 2: 0.25, 3: 0.5, 4: 0.25}


def test_a_balanced_tree_is_the_best_of_its_candidates():
    rng = np.random.default_rng(0)
    words = [[str(rng.choice(ATTRIBUTES[a])) for a in ATTRIBUTES] for _ in range(120)]
    things = [make_object(f"{c} {z} {m} {s}") for s, c, z, m in words]
    scenes = [Scene(str(i), tuple(things[i : i + 3])) for i in range(0, 120, 3)]

    def judge(tree):  # cases with at least a quarter of an even share, then the largest share
        shares = trees.case_shares(tree, scenes).values()
        return -sum(share >= 0.25 / 4 for share in shares), max(shares)

    better = 0
    for seed in range(5):
        chosen = trees.sample_balanced_tree(
            np.random.default_rng(seed), "L-Test", 2, scenes, candidates=8
        )
        rng = np.random.default_rng(seed)
        candidates = [trees.sample_tree(rng, "L-Test", 2) for _ in range(8)]
        assert chosen in candidates
        assert judge(chosen) == min(map(judge, candidates))
        better += judge(chosen) < judge(candidates[0])
    assert better  # balancing does something


def test_reachable_cases_by_hand():
    # small? no -> large? no: nothing left that a scene could show
    tree = trees.PolicyTree(
        "L-Test",
        2,
        Condition(
            "1",
            "size",
            "small",
            Case(1),
            Condition("1.2", "size", "large", Case(2), Case(3)),
        ),
        3,
    )
    assert trees.reachable_cases(tree) == [1, 2]
    assert trees.reachable_cases(TREE) == [1, 2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_reachable_cases_are_those_that_one_object_or_more_reach(seed, depth):
    tree = sample(seed, depth)
    everything = [
        make_object(f"{color} {size} {material} {shape}")
        for color in ATTRIBUTES["color"]
        for size in ATTRIBUTES["size"]
        for material in ATTRIBUTES["material"]
        for shape in ATTRIBUTES["shape"]
    ]
    reached = {trees.follow(tree, [thing])[1] for thing in everything}
    assert sorted(reached) == trees.reachable_cases(tree)


def test_names_fall_into_two_disjoint_halves():
    def names(held_out):
        rng = np.random.default_rng(0)
        return {trees.sample_name(rng, 2, held_out=held_out) for _ in range(300)}

    judged, training = names(True), names(False)
    assert min(len(judged), len(training)) > 100
    assert not judged & training
    assert all(trees.is_held_out_name(name) for name in judged)
    assert not any(trees.is_held_out_name(name) for name in training)
    assert all(name.startswith("L2-") and name[3:].istitle() for name in judged | training)


def test_the_depth_in_a_name_does_not_move_it_to_the_other_half():
    for name in ("Karitu", "Bosena", "Mipavo"):
        halves = {trees.is_held_out_name(f"L{depth}-{name}") for depth in (1, 2, 6)}
        assert halves == {trees.is_held_out_name(name)}


def test_trees_fall_into_halves_by_their_questions_only():
    held_out = [trees.is_held_out_tree(sample(seed, 2)) for seed in range(200)]
    assert 60 < sum(held_out) < 140
    for seed in range(20):
        tree = sample(seed, 3)
        renumbered = dataclasses.replace(
            tree, name="L3-Other", root=trees._number_cases(tree.root, iter(range(8, 0, -1)))
        )
        assert trees.is_held_out_tree(renumbered) == trees.is_held_out_tree(tree)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_a_tree_survives_json(seed, depth):
    root = sample(seed, depth).root
    assert trees.tree_from_json(json.loads(json.dumps(trees.tree_to_json(root)))) == root


def test_the_hand_made_tree_keeps_its_sections():
    assert isinstance(TREE.root, Condition)
    everything = {attribute: set(values) for attribute, values in ATTRIBUTES.items()}
    check_rules(TREE.root, "1", everything, 2)
