"""The pictures inside a -M policy: small crops of one object each, standing for attribute values.

    # Condition 1.2: any color [crop]?      the attribute is named, its value is to be seen

A crop shows exactly one object that has the value; everything else about it is drawn at random, so
the attribute's name is needed to know what the picture means. What makes each value identifiable:

    color, shape   any single object shows them
    material       large objects only: on a small one the gloss is a few pixels
    size           all crops have one scale, WINDOW metres a side at the object's distance, so a
                   large object fills its crop and a small one half of it

Crops are rendered (the object alone on the ground), or cut from CLEVR images around the projected
extent of an object that no other one comes near. Their side is a multiple of 28 px, two patches
merged of Qwen2.5-VL; 56 px is the smallest area that its processor leaves as it is.

Source: paper section 2 (-M: "image crops"; how they were chosen is not stated).
Next: data_pipelines/clevr_policy/document.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipelines.clevr import geometry
from data_pipelines.clevr.recorded import read_picture
from data_pipelines.clevr.renderer import render_scenes
from data_pipelines.clevr.scene import ATTRIBUTES, RADIUS, Scene, SceneObject
from data_pipelines.clevr_policy.tree import Condition, PolicyTree, iter_conditions
from data_pipelines.example import decode_image, encode_png

CELL_PX = 28  # Qwen2.5-VL: patches of 14 px, merged 2 x 2
WINDOW = 2.24  # metres a side: a large cube seen edge-on (0.7 * 2 * 1.5) with a rim of ground
MAX_LIGHT_JITTER = 1.0  # as in the scenes
# a solid's projected half extent over its radius, whatever its rotation
REACH = {"cube": 1.5, "cylinder": 1.3, "sphere": 1.05}


@dataclasses.dataclass(frozen=True)
class Crop:
    """A picture of `thing` that stands for the value of one condition of a policy."""

    section: str
    thing: SceneObject
    png: bytes


def choose_shown(rng: np.random.Generator, tree: PolicyTree, share: float) -> tuple[Condition, ...]:
    """The conditions whose value is shown: `share` of them, at least one, in reading order."""
    conditions = list(iter_conditions(tree.root))
    count = max(1, round(share * len(conditions)))
    chosen = sorted(rng.permutation(len(conditions))[:count].tolist())
    return tuple(conditions[i] for i in chosen)


def render_crops(
    rng: np.random.Generator, conditions: Sequence[Condition], crop_px: int
) -> tuple[Crop, ...]:
    """One rendered crop a condition: a lone object in the middle, under jittered lamps."""
    things, scenes = [], []
    depth = float(np.linalg.norm(geometry.CAMERA_POSITION))
    width = round(crop_px * depth / (WINDOW * geometry.FOCAL_PER_WIDTH))
    width += -width % 4
    height = width * 2 // 3
    height += -height % 4
    for condition in conditions:
        looks = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
        if condition.attribute == "material":
            looks["size"] = "large"
        looks[condition.attribute] = condition.value
        rotation = float(360.0 * rng.random())
        thing = SceneObject(
            looks["shape"],
            looks["color"],
            looks["size"],
            looks["material"],
            (0.0, 0.0, RADIUS[looks["size"]]),
            rotation,
        )
        jitter = rng.uniform(-MAX_LIGHT_JITTER, MAX_LIGHT_JITTER, (3, 3)).tolist()
        things.append(thing)
        scenes.append(
            Scene(
                f"crop{len(scenes)}",
                (thing,),
                light_jitter=tuple(map(tuple, jitter)),
                width=width,
                height=height,
            )
        )
    pictures = render_scenes(scenes, width=width, height=height)
    camera = np.array(geometry.CAMERA_POSITION)
    crops = []
    for condition, thing, pixels in zip(conditions, things, pictures, strict=True):
        column, row, _ = geometry.project(np.array([thing.position]), camera, width, height)[0]
        left, top = round(column - crop_px / 2), round(row - crop_px / 2)
        window = pixels[top : top + crop_px, left : left + crop_px]
        crops.append(Crop(condition.section, thing, encode_png(np.ascontiguousarray(window))))
    return tuple(crops)


def cut_crops(
    rng: np.random.Generator,
    conditions: Sequence[Condition],
    scenes: Sequence[Scene],
    crop_px: int,
) -> tuple[Crop, ...]:
    """One crop a condition, cut from the images of `scenes` around a fitting, free-standing object.

    Raises:
        ValueError: naming the values that no free-standing object of these images has.
    """
    crops, missing = [], []
    for condition in conditions:
        found = _find_free(rng, condition, scenes)
        if found is None:
            missing.append(f"{condition.attribute} {condition.value}")
            continue
        scene, thing, box = found
        pixels = decode_image(read_picture(scene), scene.image_path or scene.scene_id)
        # recorded pixels are those of the scene's size, the file may have been scaled
        scale = (pixels.shape[1] / scene.width, pixels.shape[0] / scene.height) * 2
        box = tuple(side * factor for side, factor in zip(box, scale, strict=True))
        small = Image.fromarray(pixels).resize(
            (crop_px, crop_px), Image.Resampling.BICUBIC, box=box
        )
        crops.append(Crop(condition.section, thing, encode_png(np.asarray(small))))
    if missing:
        raise ValueError(
            f"{len(scenes)} images have no free-standing object to cut a crop from for"
            f" {sorted(set(missing))}; use crops='rendered' or more images"
        )
    return tuple(crops)


def _find_free(rng, condition: Condition, scenes: Sequence[Scene]):
    """(scene, object, window) of the first fit in a random order, or None."""
    for i in rng.permutation(len(scenes)).tolist():
        scene = scenes[i]
        for thing in scene.objects:
            if getattr(thing, condition.attribute) != condition.value:
                continue
            if condition.attribute == "material" and thing.size != "large":
                continue
            box = crop_window(scene, thing)
            if box is not None:
                return scene, thing, box
    return None


def crop_window(scene: Scene, thing: SceneObject) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom in px of the scene's size; None where it is cut off or not alone.

    `half = f WINDOW / 2 / depth` around the recorded centre; alone means that no other object's
    projected extent, `f reach r / depth`, meets the window.
    """
    if thing.pixel_coords is None:
        return None
    focal_px = geometry.FOCAL_PER_WIDTH * scene.width
    column, row, depth = thing.pixel_coords
    half = focal_px * WINDOW / 2 / depth
    if min(column, row) < half or column + half > scene.width or row + half > scene.height:
        return None
    for other in scene.objects:
        if other is thing:
            continue
        if other.pixel_coords is None:
            return None
        x, y, far = other.pixel_coords
        extent = focal_px * REACH[other.shape] * RADIUS[other.size] / far
        if max(abs(x - column), abs(y - row)) < half + extent:
            return None
    return column - half, row - half, column + half, row + half
