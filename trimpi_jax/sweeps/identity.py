"""What a result belongs to: digests of code, config and base model; and of every stage.

A stage's key is the digest of all that decides what it leaves: the stages before it, its own
section, the settings that all stages share, the code, the package versions and the base model.
Runs with an equal key train that stage once. A run's key is that of all its stages and its whole
config. The data enter by their recipe; the shards' own digest is kept beside the stage and compared
when it is used again.

Next: trimpi_jax/sweeps/child.py
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import trimpi_jax
from trimpi_jax.stages.model_files import model_folder
from trimpi_jax.stages.result_files import digest, folder_digest, versions

BASE = "base"
# what only shows results: a change there leaves them as they are
PAGES = ("curves", "gallery", "paper_figures", "progress", "report", "results", "sweep_page")
ONLY_SHOWS = (*(f"trimpi_jax/io/{name}.py" for name in PAGES),)
ONLY_STARTS = ("trimpi_jax/sweeps/", "trimpi_jax/sweep.py", "trimpi_jax/report.py")
NAMES = ("name", "method", "stages")  # of a config: names, not settings


@dataclasses.dataclass(frozen=True)
class Code:
    """What computes a result."""

    sha256: str
    versions: dict[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        return {"code_sha256": self.sha256, "versions": self.versions}


@functools.cache
def current_code() -> Code:
    """The code beside this file, and the packages that it uses."""
    root = Path(trimpi_jax.__file__).parent.parent
    found = {name: text for name, text in versions().items() if name != "platform"}
    return Code(code_digest(root), found)


def code_digest(root: Path) -> str:
    """sha256 of every Python file of trimpi_jax and data_pipelines that can change a result."""
    total = hashlib.sha256()
    for folder in ("data_pipelines", "trimpi_jax"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name not in ONLY_SHOWS and not name.startswith(ONLY_STARTS):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                total.update(f"{name} {content}\n".encode())
    return total.hexdigest()


@functools.cache
def _folder_digest(folder: Path) -> str:
    return folder_digest(folder)


def base_digest(config: ConfigDict) -> str:
    """sha256 of the base model's files.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = model_folder(config.model_dir)
    if not config.model_dir or not folder.is_dir():
        raise FileNotFoundError(f"model_dir '{config.model_dir}' is not a folder")
    return _folder_digest(folder.resolve())


def run_key(config: ConfigDict, code: Code) -> str:
    """What a run's result belongs to."""
    return digest([_plain(config), code.facts, base_digest(config)])


def data_key(config: ConfigDict, code: Code) -> str:
    """What a run's dataset belongs to."""
    return digest([_plain(config.data), config.get("data_dir", ""), code.facts])


def stage_folders(config: ConfigDict, code: Code) -> dict[str, str]:
    """Folder name in a run -> key, in order: `0_base`, `1_vm_cpt`, ...; see the module docstring.

    `0_base` is the evaluation of the base model.
    """
    plain = _plain(config)
    stages = list(config.stages)
    shared = {key: plain[key] for key in plain if key not in (*NAMES, *stages)}
    # answers of a model that was never taught to think need no thoughts
    facts: Any = [shared, "direct_sft" in stages, code.facts, base_digest(config)]
    keys = {}
    for number, stage in enumerate((BASE, *stages)):
        facts = digest([facts, stage, plain.get(stage)])
        keys[f"{number}_{stage}"] = facts
    return keys


def short(key: str) -> str:
    """Enough of a digest to tell folders apart."""
    return key[:10]


def _plain(config: ConfigDict) -> Any:
    return json.loads(config.to_json())
