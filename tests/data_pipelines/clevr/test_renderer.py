"""The ray tracer: hits and shadows by hand, masks where projection says, same scenes same bytes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.clevr import geometry, lighting, renderer
from data_pipelines.clevr.geometry import project
from data_pipelines.clevr.materials import RGB
from data_pipelines.clevr.renderer import render_masks, render_scenes
from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.clevr.scene import RADIUS, SHAPES, Scene, SceneObject

DARK_LIGHT = ((0.0, 0.0, 0.0),) * 3


def make_scene(*objects: tuple, **changes) -> Scene:
    """(shape, color, size, material, x, y) each."""
    made = tuple(
        SceneObject(shape, color, size, material, (x, y, RADIUS[size]), 0.3)
        for shape, color, size, material, x, y in objects
    )
    return Scene("made", made, **changes)


def hit(shape: str, origin, direction) -> float:
    flags = jnp.float32(shape == "cube"), jnp.float32(shape == "sphere")
    start, step = (tuple(map(jnp.float32, v)) for v in (origin, direction))
    return float(geometry.first_hit(start, step, *flags, 0.0))


# Half extent 1, centre at the origin. From (5, 0, 0) along -x every solid is met at x = 1: t = 4.
# From (5, 0.6, 0): round solids at x = sqrt(1 - 0.36) = 0.8, the cube still at 1.
# From (5, 0, 0.6): the sphere at 0.8, cube and cylinder (upright) at 1.
# From (5, 0.8, 0.8): 0.64 + 0.64 > 1 misses the sphere; the cylinder at x = 0.6; the cube at 1.
@pytest.mark.parametrize(
    ("y", "z", "cube", "sphere", "cylinder"),
    [(0, 0, 4, 4, 4), (0.6, 0, 4, 4.2, 4.2), (0, 0.6, 4, 4.2, 4), (0.8, 0.8, 4, np.inf, 4.4)],
)
def test_hits_by_hand(y, z, cube, sphere, cylinder):
    for shape, expected in (("cube", cube), ("sphere", sphere), ("cylinder", cylinder)):
        assert hit(shape, (5, y, z), (-1, 0, 0)) == pytest.approx(expected, abs=1e-5)
        assert hit(shape, (5, y, z), (1, 0, 0)) == np.inf  # looking away


@pytest.mark.parametrize("shape", SHAPES)
def test_lids_are_flat_except_on_the_sphere(shape):
    # straight down from z = 5 at x = 0.6: flat lids at z = 1, the sphere at 0.8
    expected = 4.2 if shape == "sphere" else 4.0
    assert hit(shape, (0.6, 0, 5), (0, 0, -1)) == pytest.approx(expected, abs=1e-4)


def test_a_turned_cube_is_met_at_its_edge():
    # 45 degrees about z: along -x the ray meets an edge at sqrt(2) of the half extent 0.7
    quarter = jnp.float32(np.pi / 4)
    turn = (jnp.cos(quarter), jnp.sin(quarter), jnp.float32(1 / 0.7))
    origin = geometry.to_local((5.0, 0.0, 0.0), *turn)
    direction = geometry.to_local((-1.0, 0.0, 0.0), *turn)
    depth = geometry.first_hit(origin, direction, jnp.float32(1), jnp.float32(0), 0.0)
    assert float(depth) == pytest.approx(5 - 0.7 * 2**0.5, abs=1e-4)


# A large object (half extent 0.7) on the ground at the origin, a lamp straight above each point.
# Centre: wholly dark. Under the rim, x = 0.7: the ray grazes the surface, half of the lamp shows.
# x = 2: nothing in the way.
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("x", "visible"), [(0.0, 0.0), (0.7, 0.5), (2.0, 1.0)])
def test_shadows_by_hand(shape, x, visible):
    solid = {
        "x": 0.0, "y": 0.0, "z": 0.7, "inverse_radius": 1 / 0.7, "cosine": 1.0, "sine": 0.0,
        "is_cube": float(shape == "cube"), "is_sphere": float(shape == "sphere"),
    }  # fmt: skip
    solid = {name: jnp.float32(value) for name, value in solid.items()}
    point = (jnp.array([x], jnp.float32), jnp.zeros(1), jnp.zeros(1))
    up = (jnp.zeros(1), jnp.zeros(1), jnp.ones(1))
    share = lighting.shadow(solid, point, up, jnp.full(1, 5.0), 0.25)
    assert float(share[0]) == pytest.approx(visible, abs=2e-3)


def test_srgb_by_hand():
    # IEC 61966-2-1: the linear part, middle grey 0.2140 -> 0.5, and white
    values = renderer._to_srgb(jnp.array([0.0, 0.001, 0.21404, 1.0, 7.0]))
    np.testing.assert_allclose(values, [0, 0.01292, 0.5, 1, 1], atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spot", [(-1.5, -1.5), (1.5, -0.5), (0.0, 2.0)])
def test_a_mask_is_centred_where_projection_says(shape, spot):
    scene = make_scene((shape, "red", "large", "rubber", *spot), camera_jitter=(0.2, -0.3, 0.1))
    (mask,) = render_masks([scene], width=320, height=240)
    camera = np.add(geometry.CAMERA_POSITION, scene.camera_jitter)
    ((column, row, _),) = project(np.array([scene.objects[0].position]), camera, 320, 240)
    y, x = np.nonzero(mask)
    # perspective moves a solid's centre of mass a little; pixel centres lie at .5
    assert abs(x.mean() + 0.5 - column) < 1.0
    assert abs(y.mean() + 0.5 - row) < 1.0


def test_the_nearer_object_hides_the_farther():
    near = ("cube", "red", "large", "rubber", 0.6, -0.52)
    far = ("sphere", "blue", "large", "rubber", -1.1, 0.96)  # 2.3 m further from the camera
    alone, both = render_masks([make_scene(far), make_scene(far, near)], width=160, height=120)
    assert 0 < (both == 1).sum() < (alone == 1).sum()
    assert not ((both == 1) & (alone != 1)).any()


def test_the_same_scenes_give_the_same_bytes():
    scenes = sample_scenes(3, 0, 5, max_objects=6)
    first = render_scenes(scenes, width=96, height=64)
    assert first.dtype == np.uint8 and first.shape == (5, 64, 96, 3)
    np.testing.assert_array_equal(first, render_scenes(scenes, width=96, height=64))
    # neither the batch nor the neighbours in it may change a picture
    np.testing.assert_array_equal(first, render_scenes(scenes, width=96, height=64, batch=2))
    np.testing.assert_array_equal(first[3:4], render_scenes(scenes[3:4], width=96, height=64))
    assert (first[0] != first[1]).any()


def test_pictures_and_masks_agree_on_where_objects_are():
    shown = make_scene(("cube", "yellow", "large", "rubber", 0.0, 0.0))
    (picture,) = render_scenes([shown], width=96, height=64)
    (mask,) = render_masks([shown], width=96, height=64)
    yellow = picture[..., 0].astype(int) - picture[..., 2] > 30  # red well above blue
    assert (yellow == (mask == 1)).mean() > 0.98


def test_colours_stay_apart():
    spots = [(x, y) for x in (-2.4, -0.8, 0.8, 2.4) for y in (-1.2, 1.2)]
    rows = [("cube", c, "large", "rubber", *p) for c, p in zip(RGB, spots, strict=True)]
    scene = make_scene(*rows)
    (picture,) = render_scenes([scene], width=168, height=112)
    (mask,) = render_masks([scene], width=168, height=112)
    for number, o in enumerate(scene.objects, 1):
        seen = picture[mask == number].mean(axis=0)
        seen = seen / np.linalg.norm(seen)
        names = list(RGB)
        table = np.array([RGB[name] for name in names], float) ** (1 / 2.2)
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
        nearest = np.argsort(table @ seen)[::-1]
        assert names.index(o.color) in nearest[:2], o.color


def brightness(shape: str, material: str) -> np.ndarray:
    """Mean of the three bytes at the object's pixels, top row first."""
    scene = make_scene((shape, "red", "large", material, 0.0, 0.0))
    (picture,) = render_scenes([scene], width=168, height=112)
    (mask,) = render_masks([scene], width=168, height=112)
    return picture[mask == 1].mean(axis=-1)


