"""Ray-trace CLEVR scenes in JAX: scenes in, uint8 pictures [N, Y, X, 3] out.

A picture is made in three steps, two of them jitted:

    host    which TILE x TILE px tiles can show an object at all (projected boxes)
    tiles   those tiles only: nearest solid, normal, light, shadow, mirror -> premultiplied RGBA
    ground  every pixel: backdrop with soft shadows, the tiles laid over it, sRGB

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

from data_pipelines.clevr import geometry
from data_pipelines.clevr.scene import SHAPES, Scene, pack_solids

# properties.json "colors": sRGB bytes, used by the generator as linear values / 255.
RGB = {
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}  # fmt: skip

# base_scene.blend: area lamps Key, Fill, Back; all look at the origin.
LAMP_POSITION = (
    (6.44671, -2.90517, 4.2584), (-4.67112, -4.0136, 3.01122), (-1.1685, 2.64602, 5.81574),
)  # fmt: skip
LAMP_RGB = ((1.0, 0.932, 0.817), (0.762, 0.818, 1.0), (1.0, 1.0, 1.0))
LAMP_WATT = (78.5, 23.6, 39.3)
LAMP_HALF_SIZE = (0.25, 0.25, 0.5)  # metres: squares of 0.5, 0.5 and 1 m
SUN_TRAVEL = (-0.414, 0.195, -0.889)  # base_scene.blend: sun "Area", not jittered
SUN_IRRADIANCE = 0.45
SUN_DISTANCE = 50.0  # ours: far enough to be parallel
SUN_HALF_SIZE = 2.5  # ours: 0.05 rad of softness at that distance

GROUND_ALBEDO = 0.8  # Blender's default grey
BACKDROP_START = 5.0  # metres behind the origin where the backdrop begins to rise
BACKDROP_RADIUS = 8.0
BEHIND = (-0.754490315914154, 0.6563112735748291)  # horizontal view direction, no jitter
SKY = 0.06  # ours: radiance from above
AMBIENT = 0.05  # ours: irradiance / pi that bounces between backdrop and ground

BEVEL = {"cube": 0.1, "cylinder": 0.06, "sphere": 0.0}  # ours: SmoothCube_v2, SmoothCylinder
METAL_ALPHA = (0.1, 0.3)  # ours, for MyMetal's two glossy lobes of roughness 0.1 and 0.45
METAL_SHARP = 0.6  # MyMetal: share of the first lobe

TILE = 8  # px a side
CHUNK = 64  # tiles a call
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
        for i in range(len(part)):
            one = {name: value[i] for name, value in packed.items()}
            pictures[first + i] = _finish(one, cover[i], width=width, height=height)
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
            bevel[b, n] = BEVEL[o.shape]
    jitter = np.array([s.light_jitter for s in scenes])
    lamps = np.array(LAMP_POSITION) + jitter
    sun = np.broadcast_to(-SUN_DISTANCE * np.array(SUN_TRAVEL), (len(scenes), 1, 3))
    lamps = np.concatenate([lamps, sun], axis=1).astype(np.float32)
    return packed | {"color": color, "metal": metal, "bevel": bevel, "lamps": lamps}


def _cover(packed, width, height, supersample) -> np.ndarray:
    """Objects of all scenes, premultiplied linear RGB and coverage: float32 [B, Y, X, 4].

    Y and X are rounded up to whole tiles.
    """
    rows, columns = -(-height // TILE), -(-width // TILE)
    scene, row, column = np.nonzero(_touched(packed, width, height, rows, columns))
    tiles = np.zeros((packed["camera"].shape[0], rows, columns, TILE, TILE, 4), np.float32)
    for first in range(0, len(scene), CHUNK):
        part = slice(first, first + CHUNK)
        number = len(scene[part])
        pad = (0, CHUNK - number)
        which, y, x = (np.pad(v[part], pad) for v in (scene, row, column))
        gathered = {name: value[which] for name, value in packed.items()}
        shaded = _shade_tiles(
            gathered, np.float32(x * TILE), np.float32(y * TILE),
            np.float32(width), np.float32(height), supersample=supersample,
        )  # fmt: skip
        tiles[which[:number], y[:number], x[:number]] = np.asarray(shaded)[:number]
    # [B, tile row, tile column, y, x, 4] -> [B, Y, X, 4]
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * TILE, columns * TILE, 4)


def _touched(packed, width, height, rows, columns) -> np.ndarray:
    """Which tiles meet the projected bounding box of any object: bool [B, rows, columns]."""
    corners = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float32)
    c, s, r = (packed[name][..., None] for name in ("cosine", "sine", "radius"))
    x = packed["x"][..., None] + r * (c * corners[:, 0] - s * corners[:, 1])
    y = packed["y"][..., None] + r * (s * corners[:, 0] + c * corners[:, 1])
    z = packed["z"][..., None] + r * corners[:, 2]
    camera = packed["camera"][:, None, None]
    view = np.einsum("bnkc,bac->bnka", np.stack([x, y, z], -1) - camera, packed["axes"])
    depth = np.maximum(-view[..., 2], 1e-3)
    focal_px = geometry.FOCAL_PER_WIDTH * width
    px = width / 2 + focal_px * view[..., 0] / depth
    py = height / 2 - focal_px * view[..., 1] / depth
    real = packed["z"] > -1
    left, right = px.min(-1)[..., None], px.max(-1)[..., None]
    top, bottom = py.min(-1)[..., None], py.max(-1)[..., None]
    x0, y0 = TILE * np.arange(columns), TILE * np.arange(rows)
    across = (left < x0 + TILE) & (right > x0) & real[..., None]
    down = (top < y0 + TILE) & (bottom > y0)
    return np.einsum("bny,bnx->byx", down.astype(np.int32), across.astype(np.int32)) > 0


@partial(jax.jit, static_argnames=("supersample",))
def _shade_tiles(packed, left, top, width, height, *, supersample):
    """Tiles [K] with their scenes' arrays [K, ...] -> float32 [K, TILE, TILE, 4]."""
    shade = partial(_shade_tile, width=width, height=height, supersample=supersample)
    return jax.vmap(shade)(packed, left, top)


