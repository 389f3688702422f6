"""Synthetic tasks in GTA's form: really drawn images, chains of tool calls that follow from them.

A stand-in for the release, which cannot be had everywhere: the same tools, rules, sizes and layout,
other images and requests. What a tool returned is what it would return on that image: OCR's boxes
are where the text was drawn, counts and boxes are those of the scene, numbers are computed.

Source: paper section 3 (sizes, rules); open-compass/GTA for the form of its tasks.
Next: data_pipelines/gta_policy/official.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from data_pipelines.gta_policy.families import charts, documents, scenes
from data_pipelines.gta_policy.families.draft import Family
from data_pipelines.gta_policy.tasks import NamedImage, Task

FAMILIES: dict[str, Family] = {
    "menu": documents.menu,
    "receipt": documents.receipt,
    "supplement": documents.supplement,
    "ticket": documents.ticket,
    "parking": documents.parking,
    "price_tags": documents.price_tags,
    "book": documents.book,
    "bar_chart": charts.bar_chart,
    "line_chart": charts.line_chart,
    "weather_table": charts.weather_table,
    "equation": charts.equation,
    "worksheet": charts.worksheet,
    "clevr_count": scenes.clevr_count,
    "clevr_box": scenes.clevr_box,
    "street": scenes.street,
    "floor_plan": scenes.floor_plan,
    "landscape": scenes.landscape,
    "postcard": scenes.postcard,
}


def make_tasks(
    split: str,
    steps: int,
    seed: int,
    first_image: int,
    on_task: Callable[[Task], None] = lambda task: None,
) -> list[Task]:
    """Tasks of a split with exactly `steps` steps in all.

    The families take turns, in an order that is new every round.

    Args:
        split: part of every task's id and seed.
        steps: 0, or at least 2.
        seed: of the dataset.
        first_image: number of the first image name.
        on_task: called with every task that is made.

    Raises:
        ValueError: `steps` is 1: every task has at least two.
    """
    if steps == 1:
        raise ValueError("a synthetic split has 0 steps or at least 2: no task has only one")
    tasks: list[Task] = []
    left = steps
    turns = _turns(np.random.default_rng([seed, *split.encode()]))
    while left:
        family = next(turns)
        rng = np.random.default_rng([seed, *split.encode(), len(tasks), left])
        # the last tasks are drawn again until they fill the split exactly
        draft = FAMILIES[family](rng, functools.partial(_image_name, first_image))
        if len(draft.steps) > left or left - len(draft.steps) == 1:
            continue
        images = tuple(
            NamedImage(_image_name(first_image, i), data) for i, data in enumerate(draft.images)
        )
        task = Task(
            f"synthetic-{seed}/{split}-{len(tasks):04d}-{family}",
            family,
            images,
            draft.request,
            draft.steps,
            draft.answer,
            draft.open_ended,
        )
        tasks.append(task)
        on_task(task)
        first_image += len(images)
        left -= len(draft.steps)
    return tasks


def _image_name(first: int, i: int) -> str:
    return f"image/image_{first + i}.jpg"


def _turns(rng: np.random.Generator) -> Iterator[str]:
    names = tuple(FAMILIES)
    while True:
        for i in rng.permutation(len(names)):
            yield names[i]
