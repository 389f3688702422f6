"""Read and write CLEVR's scenes JSON, and find the images of a CLEVR folder.

    load_clevr_scenes  CLEVR_{split}_scenes.json -> scenes
    save_clevr_scenes  scenes -> the same layout, with relationships and directions
    clevr_folder_scenes  a CLEVR_v1.0 folder -> its scenes that have an image

Camera jitter is not recorded in these files; it is fitted to the recorded pixel coordinates.

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `image_generation/render_images.py`.
Next: data_pipelines/clevr/tfds_scenes.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from data_pipelines.clevr import geometry
from data_pipelines.clevr.scene import (
    ATTRIBUTES,
    DIRECTIONS,
    NO_LIGHT_JITTER,
    VERTICAL_DIRECTIONS,
    Scene,
    SceneObject,
    relationships,
)


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


@functools.lru_cache(maxsize=1)  # read once, sliced many times
def clevr_folder_scenes(folder: str | Path) -> tuple[Scene, ...]:
    """All scenes of a CLEVR folder (every `scenes/*.json`) that have an image.

    Images are found by name anywhere under `images/`: CLEVR_v1.0 has a folder per split there.

    Raises:
        ValueError: no scene file, or no scene with an image.
    """
    files = sorted(Path(folder).glob("**/scenes/*.json"))
    if not files:
        raise ValueError(f"{folder} has no scenes/*.json; expected CLEVR_v1.0's layout")
    scenes = []
    for file in files:
        folder_of_images = file.parent.parent / "images"
        images = {path.name: str(path) for path in sorted(folder_of_images.rglob("*.*"))}
        for scene in load_clevr_scenes(file, folder_of_images):
            found = images.get(Path(scene.image_path or "").name)
            if found:
                scenes.append(dataclasses.replace(scene, image_path=found))
    if not scenes:
        raise ValueError(f"{folder} has scene files but none of their images")
    return tuple(scenes)


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
        found = geometry.project(points, np.add(geometry.CAMERA_POSITION, jitter), width, height)
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
