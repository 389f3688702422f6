"""Results of evaluations on disk: what they belong to, finished suites, half-done ones.

    DIR/main.json              a finished suite: identity, versions, summary, one record a question
    DIR/main.records.jsonl     a half-done one: the records so far, where the next start goes on
    DIR/results.json           all suites together, without the records

Next: trimpi_jax/stages/suites.py
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from data_pipelines.example import Example
from data_pipelines.shards import read_manifest
from trimpi_jax.io.agreement import is_first, of_first
from trimpi_jax.io.storage import list_files

PACKAGES = ("trimpi_jax", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "tokenizers")


def make_identity(config: ConfigDict, data: Path) -> dict[str, Any]:
    """What decides a result beside the model: digests of config and data, and the seed."""
    manifest = read_manifest(data)
    shards = {
        name: [shard["sha256"] for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    return {
        "config_sha256": digest(json.loads(config.to_json())),
        "dataset": manifest["recipe"].get("dataset", ""),
        "data_sha256": digest(shards),
        "seed": config.seed,
    }


def folder_digest(folder: Any) -> str:
    """sha256 of the files of a model folder or checkpoint: names and contents."""
    total = hashlib.sha256()
    for path in list_files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {content}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """What computed a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_json(path: Path, content: Any) -> None:
    """A JSON file, complete or absent."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


class RecordFile:
    """Records of half-done questions: a line with the key, then one line a record.

    Lines of another key, or after one that a kill cut short, are dropped.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.records: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> RecordFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(self._whole_lines())
        if not lines or lines[0] != {"key": self.key}:
            lines = [{"key": self.key}]
        self.records = {record["example_id"]: record for record in lines[1:]}
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file:
            self._file.close()

    def append(self, records: Any) -> None:
        """Keep more records, on disk at once."""
        for record in records:
            self.records[record["example_id"]] = record
            if self._file:
                self._file.write(json.dumps(record) + "\n")
        if self._file:
            self._file.flush()

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        if self.path.is_file():
            for text in self.path.read_text().splitlines():
                try:
                    yield json.loads(text)
                except json.JSONDecodeError:
                    return


@contextlib.contextmanager
def open_records(path: Path, key: str) -> Iterator[RecordFile]:
    """A RecordFile; of several processes the first one has the file, the others its records."""
    with contextlib.ExitStack() as stack:
        file = RecordFile(path, key)
        if is_first():
            stack.enter_context(file)
        file.records = of_first(lambda: file.records, "half-done records")
        yield file


def read_result(path: Path) -> dict[str, Any] | None:
    """A suite's file; None where there is none or it is no result."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "identity" in found else None


def question_digest(examples: Sequence[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        facts = [example.example_id, example.query, example.answer, example.policy_text]
        total.update(json.dumps(facts).encode())
        for image in (*example.images, *example.policy_images):
            total.update(hashlib.sha256(image).digest())
    return total.hexdigest()


def digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
