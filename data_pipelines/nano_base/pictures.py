"""The nano base's pictures in memory: patches as the vision tower takes them, and what they show.

    scenes   whole scenes; each cell of 28 px is labelled with the objects whose centre lies in it
    lone     one object filling the picture, as a -M policy shows values; every cell is labelled

Labels are what the first leg learns to tell from every visual token:

    cell     [slot, field]   two objects at most, in naming order; fields: there, color, size,
                             material, shape

Next: trimpi_jax/stages/nano_perception.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from data_pipelines.clevr.scene import ATTRIBUTES, SceneObject
from data_pipelines.clevr_policy.crops import CELL_PX, render_crops
from data_pipelines.clevr_policy.tree import Case, Condition
from data_pipelines.clevr_policy.wording import in_naming_order
from data_pipelines.example import Example, decode_image, decode_record
from data_pipelines.nano_base.scenes import scene_objects
from data_pipelines.shards import split_files

FIELDS = ("color", "size", "material", "shape")
FIELD_SIZES = (2, *(len(ATTRIBUTES[name]) for name in FIELDS))  # "there" is 0 or 1
SLOTS = 2  # objects of a cell that are labelled
RENDER_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Pictures:
    """N pictures of one size."""

    pixels: np.ndarray  # uint8 [N, Y, X, 3]
    objects: tuple[tuple[SceneObject, ...], ...]
    labels: np.ndarray  # int8 [N, cells, SLOTS, 1 + 4], cells row by row


def make_lone_examples(
    count: int,
    side: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Example]:
    """`count` pictures of one object each, `side` px, every value of every attribute as often."""
    values = [(name, value) for name in ATTRIBUTES for value in ATTRIBUTES[name]]
    for start in range(0, count, RENDER_CHUNK):
        size = min(RENDER_CHUNK, count - start)
        rng = np.random.default_rng([seed, 29, start])
        asked = [values[(start + i) % len(values)] for i in range(size)]
        conditions = [Condition("1", *pair, Case(1), Case(2)) for pair in asked]
        for number, crop in enumerate(render_crops(rng, conditions, side)):
            meta = {"objects": [dataclasses.asdict(crop.thing)], "shows": asked[number]}
            yield Example(f"lone-{start + number}", (crop.png,), "", "", meta=meta)
        on_progress(start + size, count)


def load_pictures(folder: str | Path, *, lone: bool = False) -> Pictures:
    """All pictures of a dataset's "train" split."""
    source = grain.sources.ArrayRecordDataSource(split_files(str(folder), "train"))
    pixels, objects, labels = [], [], []
    for record in source:
        example = decode_record(record)
        image = decode_image(example.images[0], example.example_id)
        things = lone_object(example) if lone else scene_objects(example)
        rows, columns = image.shape[0] // CELL_PX, image.shape[1] // CELL_PX
        pixels.append(image)
        objects.append(things)
        labels.append(
            label_lone(things[0], rows, columns) if lone else label_cells(things, rows, columns)
        )
    return Pictures(np.stack(pixels), tuple(objects), np.stack(labels))


def lone_object(example: Example) -> tuple[SceneObject]:
    """The object of a picture of `make_lone_examples`."""
    fields = dict(example.meta["objects"][0])
    return (SceneObject(**{**fields, "position": tuple(fields["position"])}),)


def label_cells(objects: Sequence[SceneObject], rows: int, columns: int) -> np.ndarray:
    """int8 [rows * columns, SLOTS, 5]: objects by the cell that their projected centre lies in."""
    labels = np.zeros((rows * columns, SLOTS, len(FIELD_SIZES)), np.int8)
    used = np.zeros(rows * columns, int)
    for thing in in_naming_order(objects):
        assert thing.pixel_coords is not None
        column = min(max(int(thing.pixel_coords[0] // CELL_PX), 0), columns - 1)
        row = min(max(int(thing.pixel_coords[1] // CELL_PX), 0), rows - 1)
        cell = row * columns + column
        if used[cell] < SLOTS:
            labels[cell, used[cell]] = _fields(thing)
            used[cell] += 1
    return labels


def label_lone(thing: SceneObject, rows: int, columns: int) -> np.ndarray:
    """int8 [rows * columns, SLOTS, 5]: the one object is in every cell."""
    labels = np.zeros((rows * columns, SLOTS, len(FIELD_SIZES)), np.int8)
    labels[:, 0] = _fields(thing)
    return labels


def index_by_value(pictures: Pictures) -> dict[tuple[str, str], np.ndarray]:
    """(attribute, value) -> numbers of the lone pictures that may stand for it in a policy.

    Material is read off large objects only, as in `clevr_policy.crops`.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for number, (thing,) in enumerate(pictures.objects):
        for name in ATTRIBUTES:
            if name != "material" or thing.size == "large":
                found.setdefault((name, getattr(thing, name)), []).append(number)
    return {pair: np.asarray(numbers) for pair, numbers in found.items()}


def _fields(thing: SceneObject) -> list[int]:
    return [1, *(ATTRIBUTES[name].index(getattr(thing, name)) for name in FIELDS)]
