"""The folder of a run: whose it is, the data in it, the lines that are added to its files.

Next: trimpi_jax/stages/run_settings.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines.build import DATASETS, build, make_settings
from data_pipelines.shards import check_dataset
from trimpi_jax.io.progress import Progress


def claim_workdir(config: ConfigDict, workdir: Path) -> None:
    """Make the folder this config's, or check that it is.

    Raises:
        ValueError: it belongs to another config (every difference is listed), or it holds
            something that is no run.
        OSError: it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"workdir {workdir} is not writable ({error}); choose another") from error
    path = workdir / "config.json"
    current = json.loads(config.to_json())
    if path.is_file():
        saved = json.loads(path.read_text())
        differences = list_differences(saved, current)
        if differences:
            raise ValueError(
                f"workdir {workdir} belongs to another config; choose another folder or delete it."
                f" Differences (saved -> now):\n  " + "\n  ".join(differences)
            )
        return
    # a start on several hosts that was killed may have left its marker (io/hosts.py)
    if any(not path.name.startswith((".start-", ".probe-", ".lock")) for path in workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and has no config.json: not a run")
    scratch = workdir / "config.json.part"
    scratch.write_text(json.dumps(current, indent=1, sort_keys=True))
    os.replace(scratch, path)


def list_differences(saved: Any, current: Any, path: str = "config") -> list[str]:
    """`path: old -> new` for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(current, dict):
        return [
            line
            for key in sorted(saved.keys() | current.keys())
            for line in list_differences(
                saved.get(key, "(absent)"), current.get(key, "(absent)"), f"{path}.{key}"
            )
        ]
    return [] if saved == current else [f"{path}: {saved!r} -> {current!r}"]


def prepare_data(config: ConfigDict, folder: Path, progress: Progress) -> None:
    """Build the dataset, or check and reuse it; its chains of thought may be those of make_cot.

    Raises:
        ValueError: broken shards, or shards of another recipe.
    """
    if config.get("data_dir") and not folder.exists():
        given = Path(config.data_dir).expanduser().resolve()
        check_dataset(given)
        folder.symlink_to(given)
    options = config.data.to_dict()
    dataset = options.pop("dataset")
    settings = make_settings(dataset, options)
    wanted = json.loads(json.dumps(DATASETS[dataset].recipe(settings)))
    if folder.exists() and any(folder.iterdir()):
        found = check_dataset(folder)["recipe"]
        thoughts = found.pop("cot", None)
        if found != wanted:
            lines = list_differences(found, wanted, "recipe")
            raise ValueError(f"{folder} was built otherwise:\n  " + "\n  ".join(lines))
        progress.say(f"data: {folder} is whole, reused")
        if thoughts:
            progress.say(
                f"data: chains of thought by {thoughts['model']}, {thoughts['mode']},"
                f" {thoughts['accepted']}/{thoughts['asked']} accepted"
            )
        return
    with progress.task("data", None) as bar:
        manifest = build(dataset, settings, folder, lambda done, total: bar(done, {}, total=total))
    counts = {name: split["count"] for name, split in manifest["splits"].items()}
    progress.say(f"data: {counts} examples in {folder}")


def append_records(path: Path, number: int, records: list[dict[str, Any]]) -> None:
    """Append what a step is remembered by, one JSON object a line; the first process does."""
    if jax.process_index():
        return
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps({"step": number} | record) + "\n")