def _shade_tile(packed, left, top, *, width, height, supersample):
    side = TILE * supersample
    ticks = (jnp.arange(side, dtype=jnp.float32) + 0.5) / supersample
    columns = left + jnp.tile(ticks, side)
    rows = top + jnp.repeat(ticks, side)
    direction = geometry.ray_directions(columns, rows, packed["axes"], width, height)
    origin = tuple(packed["camera"][i] for i in range(3))
    depth, one_hot = _nearest(packed, origin, direction, 0.0)
    hit = jnp.isfinite(depth)
    depth = jnp.where(hit, depth, 1.0)
    point = tuple(o + depth * d for o, d in zip(origin, direction))
    view = _unit(direction)
    solid = _look_up(packed, one_hot)
    normal = _normal(solid, point)
    rubber, lit = _diffuse(packed, point, normal, one_hot)
    rubber = [solid[f"color{i}"] * rubber[i] for i in range(3)]
    gloss = _gloss(packed, point, normal, view, lit, 0.35)
    rubber = [rubber[i] + 0.03 * gloss[i] for i in range(3)]
    metal = _metal(packed, solid, point, normal, view, lit, one_hot)
    is_metal = solid["metal"] > 0.5
    color = [jnp.where(is_metal, metal[i], rubber[i]) for i in range(3)]
    rgba = jnp.stack([*(jnp.minimum(c, 1.0) for c in color), jnp.ones_like(depth)])
    rgba = jnp.where(hit, rgba, 0.0)
    # [4, sample row, sample column] -> [4, y, sub row, x, sub column]
    rgba = rgba.reshape(4, TILE, supersample, TILE, supersample).mean(axis=(2, 4))
    return jnp.moveaxis(rgba, 0, -1)


def _column(packed, name):
    return packed[name][:, None]


def _local(packed, vector):
    """World vector (three [S] or scalars) -> every object's frame, three [slots, S]."""
    turn = (_column(packed, name) for name in ("cosine", "sine", "inverse_radius"))
    return geometry.to_local(vector, *turn)


def _local_point(packed, point):
    return _local(packed, tuple(point[i] - _column(packed, a) for i, a in enumerate("xyz")))


