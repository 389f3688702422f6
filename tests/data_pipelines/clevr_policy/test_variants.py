"""Variant -M and the splits that ask for more: what is in them, and that they ask for more."""

import dataclasses
import re

import numpy as np
import pytest

from data_pipelines.clevr.scene import Scene
from data_pipelines.clevr_policy import dataset
from data_pipelines.clevr_policy.crops import Crop
from data_pipelines.clevr_policy.dataset import (
    ClevrPolicySettings,
    describe,
    documents_of,
    make_parts,
    make_range,
    make_splits,
    split_sizes,
)
from data_pipelines.clevr_policy.document import make_document
from data_pipelines.clevr_policy.supply import COLORS_OF, SceneWish, fits, recolor
from data_pipelines.clevr_policy.tree import follow, reachable_cases
from data_pipelines.clevr_policy.wording import SHOWN_INSTRUCTION, answer, chain_of_thought
from data_pipelines.example import IMAGE_MARK, decode_image
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

SETTINGS = ClevrPolicySettings(
    variant="M",
    depth=2,
    policies=2,
    train_per_policy=4,
    cot_per_policy=2,
    test=4,
    validation=4,
    override=4,
    cogent_b=4,
    more_objects=4,
    deeper=3,
    crop_px=28,
    width=56,
    height=56,
    max_objects=4,
    supersample=1,
    seed=3,
)
HARDER = ("validation", "override", "cogent_b", "more_objects", "deeper")


@pytest.fixture(scope="module")
def splits():
    return {name: list(examples) for name, examples in make_splits(SETTINGS).items()}


POLICY_M = """\
The policy of L2-Karitu. Start at Condition 1 with every object in focus. After True only the \
matching objects stay in focus; after False the focus stays. A value given as a picture is that of \
the object in it; all pictures have the same scale.
# Condition 1: any color <image>?
- True: go to Condition 1.1
- False: go to Condition 1.2
# Condition 1.1: any shape cube?
- True: respond with Case 3
- False: respond with Case 1
# Condition 1.2: any size <image>?
- True: respond with Case 4
- False: respond with Case 2"""

COT_M = """\
I see: blue large rubber sphere A, green small rubber cube B.
Condition 1: any color red (pictured)? none. False: go to Condition 1.2
Condition 1.2: any size small (pictured)? B. True: respond with Case 4"""


def test_the_wording_of_variant_m():
    red, small = Crop("1", RED_CUBE, b"red"), Crop("1.2", GREEN_CUBE, b"small")
    document = make_document(TREE, (red, small))
    assert document.text == POLICY_M
    assert document.images == (b"red", b"small")
    assert chain_of_thought(TREE, (GREEN_CUBE, BLUE_SPHERE), document.shown) == COT_M
    in_words = POLICY_M.replace(SHOWN_INSTRUCTION, "").replace("color <image>", "color red")
    assert make_document(TREE).text == in_words.replace("size <image>", "size small")


def test_splits_have_the_sizes_asked_for(splits):
    assert {name: len(rows) for name, rows in splits.items()} == split_sizes(SETTINGS)
    assert list(splits) == ["train", "cot", "test", *HARDER]
    parts = make_parts(SETTINGS)
    for split, size in split_sizes(SETTINGS).items():
        assert sum(part.counts.get(split, 0) for part in parts) == size
    assert not set(HARDER) & set(split_sizes(ClevrPolicySettings()))


def test_marks_and_pictures_agree_and_name_the_tree(splits):
    for split, rows in splits.items():
        documents = {d.tree.name: d for d in documents_of(SETTINGS, split)}
        for example in rows:
            document = documents[example.policy_name]
            assert example.policy_text.count(IMAGE_MARK) == len(example.policy_images) > 0
            assert all(decode_image(p).shape == (28, 28, 3) for p in example.policy_images)
            # with each picture read as the value of its object, the text is the tree
            text = example.policy_text
            for crop in document.crops:
                attribute = re.search(rf"any (\w+) {IMAGE_MARK}\?", text)
                assert attribute is not None
                value = getattr(crop.thing, attribute[1])
                text = text.replace(IMAGE_MARK, value, 1)
            assert read_policy(text) == document.tree.root
            # the chain of thought names what the pictures show, and only those
            pictured = re.findall(r"Condition ([\d.]+): any \w+ \w+ \(pictured\)", example.cot)
            assert pictured == [
                s for s in example.meta["path"] if s in document.shown and example.cot
            ]
            assert example.meta["task"] == "clevr_policy_m"


