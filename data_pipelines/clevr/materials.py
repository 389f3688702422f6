"""What rubber and metal send back to the eye.

Rubber: its colour and a weak sheen times the white matte light, and a weak gloss. Metal: two glossy
lobes, tinted; the sharp one mirrors the neighbours and the ground, the broad one gathers what is
around.

Source: facebookresearch/clevr-dataset-gen f0ce2c8, materials `Rubber` and `MyMetal`; GGX from
Walter et al. 2007.
Next: data_pipelines/clevr/renderer.py
"""

from __future__ import annotations

import jax.numpy as jnp

from data_pipelines.clevr.intersection import (
    dot,
    each_object,
    look_up,
    nearest_solid,
    own_point,
    rounding,
    unit,
    world_normal,
)
from data_pipelines.clevr.lighting import (
    AMBIENT,
    BEHIND,
    GROUND_ALBEDO,
    HALF_SIZE,
    LIGHT_RGB,
    SKY,
    WALL,
    diffuse_light,
    lamp_light,
    openness_of,
)

# properties.json "colors": sRGB bytes, used by the generator as linear values / 255.
RGB = {
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}  # fmt: skip

RUBBER_ALPHA, RUBBER_GLOSS = 0.4, 0.02  # ours, for Rubber's weak Fresnel gloss
RUBBER_SHEEN = 0.02  # ours, for Rubber's sheen: a white share of its albedo
RUBBER_WRAP = 0.1  # ours, for Rubber's rough diffuse: light that reaches round the edge
RUBBER_SHARE = 0.88  # ours, fitted: what Rubber sends back of its colour
METAL_ALPHA = (0.045, 0.2)  # ours, for MyMetal's two glossy lobes of roughness 0.1 and 0.45
METAL_SHARP = 0.6  # MyMetal: share of the first lobe


def gloss_light(packed, point, normal, view, lit, alpha):
    """Highlights of the lamps, GGX without masking, three [S]."""
    total = [0.0, 0.0, 0.0]
    for index in range(4):
        toward, distance, strength = lamp_light(packed, index, point)
        half = unit(tuple(t - v for t, v in zip(toward, view, strict=True)))
        wide = alpha + 0.5 * HALF_SIZE[index] / distance  # the lamp's own size blurs the lobe
        square = wide * wide
        cosine = jnp.maximum(dot(normal, half), 0.0)
        base = cosine * cosine * (square - 1.0) + 1.0
        lobe = square / (4.0 * base * base)  # D pi / 4; strength is irradiance / pi
        facing = jnp.clip(8.0 * dot(normal, toward), 0.0, 1.0)
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
        toward, _, strength = lamp_light(packed, index, floor)
        amount = strength * jnp.maximum(toward[2], 0.0)
        total = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(total)]
    up = (0.0, 0.0, 1.0)
    near = each_object(
        packed, lambda _, o, c: c * openness_of(o, floor, up), jnp.ones(point[0].shape, jnp.float32)
    )
    floor_light = [GROUND_ALBEDO * (t + AMBIENT) * near for t in total]
    behind = BEHIND[0] * direction[0] + BEHIND[1] * direction[1]
    behind = jnp.maximum(behind, 0.0)
    wall = SKY + WALL * behind * behind * jnp.clip(1.2 - direction[2], 0.0, 1.0)
    blend = jnp.clip(0.5 - direction[2] / 0.2, 0.0, 1.0)
    return [wall + blend * (f - wall) for f in floor_light]


def rubber_light(packed, solid, point, normal, view, lit, openness):
    """Its colour under a soft matte light, a white sheen and a weak gloss, three [S]."""
    white = diffuse_light(packed, point, normal, lit, openness, RUBBER_WRAP)
    gloss = gloss_light(packed, point, normal, view, lit, RUBBER_ALPHA)
    return [
        RUBBER_SHARE * (solid[f"color{i}"] + RUBBER_SHEEN) * w + RUBBER_GLOSS * g
        for i, (w, g) in enumerate(zip(white, gloss, strict=True))
    ]


def metal_light(packed, solid, point, normal, view, lit, found):
    """Two glossy lobes, tinted: what the sharp one mirrors, what the broad one gathers."""
    slope = 2.0 * dot(view, normal)
    mirror = tuple(v - slope * n for v, n in zip(view, normal, strict=True))
    seen = _surroundings(packed, point, mirror)
    depth, other = nearest_solid(packed, point, mirror, 1e-3, exclude=found)
    hit = jnp.isfinite(depth)
    neighbour = look_up(packed, other)
    there = tuple(p + jnp.where(hit, depth, 1.0) * m for p, m in zip(point, mirror, strict=True))
    its_normal = world_normal(neighbour, rounding(neighbour, own_point(neighbour, there)))
    its_light = [AMBIENT, AMBIENT, AMBIENT]
    for index in range(4):
        toward, _, strength = lamp_light(packed, index, there)
        amount = strength * jnp.maximum(dot(its_normal, toward), 0.0)
        its_light = [t + LIGHT_RGB[index][i] * amount for i, t in enumerate(its_light)]
    seen = [jnp.where(hit, neighbour[f"color{i}"] * its_light[i], seen[i]) for i in range(3)]
    # the broad lobe also finds ground well beside the mirror ray
    low = 0.2 * jnp.clip(0.4 - mirror[2], 0.0, 1.0)
    blurred = [0.5 * s + 0.5 * low for s in seen]
    sharp_gloss = gloss_light(packed, point, normal, view, lit, METAL_ALPHA[0])
    broad_gloss = gloss_light(packed, point, normal, view, lit, METAL_ALPHA[1])
    color = []
    for i in range(3):
        sharp = seen[i] + sharp_gloss[i]
        broad = blurred[i] + broad_gloss[i]
        color.append(solid[f"color{i}"] * (METAL_SHARP * sharp + (1 - METAL_SHARP) * broad))
    return color
