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
from data_pipelines.clevr.scene import Scene, pack_solids

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

# ours, after SmoothCube_v2 and SmoothCylinder: radius of the rounded edges; 1 makes the sphere
BEVEL = {"cube": 0.12, "cylinder": 0.06, "sphere": 1.0}
ROUNDING_STEPS = 4  # ours: steps from the sharp solid to the rounded one
RUBBER_ALPHA, RUBBER_GLOSS = 0.35, 0.03  # ours, for Rubber's weak Fresnel gloss
METAL_ALPHA = (0.1, 0.3)  # ours, for MyMetal's two glossy lobes of roughness 0.1 and 0.45
METAL_SHARP = 0.6  # MyMetal: share of the first lobe

TILE = 4  # px a side
CHUNK = 256  # tiles a call
COARSE_GROUND_PX = 160  # from this width on the ground is shaded at every second pixel
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
    flags = {name: packed[name].astype(np.float32) for name in ("is_cube", "is_sphere")}
    return packed | flags | {"color": color, "metal": metal, "bevel": bevel, "lamps": lamps}


def _cover(packed, width, height, supersample) -> np.ndarray:
    """Objects of all scenes, premultiplied linear RGB and coverage: float32 [B, 4, Y, X].

    Y and X are rounded up to whole tiles.
    """
    rows, columns = -(-height // TILE), -(-width // TILE)
    scene, row, column = np.nonzero(_touched(packed, width, height, rows, columns))
    tiles = np.zeros((packed["camera"].shape[0], rows, columns, 4, TILE, TILE), np.float32)
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
        shaded = _shade_tiles(
            gathered, np.float32(x * TILE), np.float32(y * TILE),
            np.float32(width), np.float32(height), supersample=supersample,
        )  # fmt: skip
        shaded = np.moveaxis(np.asarray(shaded), 3, 0)
        tiles[which[:number], y[:number], x[:number]] = shaded[:number]
    # [B, tile row, tile column, 4, y, x] -> [B, 4, Y, X]
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 4, rows * TILE, columns * TILE)


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
    depth, found = _nearest(packed, origin, direction, 0.0)
    solid = _look_up(packed, found)
    hit = jnp.isfinite(depth)
    depth, normal, touched = _round_off(solid, origin, direction, jnp.where(hit, depth, 1.0))
    hit = hit & touched
    point = tuple(o + depth * d for o, d in zip(origin, direction, strict=True))
    hit, point, normal, depth = jax.lax.optimization_barrier((hit, point, normal, depth))
    view = _unit(direction)

    # shadows change slowly: once a pixel, at its nearest sample
    by_sample = (samples, TILE * TILE, tiles)
    far = jnp.where(hit, depth, jnp.inf).reshape(by_sample)
    chosen = (far == jnp.min(far, axis=0, keepdims=True)) & jnp.isfinite(far)
    chosen = chosen / jnp.maximum(jnp.sum(chosen, axis=0, keepdims=True), 1)

    def pick(value):
        return jnp.sum(value.reshape(by_sample) * chosen, axis=0)

    pixel_point, pixel_normal = (tuple(map(pick, v)) for v in (point, normal))
    pixel_found = jnp.round(pick(found)).astype(jnp.int32)
    lit, openness = _visibility(packed, pixel_point, pixel_normal, pixel_found)
    lit = [jnp.tile(v, (samples, 1)) for v in lit]
    openness = jnp.tile(openness, (samples, 1))

    white = _diffuse(packed, point, normal, lit, openness)
    gloss = _gloss(packed, point, normal, view, lit, RUBBER_ALPHA)
    metal = _metal(packed, solid, point, normal, view, lit, found)
    rgba = [
        jnp.where(solid["metal"] > 0.5, m, solid[f"color{i}"] * w + RUBBER_GLOSS * g)
        for i, (m, w, g) in enumerate(zip(metal, white, gloss, strict=True))
    ]
    rgba = jnp.stack([*(jnp.minimum(c, 1.0) for c in rgba), jnp.ones_like(depth)])
    rgba = jnp.where(hit[None], rgba, 0.0).reshape(4, *by_sample).mean(axis=1)
    return rgba.reshape(4, TILE, TILE, tiles)


OBJECT_FIELDS = (
    "x", "y", "z", "radius", "inverse_radius", "cosine", "sine", "metal", "bevel",
    "is_cube", "is_sphere", "color0", "color1", "color2",
)  # fmt: skip


def _object(packed, n) -> dict:
    """The n-th slot's numbers, as scalars; n may be traced."""
    fields = packed | {f"color{i}": packed["color"][:, i] for i in range(3)}
    return {
        name: jax.lax.dynamic_index_in_dim(fields[name], n, keepdims=False)
        for name in OBJECT_FIELDS
    }


def _each_object(packed, body, start):
    """Fold `body(n, object, carry)` over the slots.

    A device loop on purpose: what was computed before it is computed once. With an axis (or a
    Python loop) of objects, XLA on a CPU fuses it into every object's turn and repeats it.
    """
    slots = packed["x"].shape[0]
    return jax.lax.fori_loop(0, slots, lambda n, c: body(n, _object(packed, n), c), start)


