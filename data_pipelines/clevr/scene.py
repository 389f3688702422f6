"""A CLEVR scene: sample one, read and write the official scenes JSON, relate its objects.

    sample_scenes      seed -> scenes that obey CLEVR's spacing and visibility rules
    load_clevr_scenes  CLEVR_{split}_scenes.json -> scenes
    save_clevr_scenes  scenes -> the same layout, with relationships and directions
    relationships      scene -> for each object, who is left, right, in front, behind

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `image_generation/render_images.py` and
`data/properties.json`; Johnson et al. 2017, arXiv:1612.06890.
Next: data_pipelines/clevr/renderer.py
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.clevr import geometry
from data_pipelines.clevr.geometry import project

SHAPES = ("cube", "sphere", "cylinder")  # properties.json "shapes"
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")  # "colors"
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}
RADIUS = {"small": 0.35, "large": 0.7}  # properties.json "sizes": half extents, metres

POSITION_RANGE = 3.0  # render_images.py: x, y uniform in [-3, 3]
MIN_DIST = 0.25  # render_images.py --min_dist: gap between bounding circles, metres
MARGIN = 0.4  # render_images.py --margin: gap along each of the four directions, metres
MAX_RETRIES = 50  # render_images.py --max_retries: tries an object before a new start
MIN_VISIBLE_FRACTION = 200 / (320 * 240)  # render_images.py --min_pixels_per_object
RELATION_EPS = 0.2  # render_images.py compute_all_relationships(eps=0.2)
IMAGE_WIDTH, IMAGE_HEIGHT = 320, 240  # render_images.py --width, --height

# The four directions as recorded in every scene file: those of the camera WITHOUT jitter.
DIRECTIONS = {
    "left": (-0.6563112735748291, -0.7544902563095093, 0.0),
    "right": (0.6563112735748291, 0.7544902563095093, 0.0),
    "front": (0.754490315914154, -0.6563112735748291, 0.0),
    "behind": (-0.754490315914154, 0.6563112735748291, 0.0),
}
VERTICAL_DIRECTIONS = {"above": (0.0, 0.0, 1.0), "below": (0.0, 0.0, -1.0)}

VISIBILITY_GRID = 24  # ours: samples a side over each object's own window; 576 a window
VISIBILITY_BATCH = 64  # ours: scenes a call, so that one compilation serves every count
VISIBILITY_SLOTS = 10  # CLEVR's largest scene; more objects take the next multiple
NO_LIGHT_JITTER = ((0.0, 0.0, 0.0),) * 3


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One solid. `position` is its centre in metres (z = half extent, it stands on the ground).

    `rotation` is the recorded number, 360 U(0, 1); CLEVR gives it to Blender as RADIANS about z.
    `pixel_coords` is (column px, row px, depth metres) in the scene's `width` x `height` image.
    """

    shape: str
    color: str
    size: str
    material: str
    position: tuple[float, float, float]
    rotation: float
    pixel_coords: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects, and how far camera and lamps (key, fill, back) were moved, metres."""

    scene_id: str
    objects: tuple[SceneObject, ...]
    camera_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    light_jitter: tuple[tuple[float, float, float], ...] = NO_LIGHT_JITTER
    image_path: str | None = None
    width: int = IMAGE_WIDTH
    height: int = IMAGE_HEIGHT


def sample_scenes(
    seed: int,
    start: int,
    count: int,
    *,
    min_objects: int = 3,
    max_objects: int = 10,
    width: int = IMAGE_WIDTH,
    height: int = IMAGE_HEIGHT,
    min_visible_fraction: float = MIN_VISIBLE_FRACTION,
    max_camera_jitter: float = 0.5,
    max_light_jitter: float = 1.0,
    id_prefix: str = "scene",
) -> list[Scene]:
    """Scenes `start` ... `start + count - 1` of the endless list that `seed` stands for.

    Object counts are uniform in [min_objects, max_objects]; attributes are uniform; positions
    obey MIN_DIST and MARGIN; every object shows at least `min_visible_fraction` of the image's
    pixels. Scene i depends on (seed, start + i) and the keyword values only, never on `count`.

    Raises ValueError when the object range is not 1 <= min <= max.
    Source: render_images.py `add_random_objects`, `check_visibility`.
    """
    if not 1 <= min_objects <= max_objects:
        raise ValueError(
            f"expected 1 <= min_objects <= max_objects, got {min_objects} and {max_objects}."
        )
    slots = VISIBILITY_SLOTS * -(-max_objects // VISIBILITY_SLOTS)
    generators = [np.random.default_rng([seed, start + i]) for i in range(count)]
    draw = partial(
        _draw_scene,
        counts=(min_objects, max_objects),
        image=(width, height),
        jitters=(max_camera_jitter, max_light_jitter),
    )
    scenes: dict[int, Scene] = {}
    pending = list(range(count))
    while pending:
        rejected = []
        for first in range(0, len(pending), VISIBILITY_BATCH):
            chosen = pending[first : first + VISIBILITY_BATCH]
            drawn = [draw(generators[i], f"{id_prefix}_{start + i:06d}") for i in chosen]
            shares = visible_fractions(drawn, slots=slots)
            for i, scene, share in zip(chosen, drawn, shares, strict=True):
                if share[: len(scene.objects)].min() >= min_visible_fraction:
                    scenes[i] = scene
                else:
                    rejected.append(i)
        pending = rejected
    return [scenes[i] for i in range(count)]


def _draw_scene(rng, scene_id, *, counts, image, jitters) -> Scene:
    """One scene that obeys the spacing rules; its visibility is not yet known."""
    number = int(rng.integers(counts[0], counts[1] + 1))
    camera_jitter = tuple(rng.uniform(-jitters[0], jitters[0], 3).tolist())
    light_jitter = tuple(map(tuple, rng.uniform(-jitters[1], jitters[1], (3, 3)).tolist()))
    placed = None
    while placed is None:
        placed = _place(rng, number)
    objects = []
    for size, x, y in placed:
        shape, color, material = (
            values[rng.integers(len(values))] for values in (SHAPES, COLORS, MATERIALS)
        )
        rotation = float(360.0 * rng.random())
        position = (x, y, RADIUS[size])
        objects.append(SceneObject(shape, color, size, material, position, rotation))
    camera = np.add(geometry.CAMERA_POSITION, camera_jitter)
    pixels = project(np.array([o.position for o in objects]), camera, *image)
    objects = tuple(
        dataclasses.replace(o, pixel_coords=tuple(p))
        for o, p in zip(objects, pixels.tolist(), strict=True)
    )
    return Scene(scene_id, objects, camera_jitter, light_jitter, None, *image)


def _place(rng, number) -> list[tuple[str, float, float]] | None:
    """(size, x, y) of `number` objects, or None when an object found no place in MAX_RETRIES."""
    placed: list[tuple[str, float, float]] = []
    for _ in range(number):
        size = SIZES[rng.integers(len(SIZES))]
        tries = rng.uniform(-POSITION_RANGE, POSITION_RANGE, (MAX_RETRIES, 2)).tolist()
        spot = next((xy for xy in tries if _has_room(placed, size, *xy)), None)
        if spot is None:
            return None
        placed.append((size, *spot))
    return placed


def _has_room(placed, size, x, y) -> bool:
    """MIN_DIST to every placed object, and none within (0, MARGIN) along a direction.

    Left is minus right and front minus behind, so the four tests are |projection| >= MARGIN.
    """
    (right_x, right_y, _), (behind_x, behind_y, _) = DIRECTIONS["right"], DIRECTIONS["behind"]
    for other_size, other_x, other_y in placed:
        dx, dy = x - other_x, y - other_y
        if math.hypot(dx, dy) - RADIUS[size] - RADIUS[other_size] < MIN_DIST:
            return False
        if abs(dx * right_x + dy * right_y) < MARGIN:
            return False
        if abs(dx * behind_x + dy * behind_y) < MARGIN:
            return False
    return True


def visible_fractions(scenes: list[Scene], *, slots: int | None = None) -> np.ndarray:
    """Share of the image's pixels that show each object, float32 [len(scenes), slots].

    Each object gets a window around its projection with VISIBILITY_GRID^2 samples; a sample
    counts when it lies in the image and no other object is nearer. Slots without an object are 0.
    All scenes must have one image size.
    """
    slots = slots or max(len(scene.objects) for scene in scenes)
    width, height = scenes[0].width, scenes[0].height
    shares = np.zeros((len(scenes), slots), np.float32)
    for first in range(0, len(scenes), VISIBILITY_BATCH):
        part = scenes[first : first + VISIBILITY_BATCH]
        solids = pack_solids(part + part[:1] * (VISIBILITY_BATCH - len(part)), slots)
        found = np.asarray(_visible_fractions(solids, width=width, height=height))
        shares[first : first + len(part)] = found[: len(part)]
    return shares


def pack_solids(scenes: list[Scene], slots: int) -> dict[str, np.ndarray]:
    """The geometry of scenes as float32/bool arrays that lead with [B] or [B, slots].

    camera [B, 3], axes [B, 3, 3]; x, y, z, radius, inverse_radius, cosine, sine, is_cube,
    is_sphere [B, slots]. Empty slots hold a speck far below the ground, which no ray meets.
    """
    rows = np.zeros((len(scenes), slots, 7))
    rows[..., 2], rows[..., 3], rows[..., 6] = -50.0, 1e-3, 1.0
    for b, scene in enumerate(scenes):
        for n, o in enumerate(scene.objects):
            cube, sphere = o.shape == "cube", o.shape == "sphere"
            rows[b, n] = (*o.position, RADIUS[o.size], o.rotation, cube, sphere)
    camera = np.array([np.add(geometry.CAMERA_POSITION, s.camera_jitter) for s in scenes])
    radius, angle = rows[..., 3], rows[..., 4]
    floats = {
        "camera": camera, "axes": geometry.camera_axes(camera),
        "x": rows[..., 0], "y": rows[..., 1], "z": rows[..., 2], "radius": radius,
        "inverse_radius": 1 / radius, "cosine": np.cos(angle), "sine": np.sin(angle),
    }  # fmt: skip
    flags = {"is_cube": rows[..., 5] > 0, "is_sphere": rows[..., 6] > 0}
    return {name: value.astype(np.float32) for name, value in floats.items()} | flags


@partial(jax.jit, static_argnames=("width", "height"))
def _visible_fractions(solids, *, width, height):
    """`visible_fractions` for packed solids: float32 [B, slots]."""
    return jax.vmap(partial(_scene_fractions, width=width, height=height))(solids)


def _scene_fractions(solids, *, width, height):
    """One scene: solids [slots] -> float32 [slots]."""
    focal_px = geometry.FOCAL_PER_WIDTH * width
    offset = jnp.stack([solids[a] - solids["camera"][i] for i, a in enumerate("xyz")], axis=-1)
    view = jnp.einsum("nc,ac->na", offset, solids["axes"])
    depth = -view[:, 2]
    reach = solids["radius"] * jnp.where(solids["is_sphere"], 1.0, 3**0.5)
    half_px = 1.02 * focal_px * reach / jnp.maximum(depth - reach, 0.1)
    ticks = (jnp.arange(VISIBILITY_GRID, dtype=jnp.float32) + 0.5) * 2 / VISIBILITY_GRID - 1
    column = (width / 2 + focal_px * view[:, 0] / depth)[:, None] + half_px[:, None] * ticks[None]
    row = (height / 2 - focal_px * view[:, 1] / depth)[:, None] + half_px[:, None] * ticks[None]
    columns, rows = jnp.broadcast_arrays(column[:, None, :], row[:, :, None])
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    directions = geometry.ray_directions(columns, rows, solids["axes"], width, height)
    shape = (-1, 1, 1, 1)  # [slots] -> [slots, window, row, column]
    field = {name: solids[name].reshape(shape) for name in FRAME_FIELDS}
    turn = (field["cosine"], field["sine"], field["inverse_radius"])
    origin = geometry.to_local(tuple(-offset[:, i].reshape(shape) for i in range(3)), *turn)
    local = geometry.to_local(tuple(d[None] for d in directions), *turn)
    depths = geometry.first_hit(origin, local, field["is_cube"], field["is_sphere"], 0.0)
    nearest = jnp.min(depths, axis=0)
    own = jnp.einsum("nnyx->nyx", depths)
    seen = inside & (own <= nearest) & jnp.isfinite(own)
    share = jnp.mean(seen.astype(jnp.float32), axis=(1, 2))
    return share * jnp.square(2 * half_px) / (width * height)


FRAME_FIELDS = ("cosine", "sine", "inverse_radius", "is_cube", "is_sphere")


def relationships(scene: Scene) -> dict[str, list[list[int]]]:
    """For each direction and object i, the sorted indices j that lie there, seen from i.

    `j` is in `result["left"][i]` when `(p_j - p_i) . left > 0.2`. The directions are those of the
    unjittered camera, as in every official file, so only world coordinates matter.
    """
    positions = np.array([o.position for o in scene.objects])
    offsets = positions[None] - positions[:, None]  # [from i, to j, 3]
    return {
        name: [np.flatnonzero(row > RELATION_EPS).tolist() for row in offsets @ np.array(direction)]
        for name, direction in DIRECTIONS.items()
    }


def load_clevr_scenes(scenes_json: Path, images_dir: Path | None) -> list[Scene]:
    """Scenes of an official `CLEVR_{split}_scenes.json`.

    `image_path` is `images_dir / image_filename` (None without a folder); that the file exists is
    not checked. Camera jitter is not recorded: it is fitted to `pixel_coords` by least squares,
    with the image size (320x240 or the released 480x320) that fits better. Light jitter is not
    recorded and read as zero. `rotation` may be absent and reads as 0.

    Raises ValueError with every problem of the file, each with its scene and object index.
    """
    scenes_json = Path(scenes_json)
    try:
        records = json.loads(scenes_json.read_text())["scenes"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{scenes_json}: expected a JSON object with the key 'scenes': {error!r}."
        ) from error
    problems = [
        f"{scenes_json}, scene {i}: {problem}"
        for i, record in enumerate(records)
        for problem in _problems(record)
    ]
    if problems:
        raise ValueError(f"{len(problems)} problems in a scenes file:\n" + "\n".join(problems))
    return [_parse_scene(record, images_dir) for record in records]


def _problems(record: dict) -> list[str]:
    """Everything that keeps one recorded scene from being read."""
    if not isinstance(record, dict) or not isinstance(record.get("objects"), list):
        return ["expected an object with a list 'objects'"]
    found = [] if record.get("image_filename") else ["no 'image_filename'"]
    for n, entry in enumerate(record["objects"]):
        for name, values in ATTRIBUTES.items():
            if entry.get(name) not in values:
                found.append(f"object {n}: {name} {entry.get(name)!r} is not one of {values}")
        for name in ("3d_coords", "pixel_coords"):
            if not _is_triple(entry.get(name)):
                found.append(f"object {n}: expected 3 numbers as {name!r}, got {entry.get(name)!r}")
    return found


def _is_triple(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) for v in value)
    )


def _parse_scene(record: dict, images_dir: Path | None) -> Scene:
    """One checked record as a Scene."""
    objects = tuple(
        SceneObject(
            *(entry[name] for name in ATTRIBUTES),
            position=_triple(entry["3d_coords"]),
            rotation=float(entry.get("rotation", 0.0)),
            pixel_coords=_triple(entry["pixel_coords"]),
        )
        for entry in record["objects"]
    )
    fits = [(*_fit_camera(objects, w, h), w, h) for w, h in ((320, 240), (480, 320))]
    _, jitter, width, height = min(fits, key=lambda fit: fit[0])
    name = record["image_filename"]
    path = None if images_dir is None else str(Path(images_dir) / name)
    return Scene(Path(name).stem, objects, jitter, NO_LIGHT_JITTER, path, width, height)


def _fit_camera(objects, width, height) -> tuple[float, tuple[float, float, float]]:
    """Least squares camera jitter: (sum of squared residuals, jitter). Gauss-Newton, 10 steps.

    Columns and rows weigh 1 per px, depths 30 per metre: recorded pixels are rounded, depths exact.
    A weak pull to zero settles scenes with too few objects.
    """
    if not objects:
        return 0.0, (0.0, 0.0, 0.0)
    points = np.array([o.position for o in objects])
    recorded = np.array([o.pixel_coords for o in objects])
    weights = np.array([1.0, 1.0, 30.0])

    def residuals(jitter):
        found = project(points, np.add(geometry.CAMERA_POSITION, jitter), width, height)
        gap = (found - recorded) * weights
        return np.concatenate([gap.ravel(), 0.05 * jitter])

    jitter = np.zeros(3)
    for _ in range(10):
        base = residuals(jitter)
        slope = np.stack([(residuals(jitter + d) - base) / 1e-4 for d in 1e-4 * np.eye(3)], axis=1)
        jitter = jitter - np.linalg.lstsq(slope, base, rcond=None)[0]
    return float(np.square(residuals(jitter)).sum()), _triple(jitter)


def _triple(values) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


def save_clevr_scenes(scenes: list[Scene], path: Path, *, split: str = "train") -> None:
    """Write scenes in the official layout, with relationships and directions.

    Pixel coordinates are written as integers, as the official files have them. Jitters have no
    place in that layout: the camera's comes back by the fit in `load_clevr_scenes`, the lamps'
    does not. Raises ValueError for objects without pixel_coords.
    """
    missing = [s.scene_id for s in scenes if any(o.pixel_coords is None for o in s.objects)]
    if missing:
        raise ValueError(f"expected pixel_coords on every object; scenes without: {missing}.")
    directions = {k: list(v) for k, v in (DIRECTIONS | VERTICAL_DIRECTIONS).items()}
    records = [
        {
            "split": split,
            "image_index": index,
            "image_filename": Path(s.image_path).name if s.image_path else f"{s.scene_id}.png",
            "objects": [_record(o) for o in s.objects],
            "directions": directions,
            "relationships": relationships(s),
        }
        for index, s in enumerate(scenes)
    ]
    info = {"split": split, "version": "1.0", "license": "Creative Commons Attribution (CC-BY 4.0)"}
    Path(path).write_text(json.dumps({"info": info, "scenes": records}))


def _record(o: SceneObject) -> dict:
    assert o.pixel_coords is not None  # save_clevr_scenes has checked
    column, row, depth = o.pixel_coords
    return {name: getattr(o, name) for name in ATTRIBUTES} | {
        "3d_coords": list(o.position),
        "rotation": o.rotation,
        "pixel_coords": [int(column), int(row), depth],
    }
