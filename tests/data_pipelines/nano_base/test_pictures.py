"""Labels of cells: the right object in the right cell, and lone objects that show every value."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.building import write_dataset
from data_pipelines.clevr.scene import ATTRIBUTES
from data_pipelines.nano_base.pictures import (
    FIELDS,
    SLOTS,
    index_by_value,
    label_cells,
    load_pictures,
    make_lone_examples,
)
from data_pipelines.nano_base.scenes import SceneSetSettings, make_scene_examples
from tests.data_pipelines.policy_reader import make_object


def read_label(label):
    return " ".join(ATTRIBUTES[name][value] for name, value in zip(FIELDS, label[1:], strict=True))


def placed(words, column, row):
    return dataclasses.replace(make_object(words), pixel_coords=(column, row, 10.0))


def test_an_object_labels_the_cell_of_its_centre():
    things = [
        placed("red small metal cube", 30.0, 5.0),
        placed("blue large rubber sphere", 83.9, 55.9),
    ]
    labels = label_cells(things, rows=2, columns=3)
    assert labels[:, 0, 0].tolist() == [0, 1, 0, 0, 0, 1]
    assert not labels[:, 1].any()
    assert read_label(labels[1, 0]) == "red small metal cube"
    assert read_label(labels[5, 0]) == "blue large rubber sphere"


def test_two_objects_of_a_cell_stand_in_naming_order_and_a_third_is_left_out():
    words = ["yellow small metal cube", "gray large rubber sphere", "blue small metal cylinder"]
    labels = label_cells([placed(text, 3.0, 3.0) for text in words], rows=1, columns=1)
    assert labels.shape == (1, SLOTS, 5)
    assert [read_label(label) for label in labels[0]] == [words[1], words[2]]


@pytest.mark.parametrize(("column", "row", "cell"), [(-2.0, 1.0, 0), (60.0, 99.0, 5)])
def test_a_centre_outside_counts_for_the_nearest_cell(column, row, cell):
    thing = placed("red small metal cube", column, row)
    labels = label_cells([thing], rows=2, columns=3)
    assert np.flatnonzero(labels[:, 0, 0]).tolist() == [cell]


def test_lone_pictures_stand_for_every_value(tmp_path):
    write_dataset(tmp_path / "lone", {"train": make_lone_examples(45, 56, 3)}, {"seed": 3})
    pictures = load_pictures(tmp_path / "lone", lone=True)
    assert pictures.pixels.shape == (45, 56, 56, 3)
    assert (pictures.labels[:, :, 0] == pictures.labels[:, :1, 0]).all()  # all four cells agree
    index = index_by_value(pictures)
    assert set(index) == {(name, value) for name in ATTRIBUTES for value in ATTRIBUTES[name]}
    for (name, value), numbers in index.items():
        things = [pictures.objects[number][0] for number in numbers]
        assert all(getattr(thing, name) == value for thing in things)
        if name == "material":
            assert all(thing.size == "large" for thing in things)


def test_scenes_come_back_with_their_objects(tmp_path):
    settings = SceneSetSettings(count=3, width=112, height=56)
    examples = list(make_scene_examples(settings))
    write_dataset(tmp_path / "scenes", {"train": iter(examples)}, {"count": 3})
    pictures = load_pictures(tmp_path / "scenes")
    assert pictures.pixels.shape == (3, 56, 112, 3)
    assert pictures.labels.shape == (3, 8, SLOTS, 5)
    for things, labels in zip(pictures.objects, pictures.labels, strict=True):
        assert labels[..., 0].sum() == len(things)
