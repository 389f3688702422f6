"""A small ClevrPolicy dataset: sizes, true answers, seeds, and a CLEVR folder as its source."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene_files import (
    clevr_folder_scenes,
    load_clevr_scenes,
    save_clevr_scenes,
)
from data_pipelines.clevr_policy.dataset import (
    ClevrPolicySettings,
    make_policies,
    make_splits,
    recipe,
)
from data_pipelines.clevr_policy.tree import tree_to_json
from data_pipelines.example import decode_image, decode_record, encode_png, encode_record

SETTINGS = ClevrPolicySettings(
    depth=2,
    policies=2,
    train_per_policy=6,
    cot_per_policy=3,
    test=4,
    width=56,
    height=56,
    min_objects=3,
    max_objects=4,
    supersample=1,
    seed=3,
)
REAL_SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "clevr_real_sample"


def build(settings):
    """All splits, in the order in which the writer consumes them."""
    return {name: list(examples) for name, examples in make_splits(settings).items()}


@pytest.fixture(scope="module")
def splits():
    return build(SETTINGS)


def test_the_splits_have_the_sizes_asked_for(splits):
    assert {name: len(examples) for name, examples in splits.items()} == {
        "train": 12,
        "cot": 6,
        "test": 4,
    }
    for name, each in (("train", 6), ("cot", 3), ("test", 2)):
        policies = collections.Counter(example.policy_name for example in splits[name])
        assert list(policies.values()) == [each, each]


def test_images_are_pictures_of_the_size_asked_for(splits):
    for example in splits["train"] + splits["test"]:
        pixels = decode_image(example.images[0])
        assert pixels.shape == (56, 56, 3)
        assert pixels.std() > 5  # not one colour
    assert len({example.images for example in splits["train"]}) == 12


def test_answers_paths_and_names_agree_with_the_policies(splits):
    policies = {policy.name: policy for policy in make_policies(SETTINGS)}
    for example in splits["train"] + splits["test"]:
        policy = policies[example.policy_name]
        assert example.meta["tree"] == tree_to_json(policy.root)
        assert example.meta["gold_cot"].endswith(f": respond with {example.answer}")
        assert example.policy_name in example.query
        assert "# Condition" not in example.query
        sections = [
            line.split()[1].rstrip(":") for line in example.meta["gold_cot"].split("\n")[1:]
        ]
        assert sections == example.meta["path"]


def test_the_cot_split_is_the_first_of_train_with_its_chain_of_thought(splits):
    assert all(example.cot == "" for example in splits["train"] + splits["test"])
    train = {example.example_id: example for example in splits["train"]}
    for example in splits["cot"]:
        assert example.cot == example.meta["gold_cot"]
        assert dataclasses.replace(example, cot="") == train[example.example_id]
    first_of_each = [e.example_id for e in splits["train"][:3] + splits["train"][6:9]]
    assert [example.example_id for example in splits["cot"]] == first_of_each


def test_no_test_scene_is_in_train(splits):
    train = {example.meta["scene_id"] for example in splits["train"]}
    test = {example.meta["scene_id"] for example in splits["test"]}
    assert not train & test
    assert not {e.images for e in splits["train"]} & {e.images for e in splits["test"]}


def test_the_same_seed_gives_the_same_examples_and_another_seed_others(splits):
    assert build(SETTINGS) == splits
    other = build(dataclasses.replace(SETTINGS, seed=4))
    assert not {e.images for e in other["train"]} & {e.images for e in splits["train"]}
    names = {e.policy_name for e in splits["train"]}
    assert names != {e.policy_name for e in other["train"]}


def test_examples_survive_their_records(splits):
    for example in splits["cot"]:
        assert decode_record(encode_record(example)) == example


def test_progress_counts_examples_to_the_end():
    seen = []
    settings = dataclasses.replace(
        SETTINGS, policies=1, train_per_policy=2, cot_per_policy=1, test=1
    )
    for examples in make_splits(settings, lambda done, total: seen.append((done, total))).values():
        list(examples)
    assert seen == [(3, 4), (4, 4)]  # a chain of thought is an example, too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cot_per_policy": 7}, "cot_per_policy 7 exceeds train_per_policy 6"),
        ({"min_objects": 5}, r"objects 5\.\.4 is no range"),
        ({"min_objects": 0}, r"objects 0\.\.4 is no range"),
        ({"test": 1}, "test >= policies"),
        ({"policies": 0}, "must be >= 1"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"policies.*cot_per_policy.*objects"):
        ClevrPolicySettings(policies=0, train_per_policy=1, min_objects=9, max_objects=2)


def test_a_depth_that_no_tree_has_is_an_error():
    with pytest.raises(ValueError, match="depth must be in"):
        make_policies(dataclasses.replace(SETTINGS, depth=0))


def test_the_recipe_tells_every_setting():
    told = recipe(SETTINGS)
    assert dataclasses.asdict(SETTINGS).items() <= told.items()
    assert told["dataset"] == "clevr_policy_t"
    assert told["look"] >= 2  # pictures of an older renderer are never mixed with new ones


@pytest.fixture
def clevr_folder(tmp_path):
    """CLEVR_v1.0's layout: images/SPLIT/*.png, scenes/CLEVR_SPLIT_scenes.json; flat grey images."""
    scenes = sample_scenes(0, 0, 12, min_objects=3, max_objects=4)
    (tmp_path / "scenes").mkdir()
    path = tmp_path / "scenes" / "CLEVR_val_scenes.json"
    save_clevr_scenes(scenes, path, split="val")
    images = tmp_path / "images" / "val"
    images.mkdir(parents=True)
    for i, scene in enumerate(load_clevr_scenes(path, images)):
        assert scene.image_path is not None
        encoded = encode_png(np.full((24, 32, 3), 10 * i, np.uint8))
        (images / Path(scene.image_path).name).write_bytes(encoded)
    return tmp_path


