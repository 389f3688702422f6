"""Build a dataset by name: the one table of datasets, used by the training run and by the command.

    python -m data_pipelines.build clevr_policy --depth 4 --policies 10 --out DIR
    python -m data_pipelines.build own --source FOLDER --out DIR
    python -m data_pipelines.build own --help

The command's options are the fields of the dataset's settings, with dashes for underscores.
A dataset is a frozen dataclass of settings, a function that makes its splits lazily, and the recipe
that the manifest keeps: equal recipes give equal shards.

Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        if processes:
            raise ValueError(f"processes has no effect: {name} is made in one process")
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


def make_parser() -> argparse.ArgumentParser:
    """The command's parser: one subcommand a dataset, one option a field of its settings."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build",
        description="Build a dataset into a folder of shards.",
    )
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    for name, dataset in DATASETS.items():
        command = datasets.add_parser(
            name, help=f"see --help of {name}", description=dataset.settings.__doc__
        )
        command.add_argument("--out", type=Path, required=True, help="folder to write")
        command.add_argument(
            "--processes",
            type=int,
            default=None,
            help="worker processes, 0 = none (where the dataset can be made in parts)",
        )
        types = typing.get_type_hints(dataset.settings)
        for field in dataclasses.fields(dataset.settings):
            _add_option(command, field, types[field.name])
    return parser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    shared: dict[str, Any] = {"default": field.default, "help": f"default {field.default!r}"}
    if field.default is dataclasses.MISSING:
        shared = {"required": True, "help": "required"}
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
    elif typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        parser.add_argument(
            flag, type=lambda text: tuple(inner(part) for part in text.split(",") if part), **shared
        )
    else:
        parser.add_argument(flag, type=kind if kind in (int, float) else str, **shared)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, show a bar, and say what was written; expected errors are one readable message."""
    options = vars(make_parser().parse_args(arguments))
    name, folder = options.pop("dataset"), options.pop("out")
    processes = options.pop("processes")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        settings = make_settings(name, options)
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=None)
            manifest = build(
                name,
                settings,
                folder,
                lambda done, total: bar.update(task, completed=done, total=total),
                processes=processes,
            )
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing that looks whole was left, start the same command again")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    counts = ", ".join(f"{split} {facts['count']}" for split, facts in manifest["splits"].items())
    print(f"{folder}: {counts} examples; {folder / 'README.md'} says what is in it")


if __name__ == "__main__":
    main()
