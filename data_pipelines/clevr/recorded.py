"""Recorded CLEVR pictures with their scene graphs, from wherever they lie.

    DIR          a CLEVR_v1.0 folder: images/**/*.png and scenes/*.json
    tfds:DIR     the data_dir of tensorflow-datasets with a prepared `clevr` builder, as ArrayRecord

A scene keeps in `image_path` where its picture is; `read_picture` fetches it. TensorFlow is needed
to prepare the builder (elsewhere, once), not to read it.

Source: CLEVR_v1.0 (CC BY 4.0); tensorflow-datasets, `datasets/clevr`, version 3.
Next: data_pipelines/clevr/renderer.py
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from data_pipelines.clevr.scene import Scene, SceneObject
from data_pipelines.clevr.scene_files import clevr_folder_scenes, make_recorded_scenes

TFDS = "tfds:"
HOW_TO_PREPARE = (
    "prepare it once where TensorFlow is installed: "
    "tfds.builder('clevr', data_dir=DIR, file_format='array_record').download_and_prepare()"
)


@functools.lru_cache(maxsize=1)  # read once, sliced many times
def recorded_scenes(location: str) -> tuple[Scene, ...]:
    """All scenes of a location that have a picture and a scene graph.

    Raises:
        ValueError: there are none, or they cannot be read.
        ImportError: `tfds:` without the package tensorflow-datasets.
    """
    if not location.startswith(TFDS):
        return clevr_folder_scenes(location)
    data_dir = location.removeprefix(TFDS)
    objects, names, paths = [], [], []
    for split in ("train", "validation"):  # the test split has no scene graphs
        source = _open_split(data_dir, split)
        if source is None:
            continue
        words = _words(data_dir)
        for number in range(len(source)):
            record = source[number]
            objects.append(_parse_objects(record["objects"], words))
            names.append(Path(record["file_name"].decode()).stem)
            paths.append(f"{TFDS}{data_dir}#{split}#{number}")
    if not names:
        raise ValueError(f"{location}: the clevr builder there has neither train nor validation")
    return tuple(make_recorded_scenes(objects, names, paths))


def read_picture(scene: Scene) -> bytes:
    """The encoded picture of a recorded scene.

    Raises:
        ValueError: the scene has none, or it cannot be read.
    """
    path = scene.image_path
    if path is None:
        raise ValueError(f"scene {scene.scene_id} has no recorded picture")
    if not path.startswith(TFDS):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"scene {scene.scene_id}: cannot read {path} ({error})") from error
    data_dir, split, number = path.removeprefix(TFDS).rsplit("#", 2)
    source = _open_split(data_dir, split)
    if source is None:
        raise ValueError(f"scene {scene.scene_id}: {data_dir} has no split {split} any more")
    return source[int(number)]["image"]


@functools.lru_cache(maxsize=4)
def _builder(data_dir: str) -> Any:
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ImportError(
            f"{TFDS}{data_dir} needs tensorflow-datasets: pip install 'trimpi_jax[tfds]'"
        ) from error
    found = sorted(Path(data_dir).glob("clevr/3.*/dataset_info.json"))
    if not found:
        raise ValueError(f"{data_dir} holds no prepared clevr/3.* builder; {HOW_TO_PREPARE}")
    return tfds.builder_from_directory(str(found[-1].parent))


@functools.lru_cache(maxsize=4)
def _open_split(data_dir: str, split: str) -> Any:
    """Random access to the records of a split, pictures left encoded; None = no such split."""
    import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports] - an extra

    builder = _builder(data_dir)
    if split not in builder.info.splits:
        return None
    try:
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{data_dir}: the clevr builder is prepared as {builder.info.file_format.value}, which"
            f" only TensorFlow reads; {HOW_TO_PREPARE}"
        ) from error


def _words(data_dir: str) -> dict[str, list[str]]:
    """Attribute -> its words in the builder's order, which is not the generator's."""
    feature = _builder(data_dir).info.features["objects"].feature
    return {name: feature[name].names for name in ("shape", "color", "size", "material")}


def _parse_objects(columns: dict[str, Any], words: dict[str, list[str]]) -> tuple[SceneObject, ...]:
    def triple(values) -> tuple[float, float, float]:
        x, y, z = map(float, values)
        return x, y, z

    return tuple(
        SceneObject(
            *(words[name][int(columns[name][n])] for name in words),
            position=triple(columns["3d_coords"][n]),
            rotation=float(columns["rotation"][n]),
            pixel_coords=triple(columns["pixel_coords"][n]),
        )
        for n in range(len(columns["shape"]))
    )
