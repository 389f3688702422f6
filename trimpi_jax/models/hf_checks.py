"""What a checkpoint folder says it is, compared with what it holds, before any weight is read.

In: config.json and the headers of the safetensors files. Out: the config and where each tensor is,
or one error with everything that does not fit.

Next: trimpi_jax/models/hf_weights.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_files import DTYPE_OF_FORMAT, Located, find_tensors, read_block
from trimpi_jax.models.hf_names import TensorSpec, fold_names, tensor_specs


def read_config(directory: str | Path) -> VLMConfig:
    """The config.json of a checkpoint directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"No config.json in {directory}: not a Hugging Face model folder.")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no JSON object.")
    try:
        return VLMConfig.from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_weights(directory: str | Path, config: VLMConfig) -> dict[str, Located]:
    """Where every tensor is, after comparing all headers with the config; reads no weight.

    Raises:
      FileNotFoundError: no safetensors file.
      ValueError: a damaged file or index; or tensors that are missing, unknown, of another shape or
        of a type that holds no weights, all listed.
    """
    found = find_tensors(Path(directory))
    _compare(tensor_specs(config), found, config)
    _check_stored_head(found, config)
    return found


def stored_dtype(directory: str | Path) -> str:
    """In what most numbers of a checkpoint are stored: "bfloat16", "float16" or "float32"."""
    sizes: dict[str, int] = {}
    for located in find_tensors(Path(directory)).values():
        sizes[located.format] = sizes.get(located.format, 0) + math.prod(located.shape)
    return DTYPE_OF_FORMAT[max(sizes, key=lambda name: sizes[name])]


def _compare(specs: list[TensorSpec], found: Mapping[str, Located], config: VLMConfig) -> None:
    wanted = {spec.name: spec for spec in specs}
    missing = {name: spec.shape for name, spec in wanted.items() if name not in found}
    problems = [f"missing: {line} {list(missing[first])}" for line, first in fold_names(missing)]
    for name, there in found.items():
        if name not in wanted:
            if name == "lm_head.weight" and config.text.tied:
                head = (config.text.vocab_size, config.text.width)
                if there.shape == head and there.format in DTYPE_OF_FORMAT:
                    continue  # some exports store the tied head again; see _check_stored_head
            problems.append(f"unknown: {there.stored} {list(there.shape)} in {there.file.name}")
        elif there.shape != wanted[name].shape:
            problems.append(
                f"shape: {there.stored} is {list(there.shape)} in {there.file.name}, the config "
                f"says {list(wanted[name].shape)}"
            )
        elif there.format not in DTYPE_OF_FORMAT:
            problems.append(
                f"type: {there.stored} in {there.file.name} is stored as {there.format}; only "
                f"{sorted(DTYPE_OF_FORMAT)} are read (quantized checkpoints are not)"
            )
    if not problems:
        return
    folder = next(iter(found.values())).file.parent if found else ""
    hint = ""
    if not any(name.startswith("visual.") for name in found):
        hint = " No tensor of a vision tower is there: a text-only checkpoint?"
    raise ValueError(
        f"{folder}: {len(missing) + sum(not line.startswith('missing') for line in problems)} "
        f"tensors do not fit config.json.{hint}\n  " + "\n  ".join(problems)
    )


def _check_stored_head(found: Mapping[str, Located], config: VLMConfig) -> None:
    """A tied head that is stored again must be the embedding; a few rows tell."""
    head, table = found.get("lm_head.weight"), found["model.embed_tokens.weight"]
    if not config.text.tied or head is None:
        return
    spec = next(s for s in tensor_specs(config) if s.name == "model.embed_tokens.weight")
    last = config.text.vocab_size - 1
    for row in {round(last * i / 15) for i in range(16)}:
        index = (slice(row, row + 1), slice(config.text.width))
        one, other = (read_block(where, spec, index) for where in (head, table))
        if not np.array_equal(one.astype(np.float32), other.astype(np.float32)):
            raise ValueError(
                f"config.json says that the head is tied to the embedding, but row {row} of "
                f"{head.stored} in {head.file} is not that of {table.stored}. Set "
                '"tie_word_embeddings": false at the top level and in text_config if the head is '
                "one of its own."
            )
