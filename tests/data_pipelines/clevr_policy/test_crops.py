"""Pictures for values: what they show, at which scale, and where they are cut."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.clevr.renderer import RGB
from data_pipelines.clevr.scene import ATTRIBUTES, Scene
from data_pipelines.clevr.scene_files import clevr_folder_scenes
from data_pipelines.clevr_policy import crops
from data_pipelines.clevr_policy.crops import choose_shown, crop_window, cut_crops, render_crops
from data_pipelines.clevr_policy.tree import Case, Condition, iter_conditions, sample_tree
from data_pipelines.example import decode_image, encode_png
from tests.data_pipelines.policy_reader import make_object

REAL_SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "clevr_real_sample"


def condition(attribute, value):
    return Condition("1", attribute, value, Case(1), Case(2))


ALL_VALUES = [condition(name, value) for name, values in ATTRIBUTES.items() for value in values]


@pytest.fixture(scope="module")
def rendered():
    """Three crops of every value."""
    return render_crops(np.random.default_rng(0), ALL_VALUES * 3, 56)


def object_mask(pixels):
    """True where a pixel is not of the grey ground: coloured, or far from its brightness."""
    ground = np.median(pixels[:3].reshape(-1, 3), axis=0)
    return np.abs(pixels.astype(int) - ground).max(axis=-1) > 25


@pytest.mark.parametrize(
    ("depth", "share", "count"), [(1, 0.1, 1), (2, 0.5, 2), (2, 1, 3), (6, 0.5, 27)]
)
def test_a_share_of_the_conditions_is_shown_in_reading_order(depth, share, count):
    tree = sample_tree(np.random.default_rng(1), "L-Test", depth)
    shown = choose_shown(np.random.default_rng(2), tree, share)
    assert len(shown) == count
    order = [node.section for node in iter_conditions(tree.root)]
    places = [order.index(node.section) for node in shown]
    assert places == sorted(set(places))


def test_a_crop_shows_an_object_that_has_the_value(rendered):
    for node, crop in zip(ALL_VALUES * 3, rendered, strict=True):
        assert getattr(crop.thing, node.attribute) == node.value
        if node.attribute == "material":
            assert crop.thing.size == "large"
        pixels = decode_image(crop.png)
        assert pixels.shape == (56, 56, 3)
        mask = object_mask(pixels)
        if crop.thing.color != "gray":  # its mask is uncertain on grey ground
            assert mask[22:34, 22:34].mean() > 0.9  # it is in the middle
        assert not mask[0].any() and not mask[:, 0].any()  # and not cut off


def test_everything_but_the_value_varies(rendered):
    reds = [crop.thing for crop in rendered if crop.thing.color == "red"]
    assert len({(t.shape, t.size, t.material) for t in reds}) > 2


def test_colours_are_seen(rendered):
    for crop in rendered:
        if crop.thing.color == "gray":
            continue
        pixels = decode_image(crop.png).astype(float)
        seen = pixels[object_mask(pixels)].mean(axis=0)

        def tint(rgb):
            grey = rgb - rgb.mean()
            return grey / np.linalg.norm(grey)

        likeness = {
            name: float(tint(seen) @ tint(np.array(rgb, float)))
            for name, rgb in RGB.items()
            if name != "gray"
        }
        assert likeness[crop.thing.color] > 0.85, (crop.thing, likeness)


def test_size_is_seen_since_all_crops_have_one_scale(rendered):
    areas = {"small": [], "large": []}
    for crop in rendered:
        if crop.thing.color != "gray":
            areas[crop.thing.size].append(object_mask(decode_image(crop.png)).mean())
    assert max(areas["small"]) < 0.25 < 0.35 < min(areas["large"])


def test_the_same_generator_gives_the_same_bytes():
    one, two = (render_crops(np.random.default_rng(7), ALL_VALUES[:2], 28) for _ in range(2))
    assert one == two
    assert decode_image(one[0].png).shape == (28, 28, 3)
    assert render_crops(np.random.default_rng(8), ALL_VALUES[:2], 28) != one


# 480 px wide: focal length 35/32 * 480 = 525 px. At 10.5 m a metre is 50 px: half a window is
# 2.24 / 2 * 50 = 56 px; a small sphere at 10.5 m reaches 0.35 * 1.05 * 50 = 18.375 px.
def at(words, column, row, depth=10.5):
    return dataclasses.replace(make_object(words), pixel_coords=(column, row, depth))


@pytest.mark.parametrize(
    ("column", "row", "other", "found"),
    [
        (200.0, 150.0, None, (144.0, 94.0, 256.0, 206.0)),
        (55.0, 150.0, None, None),  # over the left edge
        (200.0, 265.0, None, None),  # over the lower edge: 265 + 56 > 320
        (200.0, 150.0, (274.0, 150.0), None),  # 74 px away: 56 + 18.375 = 74.375 are needed
        (200.0, 150.0, (275.0, 150.0), (144.0, 94.0, 256.0, 206.0)),
        (200.0, 150.0, (250.0, 225.0), (144.0, 94.0, 256.0, 206.0)),  # free above it
    ],
)
def test_windows_by_hand(column, row, other, found):
    thing = at("red small metal cube", column, row)
    others = () if other is None else (at("blue small rubber sphere", *other),)
    scene = Scene("s", (thing, *others), width=480, height=320)
    assert crop_window(scene, thing) == found


@pytest.fixture
def drawn_scene(tmp_path):
    """A red square of 40 px at (200, 150) and a blue one at (380, 150) of a 480x320 file."""
    pixels = np.full((320, 480, 3), 128, np.uint8)
    pixels[130:170, 180:220] = (200, 0, 0)
    pixels[130:170, 360:400] = (0, 0, 200)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    things = (at("red large metal cube", 200.0, 150.0), at("blue small rubber cube", 380.0, 150.0))
    return Scene("s", things, image_path=str(tmp_path / "a.png"), width=480, height=320)


def test_crops_are_cut_around_the_projected_extent(drawn_scene):
    wanted = [condition("color", "blue"), condition("material", "metal")]
    blue, metal = cut_crops(np.random.default_rng(0), wanted, [drawn_scene], 56)
    for crop, rgb in ((blue, (0, 0, 200)), (metal, (200, 0, 0))):
        pixels = decode_image(crop.png)
        # 112 px become 56: the square of 40 px is 20 px wide, in the middle
        assert (pixels[20:36, 20:36] == rgb).all()
        assert np.abs(pixels.astype(int) - rgb).max(axis=-1)[:16].min() > 60
    assert (blue.thing.color, metal.thing.color) == ("blue", "red")


def test_values_that_no_free_object_has_are_all_named(drawn_scene):
    wanted = [
        condition("color", "cyan"),
        condition("shape", "cube"),
        condition("material", "rubber"),  # there is one, but it is small
    ]
    with pytest.raises(ValueError, match=r"\['color cyan', 'material rubber'\]"):
        cut_crops(np.random.default_rng(0), wanted, [drawn_scene], 56)


@pytest.mark.skipif(not REAL_SAMPLE.is_dir(), reason=f"no real CLEVR images in {REAL_SAMPLE}")
def test_crops_of_real_images_show_their_object():
    scenes = list(clevr_folder_scenes(REAL_SAMPLE))
    colors = {t.color for s in scenes for t in s.objects if crop_window(s, t)} - {"gray"}
    assert len(colors) >= 3
    found = cut_crops(
        np.random.default_rng(0), [condition("color", c) for c in sorted(colors)], scenes, 56
    )
    for crop in found:
        middle = decode_image(crop.png)[20:36, 20:36].reshape(-1, 3).astype(float).mean(axis=0)
        tint, wanted = (v - v.mean() for v in (middle, np.array(RGB[crop.thing.color], float)))
        assert float(tint @ wanted) / np.linalg.norm(tint) / np.linalg.norm(wanted) > 0.7
    assert 2 * 0.7 * crops.REACH["cube"] < crops.WINDOW
