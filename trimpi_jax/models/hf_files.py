"""The safetensors files of a checkpoint: find tensors, read parts of them, write them one by one.

Nothing here holds more than a block of a tensor: a reader asks for the part that its devices need,
a writer hands over one tensor at a time. A file is opened anew for each block, so the pages that
the system maps for it are given back at once. Pickled weights are never opened.

Source: the safetensors format, https://huggingface.co/docs/safetensors (8 bytes of header length,
a JSON header of dtype, shape and data_offsets, then the data).
Next: trimpi_jax/models/hf_checks.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from trimpi_jax.models.hf_names import Index, TensorSpec, flat_runs, short_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BLOCK_BYTES = 64 * 2**20  # read at a time
STORED_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPE_OF_FORMAT = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Located(NamedTuple):
    """Where a tensor is."""

    file: Path
    stored: str  # the name inside the file
    shape: tuple[int, ...]
    format: str  # safetensors' dtype name, e.g. "BF16"


class ToWrite(NamedTuple):
    """A tensor that is computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


def find_tensors(directory: Path) -> dict[str, Located]:
    """Hub name -> where it is, for all tensors of a directory; reads headers only.

    Raises:
      FileNotFoundError: no safetensors file.
      ValueError: a file that is damaged or cut short; an index that is no index, leaves the folder,
        names files that are not there, or tensors that are not in their file.
    """
    weight_map = _read_index(directory / INDEX_FILE)
    if weight_map is not None:
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"No *.safetensors in {directory}. Pickled weights (*.bin, *.pt) are never opened; "
            "convert them with transformers' save_pretrained(safe_serialization=True)."
        )
    found: dict[str, Located] = {}
    problems = []
    for file in files:
        with open_file(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                part = tensors.get_slice(stored)
                here = Located(file, stored, tuple(part.get_shape()), part.get_dtype())
                name = short_name(stored)
                if name in found:
                    other = found[name]
                    problems.append(
                        f"{stored} in {file.name} is also {other.stored} in {other.file.name}"
                    )
                found[name] = here
    for stored, file in (weight_map or {}).items():
        here = found.get(short_name(stored))
        if here is None or here.file.name != file:
            problems.append(f"{INDEX_FILE} says {stored} is in {file}, but it is not")
    if problems:
        raise ValueError(f"{directory} is inconsistent:\n  " + "\n  ".join(problems))
    return found


def read_block(located: Located, spec: TensorSpec, index: Index) -> np.ndarray:
    """Part of a tensor, in the dtype of the file: only the bytes of that part are asked for.

    Args:
      located: where the tensor is.
      spec: what it is.
      index: a slice per axis of `spec.unfolded`.

    Returns:
      The block, its axes those of `spec.unfolded`.
    """
    outputs = len(spec.ours) - spec.inputs
    sizes = spec.unfolded
    if len(spec.shape) == 1:
        row_runs, column_runs = flat_runs(index, sizes), [(0, 1)]
    else:
        rows = outputs if spec.inputs else 1
        row_runs = flat_runs(index[:rows], sizes[:rows])
        column_runs = flat_runs(index[rows:], sizes[rows:])
    columns = sum(stop - start for start, stop in column_runs)
    dtype = STORED_DTYPES[DTYPE_OF_FORMAT[located.format]]
    out = np.empty((sum(stop - start for start, stop in row_runs), columns), dtype)
    whole = column_runs == [(0, math.prod(spec.shape[1:]))]
    step = max(1, BLOCK_BYTES // max(columns * dtype.itemsize, 1))
    at = 0
    for first, last in row_runs:
        for start in range(first, last, step):
            stop = min(start + step, last)
            target = out[at : at + stop - start]
            at += stop - start
            with open_file(located.file) as tensors:
                part = tensors.get_slice(located.stored)
                if whole or len(spec.shape) != 2:
                    rows_read = part[start:stop].reshape(stop - start, -1)
                    left = 0
                    for begin, end in column_runs:
                        target[:, left : left + end - begin] = rows_read[:, begin:end]
                        left += end - begin
                else:
                    left = 0
                    for begin, end in column_runs:
                        target[:, left : left + end - begin] = part[start:stop, begin:end]
                        left += end - begin
    shape = [len(range(*part.indices(size))) for part, size in zip(index, sizes, strict=True)]
    return out.reshape(shape)


def open_file(file: Path) -> Any:
    """A safetensors file, its header checked against its length.

    Raises:
      ValueError: damaged or cut short.
    """
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or cut short ({file.stat().st_size} bytes): {error}. "
            "Fetch the file again."
        ) from error


def write_file(file: Path, tensors: Sequence[ToWrite], dtype: str) -> int:
    """Writes a safetensors file tensor by tensor; returns the bytes of data.

    Only one value exists at a time. Values must be of the given dtype; they are laid out row-major
    before they are written (a transposed view written as it lies would be scrambled).
    """
    stored = STORED_DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * stored.itemsize
        header[tensor.name] = {
            "dtype": FORMAT_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = tensor.value()
            if value.shape != tensor.shape or value.dtype != stored:
                raise ValueError(
                    f"{tensor.name} is {value.dtype} {value.shape}, promised {dtype} {tensor.shape}"
                )
            out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return end


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a checkpoint of several files."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _read_index(index: Path) -> dict[str, str] | None:
    if not index.is_file():
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        strange = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of a checkpoint ({error!r}).") from error
    if strange:
        raise ValueError(f"{index} names files outside its folder: {strange}. They are not read.")
    pickled = [name for name in names if not name.endswith(".safetensors")]
    if pickled:
        raise ValueError(f"{index} names files that are no safetensors, never opened: {pickled}.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index} names files that are not there: {absent}. Fetch them.")
    return weight_map
