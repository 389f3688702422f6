"""Sample scenes that obey CLEVR's rules of spacing and visibility.

    sample_scenes      seed -> scenes
    visible_fractions  scenes -> share of the image that shows each object

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `image_generation/render_images.py`
(`add_random_objects`, `check_visibility`).
Next: data_pipelines/clevr/scene_files.py
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.clevr import geometry
from data_pipelines.clevr.scene import (
    COLORS,
    DIRECTIONS,
    IMAGE_HEIGHT,
    IMAGE_WIDTH,
    MATERIALS,
    RADIUS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    pack_solids,
)

POSITION_RANGE = 3.0  # render_images.py: x, y uniform in [-3, 3]
MIN_DIST = 0.25  # render_images.py --min_dist: gap between bounding circles, metres
MARGIN = 0.4  # render_images.py --margin: gap along each of the four directions, metres
MAX_RETRIES = 50  # render_images.py --max_retries: tries an object before a new start
MIN_VISIBLE_FRACTION = 200 / (320 * 240)  # render_images.py --min_pixels_per_object

VISIBILITY_GRID = 24  # ours: samples a side over each object's own window; 576 a window
VISIBILITY_BATCH = 64  # ours: scenes a call, so that one compilation serves every count
VISIBILITY_SLOTS = 10  # CLEVR's largest scene; more objects take the next multiple


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
    margin: float = MARGIN,
    id_prefix: str = "scene",
) -> list[Scene]:
    """Scenes `start` ... `start + count - 1` of the endless list that `seed` stands for.

    Object counts are uniform in [min_objects, max_objects]; attributes are uniform; positions
    obey MIN_DIST and `margin`; every object shows at least `min_visible_fraction` of the image's
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
        margin=margin,
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


def _draw_scene(rng, scene_id, *, counts, image, jitters, margin) -> Scene:
    """One scene that obeys the spacing rules; its visibility is not yet known."""
    number = int(rng.integers(counts[0], counts[1] + 1))
    camera_jitter = tuple(rng.uniform(-jitters[0], jitters[0], 3).tolist())
    light_jitter = tuple(map(tuple, rng.uniform(-jitters[1], jitters[1], (3, 3)).tolist()))
    placed = None
    while placed is None:
        placed = _place(rng, number, margin)
    objects = []
    for size, x, y in placed:
        shape, color, material = (
            values[rng.integers(len(values))] for values in (SHAPES, COLORS, MATERIALS)
        )
        rotation = float(360.0 * rng.random())
        position = (x, y, RADIUS[size])
        objects.append(SceneObject(shape, color, size, material, position, rotation))
    camera = np.add(geometry.CAMERA_POSITION, camera_jitter)
    pixels = geometry.project(np.array([o.position for o in objects]), camera, *image)
    objects = tuple(
        dataclasses.replace(o, pixel_coords=tuple(p))
        for o, p in zip(objects, pixels.tolist(), strict=True)
    )
    return Scene(scene_id, objects, camera_jitter, light_jitter, None, *image)


def _place(rng, number, margin) -> list[tuple[str, float, float]] | None:
    """(size, x, y) of `number` objects, or None when an object found no place in MAX_RETRIES."""
    placed: list[tuple[str, float, float]] = []
    for _ in range(number):
        size = SIZES[rng.integers(len(SIZES))]
        tries = rng.uniform(-POSITION_RANGE, POSITION_RANGE, (MAX_RETRIES, 2)).tolist()
        spot = next((xy for xy in tries if _has_room(placed, size, margin, *xy)), None)
        if spot is None:
            return None
        placed.append((size, *spot))
    return placed


def _has_room(placed, size, margin, x, y) -> bool:
    """MIN_DIST to every placed object, and none within (0, margin) along a direction.

    Left is minus right and front minus behind, so the four tests are |projection| >= margin.
    """
    (right_x, right_y, _), (behind_x, behind_y, _) = DIRECTIONS["right"], DIRECTIONS["behind"]
    for other_size, other_x, other_y in placed:
        dx, dy = x - other_x, y - other_y
        if math.hypot(dx, dy) - RADIUS[size] - RADIUS[other_size] < MIN_DIST:
            return False
        if abs(dx * right_x + dy * right_y) < margin:
            return False
        if abs(dx * behind_x + dy * behind_y) < margin:
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
