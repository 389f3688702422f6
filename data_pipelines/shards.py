"""ArrayRecord shards of Examples with a manifest that proves they are whole.

    DIR/manifest.json           recipe, versions, and per split: files, counts, bytes, sha256
    DIR/train-00000-of-00002.array_record, ...

A dataset is built in a hidden sibling folder and renamed when it is complete, so a killed build
leaves nothing that looks whole.

Next: data_pipelines/streaming.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from data_pipelines.example import Example, encode_record

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
# Uncompressed groups of one record: random access reads one Example (images are compressed already)
WRITER_OPTIONS = "group_size:1,uncompressed"


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, Iterable[Example]],
    recipe: Mapping[str, Any],
    *,
    shard_examples: int = 4096,
) -> dict[str, Any]:
    """Write all splits and the manifest; returns the manifest.

    Args:
        folder: created; must not hold a dataset already.
        splits: split name -> its Examples, consumed once in order.
        recipe: JSON-able settings that made the data; compared by `is_whole`.
        shard_examples: Examples a file.

    Raises:
        ValueError: the folder exists and is not empty, or an example_id occurs twice in a split.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; delete it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        manifest = {
            "version": MANIFEST_VERSION,
            "recipe": dict(recipe),
            "splits": {
                split: _write_split(building, split, examples, shard_examples)
                for split, examples in splits.items()
            },
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        if folder.exists():
            folder.rmdir()
        os.replace(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset.

    Raises:
        ValueError: there is none, it is no JSON, or it is of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: not a dataset, or its build was interrupted")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete {folder} and rebuild") from error
    if manifest.get("version") != MANIFEST_VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')}, this code reads {MANIFEST_VERSION};"
            f" delete {folder} and rebuild"
        )
    return manifest


def check_dataset(folder: str | Path) -> dict[str, Any]:
    """Verify every shard against the manifest; returns the manifest.

    Raises:
        ValueError: listing every missing, truncated or altered shard.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = []
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif path.stat().st_size != shard["size_bytes"]:
                problems.append(
                    f"{path} has {path.stat().st_size} bytes, the manifest says"
                    f" {shard['size_bytes']}: truncated or replaced"
                )
            elif _sha256(path) != shard["sha256"]:
                problems.append(f"{path} does not match its sha256: its content was altered")
    if problems:
        raise ValueError(
            "broken dataset:\n  " + "\n  ".join(problems) + f"\nDelete {folder} and rebuild it."
        )
    return manifest


def split_files(folder: str | Path, split: str) -> list[str]:
    """Paths of the shards of a split, in order.

    Raises:
        ValueError: the dataset has no such split.
    """
    splits = read_manifest(folder)["splits"]
    if split not in splits:
        raise ValueError(f"{folder} has no split '{split}'; it has {sorted(splits)}")
    return [str(Path(folder) / shard["file"]) for shard in splits[split]["shards"]]


def split_count(folder: str | Path, split: str) -> int:
    """Number of Examples in a split."""
    return read_manifest(folder)["splits"][split]["count"]


def _write_split(
    folder: Path, split: str, examples: Iterable[Example], shard_examples: int
) -> dict[str, Any]:
    files: list[Path] = []
    counts: list[int] = []
    seen: set[str] = set()
    writer = None
    try:
        for example in examples:
            if example.example_id in seen:
                raise ValueError(f"example_id '{example.example_id}' occurs twice in '{split}'")
            seen.add(example.example_id)
            if writer is None or counts[-1] == shard_examples:
                if writer is not None:
                    writer.close()
                files.append(folder / f"{split}-{len(files):05d}.array_record")
                counts.append(0)
                writer = array_record_module.ArrayRecordWriter(str(files[-1]), WRITER_OPTIONS)
            writer.write(encode_record(example))
            counts[-1] += 1
    finally:
        if writer is not None:
            writer.close()
    shards = []
    for i, (path, count) in enumerate(zip(files, counts, strict=True)):
        final = folder / f"{split}-{i:05d}-of-{len(files):05d}.array_record"
        path.rename(final)
        shards.append(
            {
                "file": final.name,
                "count": count,
                "size_bytes": final.stat().st_size,
                "sha256": _sha256(final),
            }
        )
    return {"count": sum(counts), "shards": shards}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
