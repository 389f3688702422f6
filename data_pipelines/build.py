"""Build a dataset by name: the one table of datasets, used by the training run and by the command.

    python -m data_pipelines.build clevr_policy --depth 4 --policies 10 --out DIR
    python -m data_pipelines.build own --source FOLDER --out DIR
    python -m data_pipelines.build own --help

The command's options are the fields of the dataset's settings, with dashes for underscores, and
their help is the `Attributes:` section of its docstring.
A dataset is a frozen dataclass of settings, a function that makes its splits lazily, and the recipe
that the manifest keeps: equal recipes give equal shards.

Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_pipelines.building import write_dataset
from data_pipelines.clevr_policy import dataset as clevr_policy
from data_pipelines.example import Example
from data_pipelines.gta_policy import dataset as gta_policy
from data_pipelines.options import add_options, closest, summary, unknown_options
from data_pipelines.own_policy import dataset as own_policy
from data_pipelines.parts import OnProgress, Part, build_parts

WRONG, INTERRUPTED = 2, 130  # exit statuses; 130 = 128 + SIGINT, as shells have it
WORKERS_FROM = 2000  # examples; a worker needs about 5 s to import JAX and compile the renderer


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is made."""

    settings: type[Any]  # a frozen dataclass; wrong values raise ValueError
    make_splits: Callable[[Any, OnProgress], Mapping[str, Iterator[Example]]]
    recipe: Callable[[Any], dict[str, Any]]
    make_parts: Callable[[Any], Sequence[Part]] | None = None  # parallel and resumable, if given
    licence: Callable[[Any], str] = lambda settings: ""  # a sentence for the dataset card
    describe: Callable[[Any], Sequence[str]] = lambda settings: ()  # facts that the command prints


DATASETS: dict[str, Dataset] = {
    "clevr_policy": Dataset(
        clevr_policy.ClevrPolicySettings,
        clevr_policy.make_splits,
        clevr_policy.recipe,
        clevr_policy.make_parts,
        clevr_policy.licence,
        clevr_policy.describe,
    ),
    "gta_policy": Dataset(
        gta_policy.GTAPolicySettings,
        gta_policy.make_splits,
        gta_policy.recipe,
        licence=gta_policy.licence,
    ),
    "own": Dataset(own_policy.OwnPolicySettings, own_policy.make_splits, own_policy.recipe),
}


def make_settings(name: str, options: Mapping[str, Any]) -> Any:
    """The settings of a dataset from plain options.

    Raises:
        ValueError: no such dataset, an unknown option, or a value it refuses.
    """
    if name not in DATASETS:
        raise ValueError(
            f"unknown dataset '{name}'{closest(name, DATASETS)}; there are {sorted(DATASETS)}"
        )
    known = {field.name for field in dataclasses.fields(DATASETS[name].settings)}
    if unknown := sorted(set(options) - known):
        told = "; ".join(f"no option '{option}'{closest(option, known)}" for option in unknown)
        raise ValueError(f"dataset {name}: {told}; it has {sorted(known)}")
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


def make_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one dataset: one option a field of its settings."""
    settings = DATASETS[name].settings
    parser = argparse.ArgumentParser(
        prog=f"python -m data_pipelines.build {name}",
        usage="%(prog)s --out DIR [options]",
        description=summary(settings),
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new")
    if DATASETS[name].make_parts is not None:
        parser.add_argument(
            "--processes",
            type=int,
            default=None,
            metavar="N",
            help="worker processes; 0 = in this process, on its accelerator if it has one"
            " [default: as many as there are cores, 0 for a small dataset]",
        )
    add_options(parser, settings)
    return parser


def parse_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(dataset, options) of a command line; exits with 0 after --help, with 2 when it is wrong."""
    listed = "\n".join(f"  {name:14s} {summary(d.settings)}" for name, d in DATASETS.items())
    usage = (
        "usage: python -m data_pipelines.build DATASET --out DIR [options]\n\n"
        f"datasets:\n{listed}\n\n"
        "python -m data_pipelines.build DATASET --help lists the options of a dataset."
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else WRONG)
    name, *rest = arguments
    if name not in DATASETS:
        _fail(f"unknown dataset '{name}'{closest(name, DATASETS)}\n\n{usage}")
    parser = make_parser(name)
    if unknown := unknown_options(rest, parser._option_string_actions):
        _fail("\n".join(unknown) + f"\n{parser.prog} --help lists all options")
    return name, vars(parser.parse_args(rest))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, show a bar, and say what was written; expected errors are one readable message."""
    name, options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    folder, processes = options.pop("out"), options.pop("processes", None)
    started = time.monotonic()
    try:
        settings = make_settings(name, options)
        if processes is not None and processes < 0:
            raise ValueError(f"--processes must be 0 or more, got {processes}")
        with _make_bar() as bar:
            task = bar.add_task(name, total=None)
            manifest = build(
                name,
                settings,
                folder,
                lambda done, total: bar.update(task, completed=done, total=total),
                processes=processes,
            )
        facts = DATASETS[name].describe(settings)
    except KeyboardInterrupt:
        _fail(
            f"interrupted; nothing that looks whole was left. The same command goes on with the"
            f" finished pieces in {folder.parent / f'.{folder.name}.building'}"
            if DATASETS[name].make_parts is not None
            else "interrupted; nothing was left, start the same command again",
            status=INTERRUPTED,
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError"):
            raise  # not the user's doing: the traceback is what helps
        _fail(str(error))
    seconds = time.monotonic() - started
    for split, about in manifest["splits"].items():
        size = sum(shard["size_bytes"] for shard in about["shards"])
        print(f"{split:14s} {about['count']:7d} examples  {size / 2**20:9.1f} MiB")
    for fact in facts:
        print(fact)
    print(f"{folder}: built in {seconds:.0f} s; {folder / 'README.md'} says what is in it")


def _make_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )


def _fail(message: str, status: int = WRONG) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
