"""Ray-trace CLEVR scenes in JAX: scenes in, uint8 pictures [N, Y, X, 3] out.

A picture is made in four steps, three of them jitted:

    host    which TILE x TILE px tiles can show an object at all (projected hulls)
    tiles   those tiles only: nearest solid, normal, light, shadow, mirror -> premultiplied RGBA
    edges   in wide pictures, tiles with an object's edge: the ground at every pixel, so that a
            shadow meets its object without stairs
    ground  the rest: backdrop with soft shadows, the tiles laid over it, sRGB

Light is counted in linear units, colours of CLEVR go to the shader unconverted (as its generator
does). No random number is used: the same scenes give the same bytes on one machine.

Source: facebookresearch/clevr-dataset-gen f0ce2c8 (`base_scene.blend`, materials `Rubber` and
`MyMetal`); GGX from Walter et al. 2007. Shadows are ours: analytic, no sampling.
Next: data_pipelines/clevr_policy/tree.py
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.clevr import geometry, intersection
from data_pipelines.clevr.culling import touched_tiles
from data_pipelines.clevr.intersection import look_up, nearest_solid, round_off, unit
from data_pipelines.clevr.lighting import (
    LAMP_POSITION,
    SUN_DISTANCE,
    SUN_TRAVEL,
    ground_light,
    visibility,
)
from data_pipelines.clevr.materials import RGB, metal_light, rubber_light
from data_pipelines.clevr.scene import Scene, pack_solids

# counted up with every change that makes other pictures of the same scenes: recipes name it, so
# that a dataset begun with one look is never finished with another
LOOK = 2
TILE = 4  # px a side
CHUNK = 256  # tiles a call
COARSE_GROUND_PX = 160  # from this width on the ground is shaded at every second pixel, off edges
SLOTS = (6, 10, 16, 32)  # object slots a scene is padded to


def render_scenes(
    scenes: list[Scene], *, width: int, height: int, batch: int = 32, supersample: int = 2
) -> np.ndarray:
    """Pictures of scenes, uint8 [N, Y, X, 3] with Y = height and X = width.

    Objects are sampled supersample^2 times a pixel, the smooth ground once. `batch` scenes are
    held at a time; it does not change the pictures. Compiled once per (width, height, object
    slots, supersample). Raises ValueError for sizes below 1 or more objects than SLOTS allows.
    """
    _check(scenes, width, height, batch, supersample)
    pictures = np.zeros((len(scenes), height, width, 3), np.uint8)
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        packed = _pack(part)
        cover = _cover(packed, width, height, supersample)
        wide = width >= COARSE_GROUND_PX
        fine = _fine_ground(packed, cover, width, height) if wide else [None] * len(part)
        for i in range(len(part)):
            one = {name: value[i] for name, value in packed.items()}
            pictures[first + i] = _finish(one, cover[i], fine[i], width=width, height=height)
    return pictures


def render_masks(scenes: list[Scene], *, width: int, height: int) -> np.ndarray:
    """Which object each pixel's centre shows: int32 [N, Y, X], 0 = background, i = i-th object."""
    _check(scenes, width, height, 1, 1)
    if not scenes:
        return np.zeros((0, height, width), np.int32)
    packed = _pack(scenes)
    return np.stack([
        np.asarray(_mask({name: value[i] for name, value in packed.items()}, width, height))
        for i in range(len(scenes))
    ])  # fmt: skip


def _check(scenes, width, height, batch, supersample) -> None:
    if min(width, height, batch, supersample) < 1:
        raise ValueError(
            "expected width, height, batch and supersample of at least 1, got "
            f"{width}, {height}, {batch} and {supersample}."
        )
    crowded = [s.scene_id for s in scenes if len(s.objects) > SLOTS[-1]]
    if crowded:
        raise ValueError(f"expected at most {SLOTS[-1]} objects a scene; more in {crowded}.")


