"""Folders that may lie in an object store: a local path, or gs:// through etils and gcsfs.

    probe     writes a small file, reads it back and deletes it, before anything is trained
    space     free bytes where the store can say (a disk), None where it cannot (a bucket)

The libraries for a store come with an extra (`pip install 'trimpi_jax[gcs]'`); the login is the
store's own (for Google: application default credentials, or the service account of the VM).

Source: etils.epath, fsspec.
Next: trimpi_jax/io/workdir_lock.py
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

# scheme -> what reads it: module of fsspec's implementation, extra of this package
STORES = {"gs": ("gcsfs", "gcs")}
CLAIM = ".claim"
GIB = 2**30


def open_folder(text: str | os.PathLike) -> epath.Path:
    """The folder that a text means; local ones are made absolute.

    Raises:
        ValueError: a scheme that nothing here reads, or whose library is not installed.
    """
    text = os.fspath(text)
    scheme, mark, _ = text.partition("://")
    if not mark:
        return epath.Path(Path(text).expanduser().resolve())
    if scheme not in STORES:
        raise ValueError(f"'{text}': a folder is a path, or one of {[f'{s}://' for s in STORES]}")
    module, extra = STORES[scheme]
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"'{text}' needs {module}: pip install 'trimpi_jax[{extra}]'") from None
    return epath.Path(text)


def list_files(folder: Any) -> list[Any]:
    """All files below a folder (a pathlib or etils path), sorted."""
    found = []
    for path in folder.iterdir():
        found += list_files(path) if path.is_dir() else [path]
    return sorted(found)


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether a folder is in an object store."""
    return "://" in os.fspath(folder)


def probe_problem(folder: str | os.PathLike) -> str:
    """ "" when a file can be written to a folder, read back and deleted, or why not.

    The folder is made. Anything that a store raises counts: no login, no bucket, no network.
    """
    text = secrets.token_hex(16)
    try:
        place = open_folder(folder)
        probe = place / f".probe-{text[:12]}"
        place.mkdir(parents=True, exist_ok=True)
        probe.write_text(text)
        found = probe.read_text()
        probe.unlink()
    except Exception as error:
        return f"{os.fspath(folder)} is not writable ({_first_line(error)})"
    if found != text:
        return f"{os.fspath(folder)} gives back something else than was written to it"
    return ""


def free_bytes(folder: str | os.PathLike) -> int | None:
    """Free space of the disk below a folder that exists; None for an object store."""
    if is_remote(folder):
        return None
    return shutil.disk_usage(os.fspath(folder)).free


def space_problem(folder: str | os.PathLike, parts: Mapping[str, float]) -> str:
    """ "" when a folder's disk has room for all parts together, or what is missing.

    Args:
        folder: exists.
        parts: what will be written there -> bytes.
    """
    free, wanted = free_bytes(folder), sum(parts.values())
    if free is None or wanted <= free:
        return ""
    listed = ", ".join(f"{what} {count / GIB:.2f}" for what, count in parts.items() if count)
    return (
        f"{os.fspath(folder)} has {free / GIB:.2f} GiB free, but the run will write"
        f" {wanted / GIB:.2f} GiB there (GiB: {listed})"
    )


def claim_folder(folder: str | os.PathLike, owner: str) -> tuple[str, dict[str, Any] | None]:
    """Marks a folder of checkpoints as ours, where no lock is to be had.

    The last who claims it has it; whoever had it before finds out at its next save
    (`claim_problem`) and stops. So a machine that was taken for dead cannot write on.

    Args:
        folder: exists.
        owner: what the folder belongs to, e.g. the digest of a config.

    Returns:
        (token of this claim, the claim that was there or None)

    Raises:
        ValueError: it belongs to another owner.
    """
    path = open_folder(folder) / CLAIM
    before = read_claim(folder)
    if before is not None and before.get("owner") != owner:
        raise ValueError(
            f"{os.fspath(folder)} belongs to another run (started {before.get('started')} on"
            f" {before.get('host')}, with another config); choose another --config.checkpoint_dir,"
            " or delete that folder"
        )
    token = secrets.token_hex(8)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    claim = {"owner": owner, "token": token, "host": socket.gethostname(), "pid": os.getpid()}
    path.write_text(json.dumps(claim | {"started": started}))
    return token, before


def read_claim(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The claim of a folder, or None."""
    path = open_folder(folder) / CLAIM
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None  # cut short by a kill
    return found if isinstance(found, dict) else None


def claim_problem(folder: str | os.PathLike, token: str) -> str:
    """ "" while a claim still stands, or who has taken the folder."""
    found = read_claim(folder)
    if found is None or found.get("token") == token:
        return ""
    return (
        f"{os.fspath(folder)} was taken over by another start of this run (process"
        f" {found.get('pid')} on {found.get('host')}, since {found.get('started')}); this one stops"
        " and has written nothing since"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
