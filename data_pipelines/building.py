"""A dataset comes about whole or not at all: a hidden folder, a lock, checks, one rename.

    open_building   the hidden sibling folder `.DIR.building`, locked
    seal_dataset    leakage check, final names, manifest, card, rename
    write_dataset   both, for Examples made one after the other in this process

A killed build leaves nothing that looks whole.

Next: data_pipelines/parts.py
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from data_pipelines.dataset_card import SAMPLE_EXAMPLES, write_card
from data_pipelines.example import Example, decode_record
from data_pipelines.leakage import Identity, check_leakage
from data_pipelines.shards import MANIFEST, MANIFEST_VERSION, SHARD_EXAMPLES, write_examples

PACKAGES = ("jax", "jaxlib", "numpy", "pillow", "msgpack", "array_record")  # they make the bytes


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, Iterable[Example]],
    recipe: Mapping[str, Any],
    *,
    shard_examples: int = SHARD_EXAMPLES,
    licence: str = "",
) -> dict[str, Any]:
    """Write all splits and the manifest in this process; returns the manifest.

    Args:
        folder: created; must not hold a dataset already.
        splits: split name -> its Examples, consumed once in order.
        recipe: JSON-able settings that made the data; equal recipes make equal shards.
        shard_examples: Examples a file.
        licence: a sentence for the dataset card.

    Raises:
        ValueError: the folder exists and is not empty, another build of it is running, ids occur
            twice, or `leakage.check_leakage` found something. Nothing is left behind.
    """
    with open_building(folder) as building:
        try:
            clear_building(building)
            reports = [
                {split: write_examples(building, split, examples, shard_examples)}
                for split, examples in splits.items()
            ]
            return seal_dataset(building, Path(folder), reports, recipe, licence=licence)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


@contextlib.contextmanager
def open_building(folder: str | Path) -> Iterator[Path]:
    """The locked hidden folder in which `folder` is built; it may hold parts of a killed build.

    Raises:
        ValueError: `folder` exists and is not empty, or another process is building it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; delete it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.building"
    building.mkdir(exist_ok=True)
    lock = os.open(building, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{folder} is being built by another process (it holds {building}); wait for it"
            ) from error
        yield building
    finally:
        os.close(lock)


def clear_building(building: Path) -> None:
    """Remove whatever an earlier build left in its hidden folder."""
    for path in building.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def seal_dataset(
    building: Path,
    folder: Path,
    reports: Iterable[Mapping[str, Mapping[str, Any]]],
    recipe: Mapping[str, Any],
    *,
    built_with: Mapping[str, str] | None = None,
    licence: str = "",
) -> dict[str, Any]:
    """Check what was written, give it its manifest, card and final name; returns the manifest.

    Args:
        building: the hidden folder.
        folder: what it becomes.
        reports: split -> report of `write_examples`, piece after piece; the pieces of a split
            follow each other in this order.
        recipe, licence: see `write_dataset`.
        built_with: versions; those of this process when None.

    Raises:
        ValueError: see `leakage.check_leakage`.
    """
    shards: dict[str, list[dict[str, Any]]] = {}
    identities: dict[str, list[Identity]] = {}
    for report in reports:
        for split, piece in report.items():
            shards.setdefault(split, []).extend(dict(shard) for shard in piece["shards"])
            rows = [Identity(*row) for row in piece["identities"]]
            identities.setdefault(split, []).extend(rows)
    leakage = check_leakage(identities)
    for split, parts in shards.items():
        for i, shard in enumerate(parts):
            final = f"{split}-{i:05d}-of-{len(parts):05d}.array_record"
            (building / shard["file"]).rename(building / final)
            shard["file"] = final
    manifest = {
        "version": MANIFEST_VERSION,
        "recipe": dict(recipe),
        "built_with": dict(built_with or versions()),
        "leakage": leakage,
        "splits": {
            split: {"count": len(identities[split]), "shards": parts}
            for split, parts in shards.items()
        },
    }
    wanted = {shard["file"] for parts in shards.values() for shard in parts}
    for path in building.iterdir():
        if path.is_file() and path.name not in wanted:
            path.unlink()
    write_card(building, manifest, identities, _first_examples(building, shards), licence)
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in building.iterdir():  # a crash of the machine must not leave a whole-looking folder
        _sync(path)
    if folder.exists():
        folder.rmdir()
    os.replace(building, folder)
    _sync(folder.parent)
    return manifest


def versions() -> dict[str, str]:
    """What the bytes of a dataset depend on, beside its recipe."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _first_examples(building: Path, shards: Mapping[str, list[dict[str, Any]]]) -> list[Example]:
    files = [str(building / shard["file"]) for parts in shards.values() for shard in parts]
    if not files:
        return []
    reader = array_record_module.ArrayRecordReader(files[0])
    try:
        records = reader.read(0, min(SAMPLE_EXAMPLES, reader.num_records()))
    finally:
        reader.close()
    return [decode_record(record) for record in records]


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