@pytest.mark.parametrize("shape", ["cube", "sphere"])
def test_metal_has_more_contrast_than_rubber(shape):
    metal, rubber = (np.percentile(brightness(shape, m), [5, 95]) for m in ("metal", "rubber"))
    assert metal[1] / metal[0] > 1.1 * rubber[1] / rubber[0]


def test_a_metal_lid_mirrors_the_dark_above_and_a_rubber_lid_is_lit():
    for material, sign in (("metal", -1), ("rubber", 1)):
        values = brightness("cylinder", material)
        lid, side = values[: len(values) // 8], values[len(values) // 2 : -len(values) // 4]
        assert sign * (lid.mean() - side.mean()) > 2, material


def test_an_object_darkens_the_ground_beside_it():
    empty, filled = (
        render_scenes([scene], width=96, height=64)[0].astype(int)
        for scene in (make_scene(), make_scene(("cube", "gray", "large", "rubber", 0.0, 0.0)))
    )
    (mask,) = render_masks(
        [make_scene(("cube", "gray", "large", "rubber", 0.0, 0.0))], width=96, height=64
    )
    change = (filled - empty).sum(axis=-1)[mask == 0]
    assert change.max() <= 60  # edges of the cube share their pixel with the ground
    assert (change < -30).sum() > 20


def test_a_wide_picture_has_fine_ground_at_the_edges_of_objects(monkeypatch):
    scene = make_scene(("cube", "gray", "large", "rubber", 0.0, 0.0))
    (picture,) = render_scenes([scene], width=168, height=112)
    monkeypatch.setattr(renderer, "COARSE_GROUND_PX", 1000)
    (exact,) = render_scenes([scene], width=168, height=112)
    (mask,) = render_masks([scene], width=168, height=112)
    padded = np.pad(mask > 0, 1)
    beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    difference = np.abs(picture.astype(int) - exact).max(axis=-1)
    assert difference[beside].max() <= 1
    assert difference.max() > 1  # elsewhere the ground is interpolated


def test_the_backdrop_is_gray_and_brighter_in_front():
    (picture,) = render_scenes([make_scene(light_jitter=DARK_LIGHT)], width=96, height=64)
    spread = picture.max(axis=-1).astype(int) - picture.min(axis=-1)
    assert spread.max() <= 20
    assert picture[-8:].mean() > picture[:8].mean() + 15


@pytest.mark.parametrize(("width", "height", "supersample"), [(37, 50, 1), (161, 33, 3)])
def test_any_size_and_sampling(width, height, supersample):
    scenes = sample_scenes(4, 0, 2)
    pictures = render_scenes(scenes, width=width, height=height, supersample=supersample)
    assert pictures.shape == (2, height, width, 3)
    assert render_masks(scenes, width=width, height=height).shape == (2, height, width)


def test_no_scene_gives_no_picture():
    assert render_scenes([], width=8, height=6).shape == (0, 6, 8, 3)
    assert render_masks([], width=8, height=6).shape == (0, 6, 8)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0, 64"):
        render_scenes([], width=0, height=64)
    crowd = make_scene(*[("cube", "red", "small", "rubber", 0.0, 0.0)] * 33)
    with pytest.raises(ValueError, match=r"at most 32 objects a scene; more in \['made'\]"):
        render_scenes([dataclasses.replace(crowd)], width=8, height=8)
