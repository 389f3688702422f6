"""The base model's tasks: right answers, no evaluated policy, the same examples after a restart."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from data_pipelines.clevr.scene import ATTRIBUTES
from data_pipelines.clevr_policy.dataset import ClevrPolicySettings, make_policies
from data_pipelines.clevr_policy.tree import (
    PolicyTree,
    follow,
    is_held_out_name,
    is_held_out_tree,
    iter_conditions,
    sample_name,
    sample_tree,
)
from data_pipelines.clevr_policy.wording import describe_objects
from data_pipelines.example import IMAGE_MARK, Example, decode_record, encode_record
from data_pipelines.nano_base import mixture
from data_pipelines.nano_base.mixture import Phase
from data_pipelines.nano_base.scenes import scene_objects
from tests.data_pipelines.policy_reader import make_object, read_policy

PHASES = (
    Phase(0.5, (1.0, 1.0, 0.0, 0.0), (1,)),
    Phase(1.0, (0.0, 1.0, 0.0, 3.0), (1, 2)),
)


def make_scene(seed: int) -> Example:
    rng = np.random.default_rng(seed)
    things = []
    for i in range(int(rng.integers(1, 5))):
        order = ("color", "size", "material", "shape")
        words = [str(rng.choice(ATTRIBUTES[name])) for name in order]
        things.append(make_object(" ".join(words), column=10.0 * i))
    objects = [dataclasses.asdict(thing) for thing in things]
    # through a record, as training reads it
    return decode_record(encode_record(Example(str(seed), (), "", "", meta={"objects": objects})))


def test_a_scene_brings_back_its_objects():
    scene = make_scene(3)
    assert [dataclasses.asdict(thing) for thing in scene_objects(scene)] == [
        {
            **fields,
            "position": tuple(fields["position"]),
            "pixel_coords": tuple(fields["pixel_coords"]),
        }
        for fields in scene.meta["objects"]
    ]


def test_existence_answers_are_right_by_brute_force():
    counts = collections.Counter()
    for seed in range(150):
        scene = make_scene(seed)
        example = mixture.make_existence(np.random.default_rng(seed), scene)
        questions = re.findall(r"(\d)\. any ([^?]*)\?", example.query)
        answers = re.findall(r"(\d)\. (True|False)", example.answer)
        assert [number for number, _ in questions] == [number for number, _ in answers]
        assert len(questions) == 4
        for (_, asked), (_, said) in zip(questions, answers, strict=True):
            wanted = [pair.split() for pair in asked.split(" and ")]
            assert 1 <= len(wanted) <= 3
            hits = [
                fields
                for fields in scene.meta["objects"]
                if all(fields[attribute] == value for attribute, value in wanted)
            ]
            assert said == str(bool(hits))
            counts[said] += 1
    # half are True for sure; in the others one value is changed, which often exists, too
    assert 0.6 < counts["True"] / counts.total() < 0.85


def test_a_caption_names_every_object():
    scene = make_scene(8)
    example = mixture.make_caption(np.random.default_rng(0), scene)
    assert example.answer == f"I see: {describe_objects(scene_objects(scene))}."
    assert example.query in mixture.CAPTION_QUERIES


def test_policies_are_never_of_the_evaluated_half_and_their_answers_are_right():
    depths = collections.Counter()
    for seed in range(120):
        scene = make_scene(seed)
        example = mixture.make_policy_question(np.random.default_rng(seed), scene, (1, 2, 3))
        depth = example.meta["depth"]
        depths[depth] += 1
        tree = PolicyTree(example.policy_name, depth, read_policy(example.policy_text), 0)
        assert not is_held_out_name(example.policy_name)
        assert not is_held_out_tree(tree)
        assert example.policy_name in example.query
        visits, case = follow(tree, scene_objects(scene))
        assert example.answer == f"Case {case}"
        assert example.meta["path"] == [visit.condition.section for visit in visits]
        assert example.cot == example.meta["gold_cot"]
        assert example.cot.endswith(f": respond with {example.answer}")
    assert set(depths) == {1, 2, 3}


def test_evaluated_policies_are_of_the_other_half():
    settings = ClevrPolicySettings(policies=3, train_per_policy=1, cot_per_policy=0, test=3)
    policies = make_policies(settings)
    assert len({policy.name for policy in policies}) == 3
    assert all(is_held_out_name(policy.name) for policy in policies)
    assert all(is_held_out_tree(policy) for policy in policies)
    # both halves exist: the sampler alone does not keep out of the held-out one
    rng = np.random.default_rng(0)
    drawn = [sample_tree(rng, sample_name(rng, 2, held_out=False), 2) for _ in range(50)]
    assert {is_held_out_tree(tree) for tree in drawn} == {True, False}


def test_the_task_of_a_step_depends_on_seed_and_step_only():
    def tasks(seed):
        return [mixture.task_of_step(step, 400, PHASES, seed) for step in range(400)]

    assert tasks(0) == tasks(0)
    assert tasks(0) != tasks(1)
    first, second = collections.Counter(tasks(0)[:200]), collections.Counter(tasks(0)[200:])
    # shares (1, 1, 0) and (0, 1, 3), 200 draws each: 5 standard deviations are 35 and 31
    assert first["policy"] == 0
    assert abs(first["caption"] - 100) < 36
    assert second["caption"] == 0
    assert abs(second["policy"] - 150) < 32


@pytest.mark.parametrize(
    ("step", "phase"), [(0, 0), (199, 0), (200, 1), (399, 1), (400, 1), (1000, 1)]
)
def test_a_phase_lasts_until_its_share_of_the_run(step, phase):
    assert mixture.phase_of_step(step, 400, PHASES) is PHASES[phase]


@pytest.mark.parametrize("make", [mixture.make_caption, mixture.make_existence])
def test_equal_generators_give_equal_examples(make):
    scene = make_scene(4)
    first = make(np.random.default_rng(7), scene)
    assert make(np.random.default_rng(7), scene) == first
    others = [make(np.random.default_rng(seed), scene) for seed in range(8, 20)]
    assert any(other != first for other in others)


def test_a_policy_question_is_fresh_for_every_generator():
    scene = make_scene(4)
    first = mixture.make_policy_question(np.random.default_rng(7), scene, (2,))
    assert mixture.make_policy_question(np.random.default_rng(7), scene, (2,)) == first
    other = mixture.make_policy_question(np.random.default_rng(8), scene, (2,))
    assert other.policy_text != first.policy_text


def test_names_that_come_again_have_other_trees():
    drawn = [mixture.draw_policy(np.random.default_rng(seed), 2) for seed in range(400)]
    trees = collections.defaultdict(list)
    for policy in drawn:
        trees[policy.tree.name].append(policy.tree.root)
        assert not is_held_out_name(policy.tree.name)
        assert not is_held_out_tree(policy.tree)
    reused = {name: found for name, found in trees.items() if len(found) >= 3}
    # half of 400 policies share 32 names; the others have about 3,000 names to themselves
    assert len(reused) >= 25
    assert sum(len(found) for found in reused.values()) > 150
    assert all(len(set(map(str, found))) > 1 for found in reused.values())


def test_a_policy_shows_the_asked_share_of_its_values_and_the_question_follows_it():
    for seed in range(20):
        policy = mixture.draw_policy(np.random.default_rng(seed), 3, shown_share=0.5)
        conditions = list(iter_conditions(policy.tree.root))
        assert len(policy.shown) == max(1, round(len(conditions) / 2))
        example = mixture.ask_policy(policy, make_scene(seed))
        assert example.policy_text.count(IMAGE_MARK) == len(policy.shown)
        visits, case = follow(policy.tree, scene_objects(make_scene(seed)))
        assert example.answer == f"Case {case}"
        seen = sum(visit.condition in policy.shown for visit in visits)
        assert example.cot.count("(pictured)") == seen


def test_sections_in_any_order_are_those_of_the_policy_and_pictures_come_in_their_order():
    moved = 0
    for seed in range(20):
        plain, policy = (
            mixture.draw_policy(np.random.default_rng(seed), 3, shown_share=0.5, shuffled=shuffled)
            for shuffled in (False, True)
        )
        assert plain.tree == policy.tree
        assert set(plain.shown) == set(policy.shown)
        first, *sections = policy.text.split("\n# ")
        assert [first, *sorted(sections)] == [first, *sorted(plain.text.split("\n# ")[1:])]
        pictured = [text.partition(":")[0] for text in sections if IMAGE_MARK in text]
        assert pictured == [f"Condition {section}" for section in policy.shown_sections]
        assert mixture.ask_policy(policy, make_scene(seed)).policy_text == policy.text
        assert mixture.ask_policy(policy, make_scene(seed)).cot == (
            mixture.ask_policy(plain, make_scene(seed)).cot
        )
        moved += policy.text != plain.text
    assert moved > 15


def test_a_recited_section_is_a_section_of_the_policy():
    kinds = collections.Counter()
    for seed in range(40):
        policy = mixture.draw_policy(np.random.default_rng(seed), 2, shown_share=0.5 * (seed % 2))
        example = mixture.recite_section(np.random.default_rng(seed), policy)
        sections = example.policy_text.split("\n# ")[1:]
        asked = example.query.removeprefix("What is ").removesuffix("?")
        asked, _, verdict = asked.partition(" after ")
        if verdict:
            whole = next(text for text in sections if text.startswith(f"{asked}: "))
            question, *consequences = whole.splitlines()
            assert example.answer.startswith(f"{question} {verdict}: ")
            assert f"- {example.answer.removeprefix(question + ' ')}" in consequences
        else:
            assert example.answer.removeprefix("# ") in sections
            assert example.answer.startswith(f"# {asked}: any ")
        kinds[verdict] += 1
        assert not example.images
    assert kinds[""] > 10 < kinds["True"] + kinds["False"]
    assert kinds["True"] and kinds["False"]


def test_a_filter_names_the_objects_that_match_one_condition_after_the_other():
    counts = collections.Counter()
    for seed in range(120):
        example = mixture.make_filter(np.random.default_rng(seed), make_scene(seed))
        first, *asked = example.query.splitlines()
        listed = first.removeprefix("I see: ").removesuffix(".").split(", ")
        focus = {thing.split()[-1]: thing.split()[:-1] for thing in listed}
        assert list(focus) == list("ABCDEFGH"[: len(listed)])
        counts[len(listed)] += 1
        counts[f"{len(asked)} Conditions"] += 1
        for question, said in zip(asked, example.answer.splitlines(), strict=True):
            value = question.removesuffix("?").split()[-1]
            matching = {letter: words for letter, words in focus.items() if value in words}
            named = ", ".join(matching) or "none"
            assert said == f"{question} {named}. {bool(matching)}"
            counts[bool(matching)] += 1
            focus = matching or focus
    assert counts[1] > 10
    assert all(counts[f"{number} Conditions"] > 3 for number in range(1, mixture.MOST_FILTERS + 1))
    assert counts[False] > 20 < counts[True]