def _nearest(packed, origin, direction, nearest, exclude: jax.Array | int = -1):
    """(ray parameter, inf without a hit; slot of the object hit, -1 without), each [S].

    `exclude` is a slot, or one for each ray, that the ray passes through.
    """

    def body(n, o, carry):
        depth, found = carry
        start, step = _own_point(o, origin), _own_frame(o, direction)
        mine = geometry.first_hit(start, step, o["is_cube"], o["is_sphere"], nearest)
        mine = jnp.where(exclude == n, jnp.inf, mine)
        return jnp.minimum(depth, mine), jnp.where(mine < depth, n, found)

    shape = direction[0].shape
    start = (jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32))
    return _each_object(packed, body, start)


def _look_up(packed, found) -> dict:
    """The numbers of the object in slot `found`, each float32 [S]; 0 where it is -1."""

    def body(n, o, carry):
        return {name: jnp.where(found == n, o[name], carry[name]) for name in OBJECT_FIELDS}

    zero = jnp.zeros(found.shape, jnp.float32)
    return _each_object(packed, body, {name: zero for name in OBJECT_FIELDS})


def _rounding(solid, q):
    """Vector from the solid's inner core to a local point; as long as the bevel on the surface."""
    inner = 1.0 - solid["bevel"]
    box = tuple(jnp.sign(v) * jnp.maximum(jnp.abs(v) - inner, 0.0) for v in q)
    ring = jnp.sqrt(jnp.maximum(q[0] * q[0] + q[1] * q[1], 1e-12))
    outward = jnp.maximum(ring - inner, 0.0) / ring
    is_cylinder = solid["is_cube"] + solid["is_sphere"] < 0.5
    return (
        jnp.where(is_cylinder, q[0] * outward, box[0]),
        jnp.where(is_cylinder, q[1] * outward, box[1]),
        box[2],
    )


def _world_normal(solid, core):
    """Local direction of `_rounding` -> unit world vector."""
    c, s = solid["cosine"], solid["sine"]
    return _unit((c * core[0] - s * core[1], s * core[0] + c * core[1], core[2]))


def _own_frame(solid, vector):
    return geometry.to_local(vector, solid["cosine"], solid["sine"], solid["inverse_radius"])


def _own_point(solid, point):
    return _own_frame(solid, tuple(point[i] - solid[a] for i, a in enumerate("xyz")))


def _round_off(solid, origin, direction, depth):
    """March from the sharp solid's entry to the rounded one: (depth, normal, touched), each [S]."""
    start = _own_point(solid, origin)
    step = _own_frame(solid, direction)
    per_length = jax.lax.rsqrt(jnp.maximum(_dot(step, step), 1e-12))
    core, gap = start, depth  # replaced in the first round
    for i in range(ROUNDING_STEPS + 1):
        core = _rounding(solid, tuple(o + depth * d for o, d in zip(start, step, strict=True)))
        gap = jnp.sqrt(jnp.maximum(_dot(core, core), 1e-12)) - solid["bevel"]
        if i < ROUNDING_STEPS:
            depth = depth + gap * per_length
    return depth, _world_normal(solid, core), gap < 0.01


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


def _shadow(o, point, toward, distance, half_size):
    """Share of a lamp that one object leaves visible from points, float32 [S].

    The gap between ray and surface (negative inside) where the ray comes closest, against the
    half width that the cone from the point to the lamp has there.
    """
    origin, step = _own_point(o, point), _own_frame(o, toward)
    enter, leave, _ = geometry.crossing(origin, step, o["is_cube"], o["is_sphere"])
    middle = jnp.clip(0.5 * (enter + leave), 0.0, distance)
    x, y, z = (p + middle * d for p, d in zip(origin, step, strict=True))
    flat = x * x + y * y
    round_gap = jnp.sqrt(jnp.where(o["is_sphere"] > 0.5, flat + z * z, flat)) - 1.0
    square_gap = jnp.maximum(jnp.abs(x), jnp.abs(y)) - 1.0
    gap = jnp.where(o["is_cube"] > 0.5, square_gap, round_gap)
    gap = jnp.where(o["is_sphere"] > 0.5, gap, jnp.maximum(gap, jnp.abs(z) - 1.0))
    spread = half_size * middle / distance * o["inverse_radius"] + 0.02
    share = jnp.clip(0.5 + 0.5 * gap / spread, 0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)


HALF_SIZE = (*LAMP_HALF_SIZE, SUN_HALF_SIZE)
LIGHT_RGB = (*LAMP_RGB, (1.0, 1.0, 1.0))


def _openness(o, point, normal):
    """Share of the sky that one object leaves open, float32 [S] (as a sphere of equal size)."""
    offset = tuple(o[a] - point[i] for i, a in enumerate("xyz"))
    square, reach = _dot(offset, offset), o["radius"] * o["radius"]
    toward = _dot(offset, normal) * jax.lax.rsqrt(square)
    return 1.0 - 0.9 * jnp.maximum(toward, 0.0) * reach / jnp.maximum(square, reach)