def test_gold_completions_are_right_in_every_split(splits):
    for rows in splits.values():
        for example in rows:
            text = f"<think>{example.meta['gold_cot']}</think>\\boxed{{{example.answer}}}"
            assert grade_completion(text, example.answer, stopped=True).reason == "ok"
            assert example.meta["gold_cot"].endswith(f"respond with {example.answer}")


def test_any_range_is_made_as_in_the_whole(splits):
    for split in ("train", "test", "deeper"):
        made = make_range(SETTINGS, split, 1, 3)
        assert made[split] == splits[split][1:3]
    assert make_range(SETTINGS, "train", 1, 2)["cot"] == splits["cot"][1:2]
    assert "cot" not in make_range(SETTINGS, "train", 2, 4)


def test_held_out_splits_ask_the_policies_in_turn(splits):
    for split in ("test", *HARDER):
        names = [example.policy_name for example in splits[split]]
        first, second = (document.tree.name for document in documents_of(SETTINGS, split))
        assert names == [first, second, first, second][: len(names)]


def test_no_scene_of_the_validation_split_is_in_another(splits):
    scenes = {
        name: {example.meta["scene_id"] for example in rows}
        | {example.images[0] for example in rows}
        for name, rows in splits.items()
    }
    for name in scenes.keys() - {"validation"}:
        assert not scenes["validation"] & scenes[name], name
    assert {e.policy_text for e in splits["validation"]} == {e.policy_text for e in splits["test"]}
    assert not any(example.meta.get("policy_in_prompt") for example in splits["validation"])


def test_override_changes_the_tree_under_the_same_name(splits):
    trained = {d.tree.name: d.tree for d in documents_of(SETTINGS, "train")}
    for document in documents_of(SETTINGS, "override"):
        assert document.tree.root != trained[document.tree.name].root
        assert document.tree.depth == SETTINGS.depth
    texts = {e.policy_name: e.policy_text for e in splits["train"]}
    for example in splits["override"]:
        assert example.policy_text != texts[example.policy_name]
        assert example.meta["policy_in_prompt"] is True
        assert re.fullmatch(r"Case \d", example.meta["trained_answer"])
    for split in ("train", "test", "cogent_b", "more_objects"):
        assert all("policy_in_prompt" not in e.meta for e in splits[split])
        assert {e.policy_text for e in splits[split]} == set(texts.values())


def test_the_trained_answer_is_what_the_trained_policy_says():
    settings = dataclasses.replace(SETTINGS, variant="T", crop_px=56, override=20)
    scenes = dataset._held_out_scenes(settings, "override", 0)
    old, new = (documents_of(settings, split)[0].tree for split in ("train", "override"))
    differ = 0
    made = make_range(settings, "override", 0, 20)["override"][0::2]
    for example, scene in zip(made, scenes, strict=True):
        assert example.answer == answer(follow(new, scene.objects)[1])
        assert example.meta["trained_answer"] == answer(follow(old, scene.objects)[1])
        differ += example.answer != example.meta["trained_answer"]
    assert differ > 3


def seen_combinations(rows):
    """(colour, shape) of everything that the thoughts say they see."""
    found = set()
    for example in rows:
        line = example.meta["gold_cot"].splitlines()[0].removeprefix("I see: ").rstrip(".")
        for thing in line.split(", "):
            color, _, _, shape, _ = thing.split()
            found.add((color, shape))
    return found


def test_cogent_b_has_combinations_that_nothing_else_has(splits):
    a = [row for split in splits if split != "cogent_b" for row in splits[split]]
    for rows, name in ((a, "cogent_a"), (splits["cogent_b"], "cogent_b")):
        found = seen_combinations(rows)
        assert all(color in COLORS_OF[name][shape] for color, shape in found)
        assert len({color for color, shape in found if shape != "sphere"}) > 3
    boxes = {pair for pair in seen_combinations(splits["cogent_b"]) if pair[1] != "sphere"}
    assert boxes and not boxes & seen_combinations(a)


