"""A CLEVR scene: its words, its objects, how they stand to each other.

    Scene, SceneObject  what every source of scenes gives and every reader takes
    relationships       scene -> for each object, who is left, right, in front, behind
    pack_solids         scenes -> arrays for the device

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `data/properties.json` and
`image_generation/render_images.py`; Johnson et al. 2017, arXiv:1612.06890.
Next: data_pipelines/clevr/sampling.py
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.clevr import geometry

SHAPES = ("cube", "sphere", "cylinder")  # properties.json "shapes"
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")  # "colors"
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
ATTRIBUTES = {"shape": SHAPES, "color": COLORS, "size": SIZES, "material": MATERIALS}
RADIUS = {"small": 0.35, "large": 0.7}  # properties.json "sizes": half extents, metres

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