def _visibility(packed, point, normal, exclude: jax.Array | int = -1):
    """(share of each of the four lamps that is visible, share of the sky), each [S]."""
    rays = [_lamp(packed, index, point)[:2] for index in range(4)]

    def body(n, o, carry):
        shares = [_shadow(o, point, *ray, half) for ray, half in zip(rays, HALF_SIZE, strict=True)]
        shares.append(_openness(o, point, normal))
        return [c * jnp.where(exclude == n, 1.0, s) for c, s in zip(carry, shares, strict=True)]

    *lit, openness = _each_object(packed, body, [jnp.ones(point[0].shape, jnp.float32)] * 5)
    return lit, openness


def _diffuse(packed, point, normal, lit, openness):
    """Light that a white matte surface sends back, three [S]."""
    sky = 0.5 + 0.5 * normal[2]
    around = AMBIENT * (sky + 2.0 * (1.0 - sky)) * openness
    total = [around, around, around]
    for index in range(4):
        toward, _, strength = _lamp(packed, index, point)
        amount = strength * lit[index] * jnp.maximum(_dot(normal, toward), 0.0)
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    return total


def _gloss(packed, point, normal, view, lit, alpha):
    """Highlights of the lamps, GGX without masking, three [S]."""
    total = [0.0, 0.0, 0.0]
    for index in range(4):
        toward, distance, strength = _lamp(packed, index, point)
        half = _unit(tuple(t - v for t, v in zip(toward, view, strict=True)))
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
    floor = tuple(p + reach * d for p, d in zip(point, direction, strict=True))
    total = [0.0, 0.0, 0.0]
    for index in range(4):
        toward, _, strength = _lamp(packed, index, floor)
        amount = strength * jnp.maximum(toward[2], 0.0)
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    up = (0.0, 0.0, 1.0)
    near = _each_object(
        packed, lambda _, o, c: c * _openness(o, floor, up), jnp.ones(point[0].shape, jnp.float32)
    )
    floor_light = [GROUND_ALBEDO * (t + AMBIENT) * near for t in total]
    behind = BEHIND[0] * direction[0] + BEHIND[1] * direction[1]
    wall = SKY * (1.0 + jnp.maximum(behind, 0.0)) * jnp.clip(1.3 - direction[2], 0.0, 1.0)
    blend = jnp.clip(0.5 - direction[2] / 0.2, 0.0, 1.0)
    return [wall + blend * (f - wall) for f in floor_light]


def _metal(packed, solid, point, normal, view, lit, found):
    """Two glossy lobes, tinted: what the sharp one mirrors, what the broad one gathers."""
    slope = 2.0 * _dot(view, normal)
    mirror = tuple(v - slope * n for v, n in zip(view, normal, strict=True))
    seen = _surroundings(packed, point, mirror)
    depth, other = _nearest(packed, point, mirror, 1e-3, exclude=found)
    hit = jnp.isfinite(depth)
    neighbour = _look_up(packed, other)
    there = tuple(p + jnp.where(hit, depth, 1.0) * m for p, m in zip(point, mirror, strict=True))
    its_normal = _world_normal(neighbour, _rounding(neighbour, _own_point(neighbour, there)))
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


def _pixel_rays(packed, width, height, step=1):
    """Directions through the centres of step x step px cells, three [rows * columns]."""
    columns = (jnp.arange(-(-width // step), dtype=jnp.float32) + 0.5) * step
    rows = (jnp.arange(-(-height // step), dtype=jnp.float32) + 0.5) * step
    columns, rows = jnp.tile(columns, rows.size), jnp.repeat(rows, columns.size)
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
    point = tuple(o + reach * d for o, d in zip(origin, direction, strict=True))
    lean = jnp.where(rising, (start + reach * behind) / -BACKDROP_RADIUS, 0.0)
    up = jnp.sqrt(jnp.maximum(1.0 - lean * lean, 0.0))
    return point, (lean * BEHIND[0], lean * BEHIND[1], up)


@partial(jax.jit, static_argnames=("width", "height"))
def _finish(packed, cover, *, width, height):
    """One scene's ground under its tiles: float32 [4, Y, X] -> uint8 [Y, X, 3]."""
    step = 2 if width >= COARSE_GROUND_PX else 1
    direction = _pixel_rays(packed, width, height, step)
    origin = tuple(packed["camera"][i] for i in range(3))
    point, normal = _backdrop(origin, direction)
    light = _diffuse(packed, point, normal, *_visibility(packed, point, normal))
    ground = GROUND_ALBEDO * jnp.stack(light).reshape(3, -(-height // step), -(-width // step))
    if step == 2:
        ground = _double(_double(ground, 1), 2)[:, :height, :width]
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
    _, found = _nearest(packed, origin, direction, 0.0)
    return (found + 1).reshape(height, width)
