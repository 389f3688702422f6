"""Build a dataset by name: the one table of datasets, used by the training run and by the command.

    python -m data_pipelines.build clevr_policy --depth 4 --policies 10 --out DIR

A dataset is a frozen dataclass of settings, a function that makes its splits lazily, and the recipe
that the manifest keeps: equal recipes give equal shards.

Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.clevr_policy import dataset as clevr_policy
from data_pipelines.example import Example
from data_pipelines.own_policy import dataset as own_policy
from data_pipelines.shards import write_dataset

OnProgress = Callable[[int, int], None]  # (images done, images in all)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is made."""

    settings: type[Any]  # a frozen dataclass; wrong values raise ValueError
    make_splits: Callable[[Any, OnProgress], Mapping[str, Iterator[Example]]]
    recipe: Callable[[Any], dict[str, Any]]


DATASETS: dict[str, Dataset] = {
    "clevr_policy": Dataset(
        clevr_policy.ClevrPolicySettings, clevr_policy.make_splits, clevr_policy.recipe
    ),
    "own": Dataset(own_policy.OwnPolicySettings, own_policy.make_splits, own_policy.recipe),
}


def make_settings(name: str, options: Mapping[str, Any]) -> Any:
    """The settings of a dataset from plain options.

    Raises:
        ValueError: no such dataset, an unknown option, or a value it refuses.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}'; there are {sorted(DATASETS)}")
    known = {field.name for field in dataclasses.fields(DATASETS[name].settings)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"dataset {name} has no options {unknown}; it has {sorted(known)}")
    return DATASETS[name].settings(**options)


def build(
    name: str,
    settings: Any,
    folder: str | Path,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Write the shards of a dataset; returns the manifest. See `write_dataset` for the errors."""
    dataset = DATASETS[name]
    splits = dataset.make_splits(settings, on_progress)
    return write_dataset(folder, splits, dataset.recipe(settings))