def _nearest(packed, origin, direction, nearest, exclude=None):
    """(ray parameter [S], inf without a hit; one-hot of the object hit, float32 [slots, S])."""
    depths = geometry.first_hit(
        _local_point(packed, origin), _local(packed, direction),
        _column(packed, "is_cube"), _column(packed, "is_sphere"), nearest,
    )  # fmt: skip
    if exclude is not None:
        depths = jnp.where(exclude > 0.5, jnp.inf, depths)
    depth = jnp.min(depths, axis=0)
    one_hot = ((depths == depth) & jnp.isfinite(depths)).astype(jnp.float32)
    return depth, one_hot


LOOKS = ("x", "y", "z", "radius", "inverse_radius", "cosine", "sine", "metal", "bevel")


def _look_up(packed, one_hot):
    """The hit object's numbers, each [S]."""
    table = jnp.stack(
        [packed[name] for name in LOOKS]
        + [packed[name].astype(jnp.float32) for name in ("is_cube", "is_sphere")]
        + [packed["color"][:, i] for i in range(3)]
    )
    found = jnp.einsum("an,ns->as", table, one_hot)
    names = (*LOOKS, "is_cube", "is_sphere", "color0", "color1", "color2")
    return dict(zip(names, found))


def _normal(solid, point):
    """Unit normal of a solid at a surface point, rounded over the bevel near edges."""
    offset = tuple(point[i] - solid[a] for i, a in enumerate("xyz"))
    q = geometry.to_local(offset, solid["cosine"], solid["sine"], solid["inverse_radius"])
    inner = 1.0 - solid["bevel"]
    cube = tuple(jnp.sign(v) * jnp.maximum(jnp.abs(v) - inner, 0.0) for v in q)
    ring = jnp.sqrt(jnp.maximum(q[0] * q[0] + q[1] * q[1], 1e-12))
    outward = jnp.maximum(ring - inner, 0.0) / ring
    cylinder = (q[0] * outward, q[1] * outward, cube[2])
    is_cube, is_sphere = solid["is_cube"] > 0.5, solid["is_sphere"] > 0.5
    x, y, z = (
        jnp.where(is_cube, a, jnp.where(is_sphere, b, c)) for a, b, c in zip(cube, q, cylinder)
    )
    c, s = solid["cosine"], solid["sine"]
    return _unit((c * x - s * y, s * x + c * y, z))


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(v):
    scale = jax.lax.rsqrt(jnp.maximum(_dot(v, v), 1e-12))
    return tuple(c * scale for c in v)


def _lamp(packed, index, point):
    """(unit vector to the lamp, distance, irradiance on a facing surface / pi)."""
    lamp = tuple(packed["lamps"][index, i] for i in range(3))
    offset = tuple(lamp[i] - point[i] for i in range(3))
    square = _dot(offset, offset)
    inverse = jax.lax.rsqrt(square)
    toward = tuple(c * inverse for c in offset)
    distance = square * inverse
    if index == 3:
        return toward, distance, SUN_IRRADIANCE / jnp.pi
    facing = jnp.maximum(_dot(_unit(lamp), toward), 0.0)  # the lamp looks at the origin
    return toward, distance, LAMP_WATT[index] / jnp.pi**2 * facing * inverse * inverse


def _shadow(packed, point, toward, distance, half_size, exclude=None):
    """Share of a lamp that is visible from points, float32 [S].

    For each object: the ray's depth below its surface (positive outside) where the ray comes
    closest, against the half width that the lamp's cone has there.
    """
    origin, step = _local_point(packed, point), _local(packed, toward)
    is_cube, is_sphere = _column(packed, "is_cube"), _column(packed, "is_sphere")
    enter, leave, _ = geometry.crossing(origin, step, is_cube, is_sphere)
    middle = jnp.clip(0.5 * (enter + leave), 0.0, distance)
    x, y, z = (o + middle * d for o, d in zip(origin, step))
    flat = x * x + y * y
    round_gap = jnp.sqrt(jnp.where(is_sphere, flat + z * z, flat)) - 1.0
    square_gap = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 1.0
    gap = jnp.where(is_cube, square_gap, round_gap)
    gap = jnp.where(is_sphere, gap, jnp.maximum(gap, jnp.abs(z) - 1.0))
    spread = half_size * middle / distance * _column(packed, "inverse_radius") + 0.02
    share = jnp.clip(0.5 + 0.5 * gap / spread, 0.0, 1.0)
    share = share * share * (3.0 - 2.0 * share)
    if exclude is not None:
        share = jnp.where(exclude > 0.5, 1.0, share)
    return jnp.prod(share, axis=0)


