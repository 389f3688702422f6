"""ArrayRecord shards of Examples with a manifest that proves they are whole.

    DIR/manifest.json           recipe, versions, and per split: files, counts, bytes, sha256
    DIR/README.md, samples/     the dataset card
    DIR/train-00000-of-00002.array_record, ...

Here: write Examples into shards, read and check what is on disk. How a whole dataset comes about is
in building.py.

Next: data_pipelines/building.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from data_pipelines.example import Example, encode_record
from data_pipelines.leakage import Identity, identify

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
# Uncompressed groups of one record: random access reads one Example (images are compressed already)
WRITER_OPTIONS = "group_size:1,uncompressed"


SHARD_EXAMPLES = 4096


def write_examples(
    building: Path, stem: str, examples: Iterable[Example], shard_examples: int = SHARD_EXAMPLES
) -> dict[str, Any]:
    """Write Examples as `stem-00000.array_record`, ...; returns a JSON-able report of them.

    Raises:
        ValueError: an example_id occurs twice.
    """
    shards: list[dict[str, Any]] = []
    identities: list[Identity] = []
    seen: set[str] = set()
    writer, path = None, building
    try:
        for example in examples:
            if example.example_id in seen:
                raise ValueError(f"example_id '{example.example_id}' occurs twice in '{stem}'")
            seen.add(example.example_id)
            identities.append(identify(example))
            if writer is None or shards[-1]["count"] == shard_examples:
                if writer is not None:
                    writer.close()
                path = building / f"{stem}-{len(shards):05d}.array_record"
                path.unlink(missing_ok=True)
                shards.append({"file": path.name, "count": 0})
                writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
            writer.write(encode_record(example))
            shards[-1]["count"] += 1
    finally:
        if writer is not None:
            writer.close()
    for shard in shards:
        path = building / shard["file"]
        shard |= {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {"shards": shards, "identities": identities}


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


def is_shard_whole(folder: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard's file is what its report says."""
    path = folder / shard["file"]
    return (
        path.is_file()
        and path.stat().st_size == shard["size_bytes"]
        and _sha256(path) == shard["sha256"]
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