def test_more_objects_are_more_than_anywhere_else(splits):
    counts = {name: {e.meta["num_objects"] for e in rows} for name, rows in splits.items()}
    assert counts.pop("more_objects") <= {5, 6, 7}
    assert set.union(*counts.values()) <= {3, 4}


def test_deeper_policies_are_new_and_deeper(splits):
    for example in splits["deeper"]:
        assert example.meta["depth"] == 4 and example.policy_name.startswith("L4-")
        assert example.meta["policy_in_prompt"] is True
        assert "trained_answer" not in example.meta


def test_recolouring_keeps_everything_but_colours():
    scene = Scene("s", (RED_CUBE, RED_CYLINDER, BLUE_SPHERE) * 20)
    for combinations in ("cogent_a", "cogent_b"):
        found = recolor(scene, combinations, [1, 2])
        allowed = COLORS_OF[combinations]
        assert all(thing.color in allowed[thing.shape] for thing in found.objects)
        same = [dataclasses.replace(t, color="red") for t in found.objects]
        assert same == [dataclasses.replace(t, color="red") for t in scene.objects]
        assert len({t.color for t in found.objects if t.shape == "cube"}) == 4
        assert found == recolor(scene, combinations, [1, 2])
    # A and B share no cube and no cylinder; together they have every one
    for shape in ("cube", "cylinder"):
        one, other = COLORS_OF["cogent_a"][shape], COLORS_OF["cogent_b"][shape]
        assert not set(one) & set(other) and len({*one, *other}) == 8


def test_recorded_scenes_are_chosen_by_what_is_in_them():
    wish = SceneWish("test0", 1, 2, 3, "cogent_a")
    gray_cube, red_cube = make_object("gray small metal cube"), RED_CUBE
    assert fits(Scene("a", (gray_cube, BLUE_SPHERE)), wish)
    assert not fits(Scene("b", (red_cube, BLUE_SPHERE)), wish)  # red cubes are condition B
    assert not fits(Scene("c", (gray_cube,)), wish)
    assert not fits(Scene("d", (gray_cube,) * 4), wish)


def test_test_scenes_are_topped_up_with_the_cases_they_lack():
    settings = ClevrPolicySettings(
        depth=4, policies=1, train_per_policy=1, cot_per_policy=0, test=30
    )
    tree = documents_of(settings, "test")[0].tree
    scenes = dataset._held_out_scenes(settings, "test", 0)
    wish = dataset._wishes(settings)["test"][0]
    natural = dataset.make_supply(settings).take(wish, 0, 30)
    cases = [{follow(tree, s.objects)[1] for s in these} for these in (natural, scenes)]
    assert len(cases[0]) < len(cases[1]) <= len(reachable_cases(tree))
    assert len(scenes) == len({scene.scene_id for scene in scenes}) == 30
    kept = sum(a == b for a, b in zip(natural, scenes, strict=True))
    assert kept >= 30 - (len(cases[1]) - len(cases[0]))  # no more is exchanged than needed
    line = describe(settings)[0]
    assert line.startswith("test: 1 policies of depth 4, 16 distinct responses each")
    assert line.endswith(f"{len(cases[1])} occur in 30 examples")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "X"}, "variant must be one of"),
        ({"variant": "T"}, r"\['crop_px'\] have an effect in variant M only"),
        ({"crop_px": 40}, "crop_px must be a multiple of 28"),
        ({"shown_share": 0.0}, "shown_share must be in"),
        ({"crops": "cut"}, "needs the images of a clevr_dir"),
        ({"crops": "drawn"}, "crops must be one of"),
        ({"override": 1}, "override must be 0 or at least one image a policy"),
        ({"depth": 9}, "deeper needs trees of depth 11"),
        ({"depth": 11}, r"tree depth must be in 1\.\.10"),
        ({"clevr_dir": "x"}, "supersample has no effect"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_variant_t_has_no_pictures_and_is_the_default():
    settings = dataclasses.replace(SETTINGS, variant="T", crop_px=56)
    for document in documents_of(settings, "train"):
        assert document.images == () and IMAGE_MARK not in document.text
    assert ClevrPolicySettings().variant == "T"
    # the same seed gives both variants the same trees
    trees = [[d.tree for d in documents_of(s, "train")] for s in (settings, SETTINGS)]
    assert trees[0] == trees[1]
    assert np.all([d.shown for d in documents_of(SETTINGS, "train")])