FROM_FOLDER = dataclasses.replace(
    SETTINGS, policies=2, train_per_policy=4, cot_per_policy=2, test=4, supersample=2
)


def test_a_clevr_folder_is_a_source_without_overlap(clevr_folder):
    splits = build(dataclasses.replace(FROM_FOLDER, clevr_dir=str(clevr_folder)))
    ids = [e.meta["scene_id"] for e in splits["train"] + splits["test"]]
    assert len(set(ids)) == 12  # every image of the folder once: 2 x 4 + 4
    grey = {round(decode_image(e.images[0]).mean()) for e in splits["train"] + splits["test"]}
    assert grey == {10 * i for i in range(12)}
    assert all(decode_image(e.images[0]).shape == (56, 56, 3) for e in splits["test"])


def test_a_clevr_folder_that_is_too_small_is_an_error(clevr_folder):
    settings = dataclasses.replace(FROM_FOLDER, test=5, clevr_dir=str(clevr_folder))
    with pytest.raises(ValueError, match=r"has 12 images .* too few"):
        build(settings)


def test_a_clevr_folder_without_scenes_or_images_is_an_error(clevr_folder, tmp_path_factory):
    with pytest.raises(ValueError, match=r"no scenes/\*\.json"):
        clevr_folder_scenes(tmp_path_factory.mktemp("empty"))
    for path in (clevr_folder / "images" / "val").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="none of their images"):
        clevr_folder_scenes(clevr_folder)


@pytest.mark.skipif(not REAL_SAMPLE.is_dir(), reason=f"no real CLEVR images in {REAL_SAMPLE}")
def test_real_clevr_images_are_read():
    scenes = clevr_folder_scenes(REAL_SAMPLE)
    assert len(scenes) >= 10
    settings = dataclasses.replace(
        SETTINGS,
        policies=1,
        train_per_policy=4,
        cot_per_policy=2,
        test=2,
        min_objects=2,
        supersample=2,
        clevr_dir=str(REAL_SAMPLE),
    )
    splits = build(settings)
    for example in splits["train"] + splits["test"]:
        assert decode_image(example.images[0]).std() > 5