HALF_SIZE = (*LAMP_HALF_SIZE, SUN_HALF_SIZE)
LIGHT_RGB = (*LAMP_RGB, (1.0, 1.0, 1.0))


def _openness(packed, point, normal, exclude=None):
    """Share of the sky left open by the objects around, float32 [S] (spheres of equal size)."""
    offset = tuple(_column(packed, a) - point[i] for i, a in enumerate("xyz"))
    square = _dot(offset, offset)
    radius = _column(packed, "radius")
    toward = _dot(offset, normal) * jax.lax.rsqrt(square)
    blocked = jnp.maximum(toward, 0.0) * radius * radius / jnp.maximum(square, radius * radius)
    if exclude is not None:
        blocked = jnp.where(exclude > 0.5, 0.0, blocked)
    return jnp.prod(1.0 - 0.9 * blocked, axis=0)


def _diffuse(packed, point, normal, exclude=None):
    """(light that a white matte surface sends back, three [S]; visibility of each lamp)."""
    total = [0.0, 0.0, 0.0]
    lit = []
    for index in range(4):
        toward, distance, strength = _lamp(packed, index, point)
        lamp_lit = _shadow(packed, point, toward, distance, HALF_SIZE[index], exclude)
        amount = strength * lamp_lit * jnp.maximum(_dot(normal, toward), 0.0)
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
        lit.append(lamp_lit)
    sky = 0.5 + 0.5 * normal[2]
    around = AMBIENT * (sky + (1 - sky) * 2.0) * _openness(packed, point, normal, exclude)
    return [t + around for t in total], lit


def _gloss(packed, point, normal, view, lit, alpha):
    """Highlights of the lamps, GGX without masking, three [S]."""
    total = [0.0, 0.0, 0.0]
    for index in range(4):
        toward, distance, strength = _lamp(packed, index, point)
        half = _unit(tuple(t - v for t, v in zip(toward, view)))
        wide = alpha + 0.5 * HALF_SIZE[index] / distance  # the lamp's own size blurs the lobe
        square = wide * wide
        cosine = jnp.maximum(_dot(normal, half), 0.0)
        base = cosine * cosine * (square - 1.0) + 1.0
        lobe = square / (4.0 * base * base)  # D pi / 4; strength is irradiance / pi
        facing = jnp.clip(8.0 * _dot(normal, toward), 0.0, 1.0)
        amount = strength * lobe * facing * lit[index]
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    return total


def _surroundings(packed, point, direction):
    """Ground and backdrop seen along directions from points: radiance, three [S]."""
    down = direction[2] < -1e-3
    reach = jnp.where(down, -point[2] / jnp.minimum(direction[2], -1e-3), 0.0)
    reach = jnp.minimum(reach, 30.0)
    floor = tuple(p + reach * d for p, d in zip(point, direction))
    total = [0.0, 0.0, 0.0]
    for index in range(4):
        toward, _, strength = _lamp(packed, index, floor)
        amount = strength * jnp.maximum(toward[2], 0.0)
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    near = _openness(packed, floor, (0.0, 0.0, 1.0))
    floor_light = [GROUND_ALBEDO * (t + AMBIENT) * near for t in total]
    behind = BEHIND[0] * direction[0] + BEHIND[1] * direction[1]
    wall = SKY * (1.0 + jnp.maximum(behind, 0.0)) * jnp.clip(1.3 - direction[2], 0.0, 1.0)
    blend = jnp.clip(0.5 - direction[2] / 0.2, 0.0, 1.0)
    return [wall + blend * (f - wall) for f in floor_light]


