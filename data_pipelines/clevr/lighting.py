"""Lamps, soft shadows and the sky: how much light reaches a point, and the backdrop it falls on.

Light is counted in linear units; a vector is a tuple of three arrays [S]. Shadows are ours:
analytic, no sampling, so a picture needs no random number.

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `base_scene.blend`.
Next: data_pipelines/clevr/materials.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from data_pipelines.clevr import geometry
from data_pipelines.clevr.intersection import dot, each_object, own_frame, own_point, unit

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
HALF_SIZE = (*LAMP_HALF_SIZE, SUN_HALF_SIZE)
LIGHT_RGB = (*LAMP_RGB, (1.0, 1.0, 1.0))

GROUND_ALBEDO = 0.71  # fitted to the ground of ten real pictures, 2 % rms in linear light
BACKDROP_START = 5.0  # same fit: metres behind the origin where the backdrop begins to rise
BACKDROP_RADIUS = 20.7  # same fit: metres
BEHIND = (-0.754490315914154, 0.6563112735748291)  # horizontal view direction, no jitter
SKY = 0.016  # ours: radiance from above, past the backdrop
WALL = 0.16  # ours: radiance of the backdrop's rise, as metal mirrors it
BOUNCE = 0.16  # ours: irradiance / pi from the lit ground onto what faces it
AMBIENT = 0.05  # same fit: irradiance / pi that bounces between backdrop and ground


def lamp_light(packed, index, point):
    """(unit vector to the lamp, distance, irradiance on a facing surface / pi)."""
    lamp = tuple(packed["lamps"][index, i] for i in range(3))
    offset = tuple(lamp[i] - point[i] for i in range(3))
    square = dot(offset, offset)
    inverse = jax.lax.rsqrt(square)
    toward = tuple(c * inverse for c in offset)
    distance = square * inverse
    if index == 3:
        return toward, distance, SUN_IRRADIANCE / jnp.pi
    facing = jnp.maximum(dot(unit(lamp), toward), 0.0)  # the lamp looks at the origin
    return toward, distance, LAMP_WATT[index] / jnp.pi**2 * facing * inverse * inverse


def shadow(o, point, toward, distance, half_size):
    """Share of a lamp that one object leaves visible from points, float32 [S].

    The gap between ray and surface (negative inside) where the ray comes closest, against the
    half width that the cone from the point to the lamp has there.
    """
    origin, step = own_point(o, point), own_frame(o, toward)
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


def openness_of(o, point, normal):
    """Share of the sky that one object leaves open, float32 [S] (as a sphere of equal size)."""
    offset = tuple(o[a] - point[i] for i, a in enumerate("xyz"))
    square, reach = dot(offset, offset), o["radius"] * o["radius"]
    toward = dot(offset, normal) * jax.lax.rsqrt(square)
    return 1.0 - 0.9 * jnp.maximum(toward, 0.0) * reach / jnp.maximum(square, reach)


def visibility(packed, point, normal, exclude: jax.Array | int = -1):
    """(share of each of the four lamps that is visible, share of the sky), each [S]."""
    rays = [lamp_light(packed, index, point)[:2] for index in range(4)]

    def body(n, o, carry):
        shares = [shadow(o, point, *ray, half) for ray, half in zip(rays, HALF_SIZE, strict=True)]
        shares.append(openness_of(o, point, normal))
        return [c * jnp.where(exclude == n, 1.0, s) for c, s in zip(carry, shares, strict=True)]

    *lit, openness = each_object(packed, body, [jnp.ones(point[0].shape, jnp.float32)] * 5)
    return lit, openness


def diffuse_light(packed, point, normal, lit, openness, wrap=0.0):
    """Light that a white matte surface sends back, three [S].

    `max(n . l + wrap, 0) / (1 + wrap)` for each lamp: wrap 0 is Lambert.
    """
    sky = 0.5 + 0.5 * normal[2]
    around = (AMBIENT * sky + BOUNCE * (1.0 - sky)) * openness
    total = [around, around, around]
    for index in range(4):
        toward, _, strength = lamp_light(packed, index, point)
        cosine = jnp.maximum(dot(normal, toward) + wrap, 0.0) / (1.0 + wrap)
        amount = strength * lit[index] * cosine
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    return total


def meet_backdrop(origin, direction):
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


def ground_light(packed, origin, direction):
    """Radiance of the ground and its rise along rays: three [S]."""
    point, normal = meet_backdrop(origin, direction)
    light = diffuse_light(packed, point, normal, *visibility(packed, point, normal))
    return [GROUND_ALBEDO * c for c in light]
