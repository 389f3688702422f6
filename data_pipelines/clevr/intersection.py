"""Which solid a ray meets, where, and how its rounded edges turn the normal there.

Vectors are tuples of three arrays [S] (S = rays): the long axis stays last, which is what a CPU's
vector units want. A solid is the dict of its numbers (`OBJECT_FIELDS`), as scalars in a loop over
slots or one for each ray.

Next: data_pipelines/clevr/lighting.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from data_pipelines.clevr import geometry

BEVEL = {"cube": 0.12, "cylinder": 0.06, "sphere": 1.0}
ROUNDING_STEPS = 4  # ours: steps from the sharp solid to the rounded one

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


def each_object(packed, body, start):
    """Fold `body(n, object, carry)` over the slots.

    A device loop on purpose: what was computed before it is computed once. With an axis (or a
    Python loop) of objects, XLA on a CPU fuses it into every object's turn and repeats it.
    """
    slots = packed["x"].shape[0]
    return jax.lax.fori_loop(0, slots, lambda n, c: body(n, _object(packed, n), c), start)


def nearest_solid(packed, origin, direction, nearest, exclude: jax.Array | int = -1):
    """(ray parameter, inf without a hit; slot of the object hit, -1 without), each [S].

    `exclude` is a slot, or one for each ray, that the ray passes through.
    """

    def body(n, o, carry):
        depth, found = carry
        start, step = own_point(o, origin), own_frame(o, direction)
        mine = geometry.first_hit(start, step, o["is_cube"], o["is_sphere"], nearest)
        mine = jnp.where(exclude == n, jnp.inf, mine)
        return jnp.minimum(depth, mine), jnp.where(mine < depth, n, found)

    shape = direction[0].shape
    start = (jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32))
    return each_object(packed, body, start)


def look_up(packed, found) -> dict:
    """The numbers of the object in slot `found`, each float32 [S]; 0 where it is -1."""

    def body(n, o, carry):
        return {name: jnp.where(found == n, o[name], carry[name]) for name in OBJECT_FIELDS}

    zero = jnp.zeros(found.shape, jnp.float32)
    return each_object(packed, body, {name: zero for name in OBJECT_FIELDS})


def rounding(solid, q):
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


def world_normal(solid, core):
    """Local direction of `rounding` -> unit world vector."""
    c, s = solid["cosine"], solid["sine"]
    return unit((c * core[0] - s * core[1], s * core[0] + c * core[1], core[2]))


def own_frame(solid, vector):
    return geometry.to_local(vector, solid["cosine"], solid["sine"], solid["inverse_radius"])


def own_point(solid, point):
    return own_frame(solid, tuple(point[i] - solid[a] for i, a in enumerate("xyz")))


def round_off(solid, origin, direction, depth):
    """March from the sharp solid's entry to the rounded one: (depth, normal, touched), each [S]."""
    start = own_point(solid, origin)
    step = own_frame(solid, direction)
    per_length = jax.lax.rsqrt(jnp.maximum(dot(step, step), 1e-12))
    core, gap = start, depth  # replaced in the first round
    for i in range(ROUNDING_STEPS + 1):
        core = rounding(solid, tuple(o + depth * d for o, d in zip(start, step, strict=True)))
        gap = jnp.sqrt(jnp.maximum(dot(core, core), 1e-12)) - solid["bevel"]
        if i < ROUNDING_STEPS:
            depth = depth + gap * per_length
    return depth, world_normal(solid, core), gap < 0.01


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(v):
    scale = jax.lax.rsqrt(jnp.maximum(dot(v, v), 1e-12))
    return tuple(c * scale for c in v)