def _metal(packed, solid, point, normal, view, lit, one_hot):
    """Two glossy lobes, tinted: what the sharp one mirrors, what the broad one gathers."""
    slope = 2.0 * _dot(view, normal)
    mirror = tuple(v - slope * n for v, n in zip(view, normal))
    seen = _surroundings(packed, point, mirror)
    depth, other = _nearest(packed, point, mirror, 1e-3, exclude=one_hot)
    hit = jnp.isfinite(depth)
    neighbour = _look_up(packed, other)
    there = tuple(p + jnp.where(hit, depth, 1.0) * m for p, m in zip(point, mirror))
    its_normal = _normal(neighbour, there)
    its_light = [AMBIENT, AMBIENT, AMBIENT]
    for index in range(4):
        toward, _, strength = _lamp(packed, index, there)
        amount = strength * jnp.maximum(_dot(its_normal, toward), 0.0)
        its_light = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(its_light)]
    seen = [jnp.where(hit, neighbour[f"color{i}"] * its_light[i], seen[i]) for i in range(3)]
    blurred = [0.5 * s + 0.5 * 0.2 * jnp.clip(0.6 - mirror[2], 0.1, 1.0) for s in seen]
    sharp_gloss = _gloss(packed, point, normal, view, lit, METAL_ALPHA[0])
    broad_gloss = _gloss(packed, point, normal, view, lit, METAL_ALPHA[1])
    color = []
    for i in range(3):
        sharp = seen[i] + sharp_gloss[i]
        broad = blurred[i] + broad_gloss[i]
        color.append(solid[f"color{i}"] * (METAL_SHARP * sharp + (1 - METAL_SHARP) * broad))
    return color


def _pixel_rays(packed, width, height):
    """Directions through all pixel centres, three [Y * X]."""
    columns = jnp.tile(jnp.arange(width, dtype=jnp.float32) + 0.5, height)
    rows = jnp.repeat(jnp.arange(height, dtype=jnp.float32) + 0.5, width)
    return geometry.ray_directions(columns, rows, packed["axes"], width, height)


def _backdrop(origin, direction):
    """Where rays meet the ground or its rise: (points, normals), three [S] each.

    Flat up to BACKDROP_START metres behind the origin, then a circle of BACKDROP_RADIUS.
    """
    down = jnp.minimum(direction[2], -1e-6)
    reach = -origin[2] / down
    behind = BEHIND[0] * direction[0] + BEHIND[1] * direction[1]
    start = BEHIND[0] * origin[0] + BEHIND[1] * origin[1] - BACKDROP_START
    high = origin[2] - BACKDROP_RADIUS
    square = behind * behind + direction[2] * direction[2]
    half_slope = start * behind + high * direction[2]
    offset = start * start + high * high - BACKDROP_RADIUS**2
    root = jnp.sqrt(jnp.maximum(half_slope * half_slope - square * offset, 0.0))
    rising = (direction[2] >= 0) | (start + reach * behind > 0)
    reach = jnp.where(rising, (root - half_slope) / square, reach)
    point = tuple(o + reach * d for o, d in zip(origin, direction))
    lean = jnp.where(rising, (start + reach * behind) / -BACKDROP_RADIUS, 0.0)
    up = jnp.sqrt(jnp.maximum(1.0 - lean * lean, 0.0))
    return point, (lean * BEHIND[0], lean * BEHIND[1], up)


@partial(jax.jit, static_argnames=("width", "height"))
def _finish(packed, cover, *, width, height):
    """One scene's ground under its tiles: float32 [Y, X, 4] -> uint8 [Y, X, 3]."""
    direction = _pixel_rays(packed, width, height)
    origin = tuple(packed["camera"][i] for i in range(3))
    point, normal = _backdrop(origin, direction)
    light, _ = _diffuse(packed, point, normal)
    ground = GROUND_ALBEDO * jnp.stack(light, axis=-1).reshape(height, width, 3)
    over = cover[:height, :width]
    linear = over[..., :3] + (1.0 - over[..., 3:]) * ground
    return jnp.round(255.0 * _to_srgb(linear)).astype(jnp.uint8)


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
    _, one_hot = _nearest(packed, origin, direction, 0.0)
    number = jnp.arange(1, one_hot.shape[0] + 1, dtype=jnp.float32)
    return jnp.einsum("n,ns->s", number, one_hot).astype(jnp.int32).reshape(height, width)