def _pack(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """`pack_solids` and looks: color [B, slots, 3], metal, bevel [B, slots], lamps [B, 4, ...]."""
    most = max(len(s.objects) for s in scenes)
    slots = next(s for s in SLOTS if s >= most)
    packed = pack_solids(scenes, slots)
    color = np.zeros((len(scenes), slots, 3), np.float32)
    metal = np.zeros((len(scenes), slots), np.float32)
    bevel = np.zeros((len(scenes), slots), np.float32)
    for b, scene in enumerate(scenes):
        for n, o in enumerate(scene.objects):
            color[b, n] = np.array(RGB[o.color]) / 255
            metal[b, n] = o.material == "metal"
            bevel[b, n] = intersection.BEVEL[o.shape]
    jitter = np.array([s.light_jitter for s in scenes])
    lamps = np.array(LAMP_POSITION) + jitter
    sun = np.broadcast_to(-SUN_DISTANCE * np.array(SUN_TRAVEL), (len(scenes), 1, 3))
    lamps = np.concatenate([lamps, sun], axis=1).astype(np.float32)
    flags = {name: packed[name].astype(np.float32) for name in ("is_cube", "is_sphere")}
    return packed | flags | {"color": color, "metal": metal, "bevel": bevel, "lamps": lamps}


def _cover(packed, width, height, supersample) -> np.ndarray:
    """Objects of all scenes, premultiplied linear RGB and coverage: float32 [B, 4, Y, X].

    Y and X are rounded up to whole tiles.
    """
    shade = partial(_shade_tiles, supersample=supersample)
    tiles = touched_tiles(packed, width, height, TILE)
    return _fill_tiles(packed, width, height, tiles, shade, channels=4, empty=0.0)


def _fine_ground(packed, cover, width, height) -> np.ndarray:
    """Ground at every pixel of the tiles with an object's edge: float32 [B, 3, Y, X], else -1.

    Read off the coverage, not off the tiles that were shaded: culling cannot show in a picture.
    """
    seen = np.pad(cover[:, 3] > 0, ((0, 0), (1, 1), (1, 1)))
    seen = seen[:, :-2] | seen[:, 1:-1] | seen[:, 2:]
    seen = seen[:, :, :-2] | seen[:, :, 1:-1] | seen[:, :, 2:]
    edge = seen & (cover[:, 3] < 1)
    batch, rows, columns = edge.shape
    edge = edge.reshape(batch, rows // TILE, TILE, columns // TILE, TILE).any(axis=(2, 4))
    tiles = np.nonzero(edge)
    return _fill_tiles(packed, width, height, tiles, _ground_tiles, channels=3, empty=-1.0)


def _fill_tiles(packed, width, height, tiles, shade, *, channels, empty) -> np.ndarray:
    """`shade` for (scene, tile row, tile column), CHUNK at a time: [B, channels, Y, X]."""
    rows, columns = -(-height // TILE), -(-width // TILE)
    scene, row, column = tiles
    shape = (packed["camera"].shape[0], rows, columns, channels, TILE, TILE)
    filled = np.full(shape, empty, np.float32)
    for first in range(0, len(scene), CHUNK):
        part = slice(first, first + CHUNK)
        number = len(scene[part])
        pad = (0, CHUNK - number)
        which, y, x = (np.pad(v[part], pad) for v in (scene, row, column))
        # [B, ...] -> [..., 1, K]
        gathered = {
            name: np.ascontiguousarray(np.moveaxis(value[which], 0, -1)[..., None, :])
            for name, value in packed.items()
        }
        shaded = shade(
            gathered, np.float32(x * TILE), np.float32(y * TILE),
            np.float32(width), np.float32(height),
        )  # fmt: skip
        shaded = np.moveaxis(np.asarray(shaded), 3, 0)
        filled[which[:number], y[:number], x[:number]] = shaded[:number]
    # [B, tile row, tile column, channels, y, x] -> [B, channels, Y, X]
    return filled.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * TILE, columns * TILE)


@partial(jax.jit, static_argnames=("supersample",))
def _shade_tiles(packed, left, top, width, height, *, supersample):
    """Tiles of K scenes: float32 [4, TILE, TILE, K], premultiplied linear RGB and coverage.

    `packed` holds the scenes' arrays as [..., 1, K], `left` and `top` are float32 [K] in px.
    Samples are [S, K], sub-sample by sub-sample, S = supersample^2 * TILE^2: the last axis is
    long, which is what a CPU's vector units want.
    """
    samples, tiles = supersample * supersample, left.shape[0]
    ticks = jnp.arange(TILE, dtype=jnp.float32)
    subs = (jnp.arange(supersample, dtype=jnp.float32) + 0.5) / supersample
    grid = (supersample, supersample, TILE, TILE)  # sub row, sub column, y, x
    columns = (
        jnp.broadcast_to(ticks[None, None, None] + subs[None, :, None, None], grid).reshape(-1, 1)
        + left[None]
    )
    rows = jnp.broadcast_to(ticks[None, None, :, None] + subs[:, None, None, None], grid).reshape(
        -1, 1
    )
    rows = rows + top[None]
    direction = geometry.ray_directions(columns, rows, packed["axes"], width, height)
    origin = tuple(packed["camera"][i] for i in range(3))
    depth, found = nearest_solid(packed, origin, direction, 0.0)
    solid = look_up(packed, found)
    hit = jnp.isfinite(depth)
    depth, normal, touched = round_off(solid, origin, direction, jnp.where(hit, depth, 1.0))
    hit = hit & touched
    point = tuple(o + depth * d for o, d in zip(origin, direction, strict=True))
    hit, point, normal, depth = jax.lax.optimization_barrier((hit, point, normal, depth))
    view = unit(direction)

    # shadows change slowly: once a pixel, at its nearest sample
    by_sample = (samples, TILE * TILE, tiles)
    far = jnp.where(hit, depth, jnp.inf).reshape(by_sample)
    chosen = (far == jnp.min(far, axis=0, keepdims=True)) & jnp.isfinite(far)
    chosen = chosen / jnp.maximum(jnp.sum(chosen, axis=0, keepdims=True), 1)

    def pick(value):
        return jnp.sum(value.reshape(by_sample) * chosen, axis=0)

    pixel_point, pixel_normal = (tuple(map(pick, v)) for v in (point, normal))
    pixel_found = jnp.round(pick(found)).astype(jnp.int32)
    lit, openness = visibility(packed, pixel_point, pixel_normal, pixel_found)
    lit = [jnp.tile(v, (samples, 1)) for v in lit]
    openness = jnp.tile(openness, (samples, 1))

    rubber = rubber_light(packed, solid, point, normal, view, lit, openness)
    metal = metal_light(packed, solid, point, normal, view, lit, found)
    color = [jnp.where(solid["metal"] > 0.5, m, r) for m, r in zip(metal, rubber, strict=True)]
    rgba = jnp.stack([*(jnp.minimum(c, 1.0) for c in color), jnp.ones_like(depth)])
    rgba = jnp.where(hit[None], rgba, 0.0).reshape(4, *by_sample).mean(axis=1)
    return rgba.reshape(4, TILE, TILE, tiles)


@jax.jit
def _ground_tiles(packed, left, top, width, height):
    """The ground under tiles of K scenes, at pixel centres: float32 [3, TILE, TILE, K]."""
    ticks = jnp.arange(TILE, dtype=jnp.float32) + 0.5
    columns = jnp.tile(ticks, TILE)[:, None] + left[None]
    rows = jnp.repeat(ticks, TILE)[:, None] + top[None]
    direction = geometry.ray_directions(columns, rows, packed["axes"], width, height)
    origin = tuple(packed["camera"][i] for i in range(3))
    ground = jnp.stack(ground_light(packed, origin, direction))
    return ground.reshape(3, TILE, TILE, -1)


def _pixel_rays(packed, width, height, step=1):
    """Directions through the centres of step x step px cells, three [rows * columns]."""
    columns = (jnp.arange(-(-width // step), dtype=jnp.float32) + 0.5) * step
    rows = (jnp.arange(-(-height // step), dtype=jnp.float32) + 0.5) * step
    columns, rows = jnp.tile(columns, rows.size), jnp.repeat(rows, columns.size)
    return geometry.ray_directions(columns, rows, packed["axes"], width, height)


@partial(jax.jit, static_argnames=("width", "height"))
def _finish(packed, cover, fine, *, width, height):
    """One scene's ground under its tiles: float32 [4, Y, X] -> uint8 [Y, X, 3].

    `fine` is the ground where it is known at every pixel, float32 [3, Y, X], -1 elsewhere; None
    shades it at every pixel.
    """
    step = 1 if fine is None else 2
    direction = _pixel_rays(packed, width, height, step)
    origin = tuple(packed["camera"][i] for i in range(3))
    ground = jnp.stack(ground_light(packed, origin, direction))
    ground = ground.reshape(3, -(-height // step), -(-width // step))
    if fine is not None:
        fine = fine[:, :height, :width]
        ground = jnp.where(fine < 0.0, _double(_double(ground, 1), 2)[:, :height, :width], fine)
    over = cover[:, :height, :width]
    linear = over[:3] + (1.0 - over[3:]) * ground
    return jnp.moveaxis(jnp.round(255.0 * _to_srgb(linear)).astype(jnp.uint8), 0, -1)


def _double(image, axis):
    """Twice as many samples along an axis of [3, rows, columns], linear between cell centres."""
    size = image.shape[axis]
    pad = [(0, 0)] * 3
    pad[axis] = (1, 1)
    padded = jnp.pad(image, pad, mode="edge")
    before = 0.75 * image + 0.25 * jax.lax.slice_in_dim(padded, 0, size, axis=axis)
    after = 0.75 * image + 0.25 * jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
    shape = list(image.shape)
    shape[axis] = 2 * size
    return jnp.stack([before, after], axis=axis + 1).reshape(shape)  # cell, half -> sample


def _to_srgb(linear):
    """IEC 61966-2-1: linear [0, 1] -> sRGB [0, 1]."""
    linear = jnp.clip(linear, 0.0, 1.0)
    curve = 1.055 * jnp.power(jnp.maximum(linear, 1e-6), 1 / 2.4) - 0.055
    return jnp.where(linear <= 0.0031308, 12.92 * linear, curve)


@partial(jax.jit, static_argnames=("width", "height"))
def _mask(packed, width, height):
    """One scene: int32 [Y, X]."""
    direction = _pixel_rays(packed, width, height)
    origin = tuple(packed["camera"][i] for i in range(3))
    _, found = nearest_solid(packed, origin, direction, 0.0)
    return (found + 1).reshape(height, width)
