"""Build a dataset by name: the one table of datasets, used by the training run and by the command.

    python -m data_pipelines.build clevr_policy --depth 4 --policies 10 --out DIR

A dataset is a frozen dataclass of settings, a function that makes its splits lazily, and the recipe
that the manifest keeps: equal recipes give equal shards.

Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.building import write_dataset
from data_pipelines.clevr_policy import dataset as clevr_policy
from data_pipelines.example import Example
from data_pipelines.own_policy import dataset as own_policy
from data_pipelines.parts import OnProgress, Part, build_parts

WORKERS_FROM = 2000  # examples; a worker needs about 5 s to import JAX and compile the renderer


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is made."""

    settings: type[Any]  # a frozen dataclass; wrong values raise ValueError
    make_splits: Callable[[Any, OnProgress], Mapping[str, Iterator[Example]]]
    recipe: Callable[[Any], dict[str, Any]]
    make_parts: Callable[[Any], Sequence[Part]] | None = None  # parallel and resumable, if given
    licence: Callable[[Any], str] = lambda settings: ""  # a sentence for the dataset card


DATASETS: dict[str, Dataset] = {
    "clevr_policy": Dataset(
        clevr_policy.ClevrPolicySettings,
        clevr_policy.make_splits,
        clevr_policy.recipe,
        clevr_policy.make_parts,
        clevr_policy.licence,
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
    *,
    processes: int | None = None,
) -> dict[str, Any]:
    """Write the shards of a dataset; returns the manifest.

    Datasets with `make_parts` are made by `processes` workers (0 = in this process; None = as many
    as there are cores, or this process where a small set on a CPU does not repay their start), and
    a build that was killed goes on with its missing parts. See `write_dataset` for the errors.
    """
    dataset = DATASETS[name]
    recipe, licence = dataset.recipe(settings), dataset.licence(settings)
    if dataset.make_parts is None:
        splits = dataset.make_splits(settings, on_progress)
        return write_dataset(folder, splits, recipe, licence=licence)
    parts = dataset.make_parts(settings)
    if processes is None:
        small = sum(part.examples for part in parts) < WORKERS_FROM
        in_here = small and jax.default_backend() == "cpu"
        processes = 0 if in_here else len(os.sched_getaffinity(0))
    return build_parts(
        folder,
        parts,
        recipe,
        processes=processes,
        on_progress=on_progress,
        licence=licence,
    )
