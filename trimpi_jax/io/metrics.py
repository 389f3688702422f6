"""Metrics: one JSON object a line, names `area/what_unit`.

Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def append_metrics(path: Path, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Add one line to a JSONL file; returns what was written (arrays become floats).

    A last line that a kill cut short is closed first, so it cannot swallow the new one. Of several
    processes the first one writes.
    """
    line = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
    if jax.process_index():
        return line
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
    return line


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, by step; of a step logged twice (before and after a resume) the later one.

    A last line that a kill cut short is ignored.
    """
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | list | dict) or value is None:
        return value
    number = float(np.asarray(value))
    return number if math.isfinite(number) else str(number)
