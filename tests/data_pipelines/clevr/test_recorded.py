"""Recorded pictures: a CLEVR folder and the tfds builder give the same scenes and bytes."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.clevr.recorded import read_picture, recorded_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import Scene
from data_pipelines.clevr.scene_files import save_clevr_scenes
from data_pipelines.clevr_policy.dataset import ClevrPolicySettings, make_splits
from data_pipelines.example import decode_image, encode_png
from tests.data_pipelines.clevr.prepared_tfds import prepare

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "clevr_real_sample"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real CLEVR sample at {REAL}")
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="tensorflow-datasets is absent"
)
SCENES = sample_scenes(5, 0, 5, id_prefix="CLEVR_train")
PICTURES = [encode_png(np.full((240, 320, 3), 40 * i, np.uint8)) for i in range(5)]


@pytest.fixture(scope="module")
def clevr_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "CLEVR_v1.0"
    (folder / "images/train").mkdir(parents=True)
    (folder / "scenes").mkdir()
    save_clevr_scenes(SCENES, folder / "scenes/CLEVR_train_scenes.json")
    for scene, picture in zip(SCENES[:4], PICTURES, strict=False):  # the fifth has no picture
        (folder / f"images/train/{scene.scene_id}.png").write_bytes(picture)
    return folder


def without_path(scene):
    return dataclasses.replace(scene, image_path=None)


@needs_real
def test_a_real_folder_is_read():
    scenes = recorded_scenes(str(REAL / "two_objects"))
    assert len(scenes) == 10 and {len(scene.objects) for scene in scenes} == {2}
    assert decode_image(read_picture(scenes[3])).shape == (240, 320, 3)


def test_a_folder_gives_the_scenes_that_have_a_picture(clevr_folder):
    scenes = recorded_scenes(str(clevr_folder))
    assert [scene.scene_id for scene in scenes] == [f"CLEVR_train_00000{i}" for i in range(4)]
    assert [read_picture(scene) for scene in scenes] == PICTURES[:4]


@needs_tfds
def test_the_builder_gives_the_same_scenes_as_the_folder(clevr_folder, tmp_path):
    folder = recorded_scenes(str(clevr_folder))
    pictures = [read_picture(scene) for scene in folder]
    prepare(tmp_path, "train", list(folder[:3]), pictures[:3])
    prepare(tmp_path, "validation", list(folder[3:]), pictures[3:])
    scenes = recorded_scenes(f"tfds:{tmp_path}")
    assert [scene.scene_id for scene in scenes] == [scene.scene_id for scene in folder]
    assert [read_picture(scene) for scene in scenes] == pictures
    for ours, theirs in zip(scenes, folder, strict=True):
        for a, b in zip(ours.objects, theirs.objects, strict=True):
            words = [(o.shape, o.color, o.size, o.material) for o in (a, b)]
            assert words[0] == words[1]
            np.testing.assert_allclose(a.position, b.position, rtol=1e-6)
            np.testing.assert_allclose(a.rotation, b.rotation, rtol=1e-6)
        np.testing.assert_allclose(ours.camera_jitter, theirs.camera_jitter, atol=1e-3)


@needs_tfds
def test_a_dataset_is_built_on_the_builder(clevr_folder, tmp_path):
    scenes = list(recorded_scenes(str(clevr_folder)))
    prepare(tmp_path, "train", scenes, PICTURES[:4])
    settings = ClevrPolicySettings(
        policies=1, train_per_policy=2, cot_per_policy=1, test=2, width=32, height=24,
        clevr_dir=f"tfds:{tmp_path}",
    )  # fmt: skip
    splits = {name: list(rows) for name, rows in make_splits(settings).items()}
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "cot": 1, "test": 2}
    shown = {int(decode_image(e.images[0])[0, 0, 0]) for e in splits["train"] + splits["test"]}
    assert shown == {0, 40, 80, 120}  # every picture once


@needs_tfds
def test_a_folder_without_the_builder_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ValueError, match=r"no prepared clevr.*download_and_prepare"):
        recorded_scenes(f"tfds:{tmp_path}")


@needs_tfds
def test_a_builder_that_only_tensorflow_reads_is_refused(clevr_folder, tmp_path):
    prepare(tmp_path, "train", list(recorded_scenes(str(clevr_folder))), PICTURES[:4])
    for path in tmp_path.glob("clevr/*/*.json"):
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as tfrecord, which only TensorFlow reads"):
        recorded_scenes(f"tfds:{tmp_path}")


def test_a_picture_that_went_away_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scene s1: cannot read .*gone\.png"):
        read_picture(Scene("s1", (), image_path=str(tmp_path / "gone.png")))
    with pytest.raises(ValueError, match="scene s1 has no recorded picture"):
        read_picture(Scene("s1", ()))


def test_two_images_of_one_name_are_refused(clevr_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(clevr_folder, copy)
    (copy / "images/val").mkdir()
    shutil.copy(copy / "images/train/CLEVR_train_000002.png", copy / "images/val")
    with pytest.raises(ValueError, match="CLEVR_train_000002 has 2 images of its name"):
        recorded_scenes(str(copy))
    shutil.rmtree(copy / "images/val")
    shutil.copy(copy / "scenes/CLEVR_train_scenes.json", copy / "scenes/again.json")
    with pytest.raises(ValueError, match="is in another scene file, too"):
        recorded_scenes(str(copy))
