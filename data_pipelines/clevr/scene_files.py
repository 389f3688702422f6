"""Read and write CLEVR's scenes JSON, and find the images of a CLEVR folder.

    load_clevr_scenes  CLEVR_{split}_scenes.json -> scenes
    save_clevr_scenes  scenes -> the same layout, with relationships and directions
    clevr_folder_scenes  a CLEVR_v1.0 folder -> its scenes that have an image

Camera jitter is not recorded in these files; it is fitted to the recorded pixel coordinates.

Source: facebookresearch/clevr-dataset-gen f0ce2c8, `image_generation/render_images.py`.
Next: data_pipelines/clevr/recorded.py
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.clevr.camera_fit import fit_cameras
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
    return make_recorded_scenes(
        [parse_objects(record) for record in records],
        [Path(record["image_filename"]).stem for record in records],
        [
            None if images_dir is None else str(Path(images_dir) / record["image_filename"])
            for record in records
        ],
    )


def make_recorded_scenes(
    objects: Sequence[tuple[SceneObject, ...]], names: Sequence[str], paths: Sequence[str | None]
) -> list[Scene]:
    """Scenes of recorded objects, with cameras fitted and lights unjittered."""
    cameras = fit_cameras(objects)
    return [
        Scene(name, things, jitter, NO_LIGHT_JITTER, path, width, height)
        for things, name, path, (jitter, width, height) in zip(
            objects, names, paths, cameras, strict=True
        )
    ]


def clevr_folder_scenes(folder: str | Path) -> tuple[Scene, ...]:
    """All scenes of a CLEVR folder (every `scenes/*.json`) that have an image.

    Images are found by name anywhere under `images/`: CLEVR_v1.0 has a folder per split there.

    Raises:
        ValueError: no scene file, no scene with an image, or names that stand for two images or
            two scenes.
    """
    files = sorted(Path(folder).glob("**/scenes/*.json"))
    if not files:
        raise ValueError(f"{folder} has no scenes/*.json; expected CLEVR_v1.0's layout")
    scenes: dict[str, Scene] = {}
    problems: list[str] = []
    for file in files:
        folder_of_images = file.parent.parent / "images"
        images: dict[str, list[Path]] = {}
        for path in sorted(folder_of_images.rglob("*.*")):
            images.setdefault(path.name, []).append(path)
        for scene in load_clevr_scenes(file, folder_of_images):
            found = images.get(Path(scene.image_path or "").name, [])
            if len(found) > 1:
                problems.append(f"{file}: {scene.scene_id} has {len(found)} images of its name")
            elif found and scene.scene_id in scenes:
                problems.append(f"{file}: {scene.scene_id} is in another scene file, too")
            elif found:
                scenes[scene.scene_id] = dataclasses.replace(scene, image_path=str(found[0]))
    if problems:
        raise ValueError(f"{len(problems)} ambiguous scenes:\n" + "\n".join(problems[:20]))
    if not scenes:
        raise ValueError(f"{folder} has scene files but none of their images")
    return tuple(scenes.values())


def _problems(record: dict) -> list[str]:
    """Everything that keeps one recorded scene from being read."""
    if not isinstance(record, dict) or not isinstance(record.get("objects"), list):
        return ["expected an object with a list 'objects'"]
    name = record.get("image_filename")
    found = [] if name else ["no 'image_filename'"]
    if name and (not isinstance(name, str) or Path(name).name != name):
        found.append(f"image_filename {name!r} is no plain file name: it could leave the folder")
    for n, entry in enumerate(record["objects"]):
        if not isinstance(entry, dict):
            found.append(f"object {n}: expected a JSON object, got {entry!r}")
            continue
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
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    )


def parse_objects(record: dict) -> tuple[SceneObject, ...]:
    """The objects of one checked record."""
    return tuple(
        SceneObject(
            *(entry[name] for name in ATTRIBUTES),
            position=_triple(entry["3d_coords"]),
            rotation=float(entry.get("rotation", 0.0)),
            pixel_coords=_triple(entry["pixel_coords"]),
        )
        for entry in record["objects"]
    )


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
