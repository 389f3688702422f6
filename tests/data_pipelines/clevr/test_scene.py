"""Scenes: the official files are read as recorded, and sampled scenes obey CLEVR's rules."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.clevr import geometry
from data_pipelines.clevr.camera_fit import fit_cameras
from data_pipelines.clevr.geometry import project
from data_pipelines.clevr.renderer import render_masks
from data_pipelines.clevr.sampling import (
    MARGIN,
    MIN_DIST,
    MIN_VISIBLE_FRACTION,
    POSITION_RANGE,
    sample_scenes,
    visible_fractions,
)
from data_pipelines.clevr.scene import (
    ATTRIBUTES,
    DIRECTIONS,
    RADIUS,
    Scene,
    SceneObject,
    relationships,
)
from data_pipelines.clevr.scene_files import load_clevr_scenes, save_clevr_scenes

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "clevr_real_sample"
REAL_FILES = (
    "v1.0_scene_only/scenes/CLEVR_val_scenes.json",
    "seven_objects/scenes/CLEVR_new_scenes.json",
    "two_objects/scenes/CLEVR_val_scenes.json",
)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real CLEVR sample at {REAL}")
SEEDS = st.integers(0, 2**32 - 1)


def make_object(**changes) -> SceneObject:
    plain = SceneObject(
        "cube", "red", "large", "rubber", (0.0, 0.0, 0.7), 0.0, (160.0, 120.0, 10.0)
    )
    return dataclasses.replace(plain, **changes)


def official_record() -> dict:
    entry = {
        "shape": "cube", "color": "red", "size": "large", "material": "rubber",
        "3d_coords": [0.0, 0.0, 0.7], "rotation": 10.0, "pixel_coords": [160, 98, 10.8],
    }  # fmt: skip
    return {"image_filename": "CLEVR_val_000007.png", "objects": [entry]}


def test_the_origin_projects_to_the_middle_at_its_distance():
    camera = np.array([3.0, -4.0, 12.0])  # |C| = 13
    np.testing.assert_allclose(project(np.zeros((1, 3)), camera, 320, 240), [[160, 120, 13]])


def test_a_metre_aside_is_the_focal_length_over_the_depth():
    # camera on the y axis: right is +x, up is +z; f = 35/32 * 320 = 350 px, depth 10
    pixels = project(np.array([[1.0, 0, 0], [0, 0, 1.0]]), np.array([0.0, -10.0, 0.0]), 320, 240)
    np.testing.assert_allclose(pixels, [[160 + 35, 120, 10], [160, 120 - 35, 10]])


@needs_real
def test_the_camera_gives_the_recorded_pixels_of_clevr_v1():
    (scene,) = load_clevr_scenes(REAL / REAL_FILES[0], None)
    assert (scene.width, scene.height) == (480, 320)
    positions = np.array([o.position for o in scene.objects])
    camera = np.add(geometry.CAMERA_POSITION, scene.camera_jitter)
    gap = project(positions, camera, 480, 320) - [o.pixel_coords for o in scene.objects]
    assert np.abs(gap[:, :2]).max() < 0.3  # recorded pixels are rounded: half a pixel is exact
    assert np.abs(gap[:, 2]).max() < 0.01
    assert np.abs(scene.camera_jitter).max() <= 0.5


@needs_real
def test_relationships_are_the_recorded_ones_in_every_real_scene():
    seen = 0
    for name in REAL_FILES:
        records = json.loads((REAL / name).read_text())["scenes"]
        scenes = load_clevr_scenes(REAL / name, None)
        for scene, record in zip(scenes, records, strict=True):
            recorded = {
                key: [sorted(row) for row in record["relationships"][key]] for key in DIRECTIONS
            }
            assert relationships(scene) == recorded, scene.scene_id
            seen += 1
    assert seen == 12


@needs_real
def test_real_pixels_fall_on_the_objects_of_our_masks():
    scenes = load_clevr_scenes(REAL / REAL_FILES[2], REAL / "two_objects/images/val")
    masks = render_masks(scenes, width=320, height=240)
    for scene, mask in zip(scenes, masks, strict=True):
        assert scene.image_path is not None and Path(scene.image_path).is_file()
        for number, o in enumerate(scene.objects, 1):
            assert o.pixel_coords is not None
            column, row, _ = o.pixel_coords
            assert mask[int(row), int(column)] == number


def test_relationships_by_hand():
    # right = (0.66, 0.75), behind = (-0.75, 0.66): b is 1 m along right of a, c is 0.1 m behind a
    right, behind = DIRECTIONS["right"], DIRECTIONS["behind"]
    a = make_object()
    b = make_object(position=(right[0], right[1], 0.7))
    c = make_object(position=(0.1 * behind[0], 0.1 * behind[1], 0.7))
    found = relationships(Scene("s", (a, b, c)))
    assert found["right"] == [[1], [], [1]]
    assert found["left"] == [[], [0, 2], []]
    assert found["behind"] == found["front"] == [[], [], []]  # 0.1 m is within eps 0.2


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_sampled_scenes_keep_their_distance(seed):
    for scene in sample_scenes(seed, 0, 8):
        assert 3 <= len(scene.objects) <= 10
        assert np.abs(scene.camera_jitter).max() <= 0.5
        assert np.abs(scene.light_jitter).max() <= 1.0
        for i, a in enumerate(scene.objects):
            assert all(getattr(a, name) in values for name, values in ATTRIBUTES.items())
            assert max(map(abs, a.position[:2])) <= POSITION_RANGE
            assert a.position[2] == RADIUS[a.size]
            for b in scene.objects[:i]:
                between = np.subtract(a.position, b.position)[:2]
                gap = math.hypot(*between) - RADIUS[a.size] - RADIUS[b.size]
                assert gap >= MIN_DIST
                for name in ("left", "behind"):
                    assert abs(between @ np.array(DIRECTIONS[name][:2])) >= MARGIN


def test_every_sampled_object_shows_enough_pixels():
    scenes = sample_scenes(11, 0, 24)
    masks = render_masks(scenes, width=640, height=480)  # four times CLEVR's pixels
    for scene, mask in zip(scenes, masks, strict=True):
        shares = np.bincount(mask.ravel(), minlength=len(scene.objects) + 1)[1:] / mask.size
        # the rule counts 576 samples a window: 0.9 leaves room for their grain
        assert shares.min() >= 0.9 * MIN_VISIBLE_FRACTION


def test_visible_fractions_agree_with_masks():
    scenes = sample_scenes(12, 0, 4, max_objects=5)
    masks = render_masks(scenes, width=320, height=240)
    for scene, mask, share in zip(scenes, masks, visible_fractions(scenes), strict=True):
        counts = np.bincount(mask.ravel(), minlength=len(scene.objects) + 1)[1:]
        np.testing.assert_allclose(share[: len(counts)] * mask.size, counts, rtol=0.08, atol=15)


@given(SEEDS, st.integers(0, 50), st.integers(1, 5))
@settings(max_examples=6, deadline=None)
def test_a_scene_depends_on_its_index_only(seed, start, count):
    whole = sample_scenes(seed, 0, start + count, max_objects=4)
    assert sample_scenes(seed, start, count, max_objects=4) == whole[start:]


def test_seeds_and_counts_matter():
    assert sample_scenes(0, 0, 2) != sample_scenes(1, 0, 2)
    assert sample_scenes(0, 0, 0) == []
    assert {len(s.objects) for s in sample_scenes(0, 0, 40, min_objects=3, max_objects=4)} == {3, 4}
    with pytest.raises(ValueError, match="got 5 and 4"):
        sample_scenes(0, 0, 1, min_objects=5, max_objects=4)


def test_saved_scenes_come_back(tmp_path):
    scenes = sample_scenes(5, 0, 6, id_prefix="CLEVR_own")
    save_clevr_scenes(scenes, tmp_path / "scenes.json", split="val")
    loaded = load_clevr_scenes(tmp_path / "scenes.json", tmp_path / "images")
    for before, after in zip(scenes, loaded, strict=True):
        assert after.scene_id == before.scene_id
        assert after.image_path == str(tmp_path / "images" / f"{before.scene_id}.png")
        assert (after.width, after.height) == (320, 240)
        assert relationships(after) == relationships(before)
        np.testing.assert_allclose(after.camera_jitter, before.camera_jitter, atol=0.15)
        for a, b in zip(before.objects, after.objects, strict=True):
            assert a.pixel_coords is not None and b.pixel_coords is not None
            assert dataclasses.replace(a, pixel_coords=None) == dataclasses.replace(
                b, pixel_coords=None
            )
            assert np.abs(np.subtract(a.pixel_coords, b.pixel_coords)).max() <= 1
    save_clevr_scenes(loaded, tmp_path / "again.json", split="val")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(
        (tmp_path / "scenes.json").read_text()
    )


def test_a_scene_without_pixels_is_not_saved(tmp_path):
    scene = Scene("bare", (make_object(pixel_coords=None),))
    with pytest.raises(ValueError, match=r"scenes without: \['bare'\]"):
        save_clevr_scenes([scene], tmp_path / "scenes.json")


def test_every_problem_of_a_file_is_told_at_once(tmp_path):
    wrong_color, no_name, no_place = official_record(), official_record(), official_record()
    wrong_color["objects"][0]["color"] = "pink"
    del no_name["image_filename"]
    no_place["objects"][0]["3d_coords"] = [1.0, 2.0]
    del no_place["objects"][0]["material"]
    path = tmp_path / "scenes.json"
    scenes = [official_record(), wrong_color, no_name, no_place, {"image_filename": "x.png"}]
    path.write_text(json.dumps({"scenes": scenes}))
    with pytest.raises(ValueError) as caught:
        load_clevr_scenes(path, None)
    text = str(caught.value)
    assert text.startswith("5 problems")
    for part in (
        f"{path}, scene 1: object 0: color 'pink' is not one of",
        f"{path}, scene 2: no 'image_filename'",
        f"{path}, scene 3: object 0: material None is not one of",
        f"{path}, scene 3: object 0: expected 3 numbers as '3d_coords', got [1.0, 2.0]",
        f"{path}, scene 4: expected an object with a list 'objects'",
    ):
        assert part in text


@pytest.mark.parametrize("text", ["not json", "[]", "{}", "3"])
def test_a_file_that_is_no_scenes_file_says_so(tmp_path, text):
    path = tmp_path / "scenes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a JSON object with the key 'scenes'"):
        load_clevr_scenes(path, None)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd.png", "images/a.png", 7])
def test_an_image_name_that_could_leave_the_folder_is_refused(tmp_path, name):
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps({"scenes": [official_record() | {"image_filename": name}]}))
    with pytest.raises(ValueError, match="is no plain file name"):
        load_clevr_scenes(path, tmp_path)


def test_numbers_that_are_none_and_objects_that_are_none_are_told(tmp_path):
    record = official_record()
    record["objects"][0]["3d_coords"] = [float("nan"), 0.0, 0.7]
    record["objects"].append("a cube")
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps({"scenes": [record]}))
    with pytest.raises(ValueError) as error:
        load_clevr_scenes(path, None)
    assert "expected 3 numbers as '3d_coords', got [nan, 0.0, 0.7]" in str(error.value)
    assert "object 1: expected a JSON object, got 'a cube'" in str(error.value)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_the_fit_finds_the_camera_of_exact_pixels(seed):
    # 480x320 scenes beside 320x240 ones, and one without any object
    small = sample_scenes(seed, 0, 3)
    wide = sample_scenes(seed, 3, 2, width=480, height=320)
    fitted = fit_cameras([s.objects for s in (*small, *wide)] + [()])
    for scene, (jitter, width, height) in zip((*small, *wide), fitted, strict=False):
        assert (width, height) == (scene.width, scene.height)
        np.testing.assert_allclose(jitter, scene.camera_jitter, atol=0.01)
    assert fitted[-1][0] == (0.0, 0.0, 0.0)
