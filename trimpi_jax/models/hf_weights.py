"""Weights in and out of Hugging Face directories: config.json and *.safetensors, nothing else.

One rule covers every tensor. A torch matrix is [outputs, inputs] with heads flattened; ours is
[*inputs, *outputs]:

    kernel   reshape(w, (outputs, inputs)).T, then reshape to our shape     (Conv3d and head too)
    others   reshape to our shape                                           (bias, scale, embedding)

so both directions are one transpose, and a round trip is bitwise exact. Names are those of the hub
(`model.layers...`, `visual...`); the longer ones that transformers uses in memory since 4.52
(`model.language_model...`, `model.visual...`) are read too. Pickled weights are never opened.

Source: https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, model.safetensors.index.json.
Next: trimpi_jax/models/processor.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.layers import Params
from trimpi_jax.models.lora import is_lora_leaf
from trimpi_jax.models.vlm import param_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30  # the hub's habit: shards of about 5 GB
STORED_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# our module -> hub module; {i} is the layer
MODULES = {
    "vision/patch_embed": "visual.patch_embed.proj",
    "vision/blocks/norm1": "visual.blocks.{i}.norm1",
    "vision/blocks/norm2": "visual.blocks.{i}.norm2",
    "vision/blocks/qkv": "visual.blocks.{i}.attn.qkv",
    "vision/blocks/proj": "visual.blocks.{i}.attn.proj",
    "vision/blocks/gate": "visual.blocks.{i}.mlp.gate_proj",
    "vision/blocks/up": "visual.blocks.{i}.mlp.up_proj",
    "vision/blocks/down": "visual.blocks.{i}.mlp.down_proj",
    "vision/merger/norm": "visual.merger.ln_q",
    "vision/merger/fc1": "visual.merger.mlp.0",
    "vision/merger/fc2": "visual.merger.mlp.2",
    "language/embed": "model.embed_tokens",
    "language/layers/input_norm": "model.layers.{i}.input_layernorm",
    "language/layers/post_norm": "model.layers.{i}.post_attention_layernorm",
    "language/layers/q": "model.layers.{i}.self_attn.q_proj",
    "language/layers/k": "model.layers.{i}.self_attn.k_proj",
    "language/layers/v": "model.layers.{i}.self_attn.v_proj",
    "language/layers/o": "model.layers.{i}.self_attn.o_proj",
    "language/layers/gate": "model.layers.{i}.mlp.gate_proj",
    "language/layers/up": "model.layers.{i}.mlp.up_proj",
    "language/layers/down": "model.layers.{i}.mlp.down_proj",
    "language/final_norm": "model.norm",
    "language/head": "lm_head",
}


class TensorSpec(NamedTuple):
    """One tensor on disk, and where it lives in our tree."""

    name: str  # hub name
    shape: tuple[int, ...]  # on disk
    path: tuple[str, ...]  # in our tree
    layer: int | None  # index on the stacked axis
    ours: tuple[int, ...]  # our shape, without the stacked axis


def tensor_specs(config: VLMConfig) -> list[TensorSpec]:
    """Every tensor of a checkpoint in a fixed order; a tied head has none."""
    specs = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = tuple(key.key for key in key_path)
        hub = MODULES["/".join(path[:-1])]
        name = hub + (".bias" if path[-1] == "bias" else ".weight")
        stacked = "{i}" in hub
        ours = leaf.shape[1:] if stacked else leaf.shape
        shape = _stored_shape(config, path, ours)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            specs.append(TensorSpec(name.format(i=layer), shape, path, layer, ours))
    return specs


def load_hf(directory: str | Path, *, dtype: Any = np.float32) -> tuple[VLMConfig, Params]:
    """Reads a Qwen2.5-VL checkpoint.

    Args:
      directory: holds config.json and model.safetensors, or shards with their index.
      dtype: of the returned weights.

    Returns:
      (config, params as numpy arrays on the host); put them on devices with your shardings.

    Raises:
      FileNotFoundError: no config.json or no safetensors.
      ValueError: another architecture; a damaged file; or tensors that are missing, unknown or of
        another shape, all listed.
    """
    directory = Path(directory)
    config = read_config(directory)
    return config, read_params(directory, config, dtype=dtype)


def read_config(directory: str | Path) -> VLMConfig:
    """The config.json of a checkpoint directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"No config.json in {directory}: not a Hugging Face model folder.")
    try:
        return VLMConfig.from_hf(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def read_params(directory: Path, config: VLMConfig, *, dtype: Any = np.float32) -> Params:
    """The weights of a checkpoint directory, checked against the config. See `load_hf`."""
    found = _find_tensors(directory)
    specs = tensor_specs(config)
    _compare(specs, found, config)
    shapes = param_shapes(config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype), shapes)
    by_file: dict[Path, list[TensorSpec]] = {}
    for spec in specs:
        by_file.setdefault(found[spec.name].file, []).append(spec)
    for file, wanted in by_file.items():
        with _open(file) as tensors:
            for spec in wanted:
                target = _leaf(params, spec.path)
                value = _from_hub(tensors.get_tensor(found[spec.name].stored), spec)
                target[... if spec.layer is None else spec.layer] = value
    return params


def save_hf(
    directory: str | Path,
    config: VLMConfig,
    params: Params,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and weights that transformers' `from_pretrained` loads.

    Args:
      directory: made if missing.
      config: the model.
      params: plain weights; merge LoRA first.
      dtype: "float32", "bfloat16" or "float16" on disk.
      max_shard_bytes: start a new file when one would grow beyond this.

    Raises:
      ValueError: LoRA leaves, an unknown dtype, or weights that do not fit the config.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(STORED_DTYPES)}, got {dtype!r}.")
    _check_tree(config, params)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stored = STORED_DTYPES[dtype]
    shards = _split(tensor_specs(config), stored.itemsize, max_shard_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {spec.name: _to_hub(_leaf(params, spec.path), spec, stored) for spec in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    stale = [*directory.glob("model*.safetensors"), directory / INDEX_FILE]
    for file in stale:
        if file.name not in weight_map.values():
            file.unlink(missing_ok=True)  # an index or shards of an earlier save would be read
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    text = json.dumps(config.to_hf(dtype), indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n")


class _Found(NamedTuple):
    file: Path
    stored: str  # the name inside the file
    shape: tuple[int, ...]


def _find_tensors(directory: Path) -> dict[str, _Found]:
    """Hub name -> where it is, for all tensors of the directory."""
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (directory / name).is_file()]
        if absent:
            raise ValueError(f"{index} names files that are not there: {absent}. Fetch them.")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"No *.safetensors in {directory}. Pickled weights (*.bin, *.pt) are never opened; "
            "convert them with transformers' save_pretrained(safe_serialization=True)."
        )
    found = {}
    for file in files:
        with _open(file) as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                shape = tuple(tensors.get_slice(stored).get_shape())
                found[_hub_name(stored)] = _Found(file, stored, shape)
    return found


def _hub_name(stored: str) -> str:
    """The hub spelling of a name as transformers 4.52 and later hold it in memory."""
    for long, short in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if stored.startswith(long):
            return short + stored.removeprefix(long)
    return stored


def _compare(specs: list[TensorSpec], found: Mapping[str, _Found], config: VLMConfig) -> None:
    wanted = {spec.name: spec for spec in specs}
    problems = [
        f"missing: {name} {list(spec.shape)}" for name, spec in wanted.items() if name not in found
    ]
    for name, there in found.items():
        if name not in wanted:
            if name == "lm_head.weight" and config.text.tied:
                continue  # some exports store the tied head again; the embedding is the truth
            problems.append(f"unknown: {there.stored} {list(there.shape)} in {there.file.name}")
        elif there.shape != wanted[name].shape:
            problems.append(
                f"shape: {there.stored} is {list(there.shape)} in {there.file.name}, the config "
                f"says {list(wanted[name].shape)}"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not fit config.json:\n  " + "\n  ".join(problems)
        )


def _check_tree(config: VLMConfig, params: Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    given = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    if any(is_lora_leaf(path) for path in given):
        raise ValueError("The weights hold LoRA leaves; call lora.merge_lora before saving.")
    wanted = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config))
    }
    problems = [
        f"{'/'.join(path)}: expected {wanted.get(path, 'nothing')}, "
        f"got {given.get(path, 'nothing')}"
        for path in sorted(wanted.keys() | given.keys())
        if wanted.get(path) != given.get(path)
    ]
    if problems:
        raise ValueError("Weights do not fit the config:\n  " + "\n  ".join(problems))


def _open(file: Path):
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or cut short ({file.stat().st_size} bytes): {error}. "
            "Fetch the file again."
        ) from error


def _stored_shape(
    config: VLMConfig, path: tuple[str, ...], ours: tuple[int, ...]
) -> tuple[int, ...]:
    vision = config.vision
    if path == ("vision", "patch_embed", "kernel"):
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return (vision.width, vision.channels, *patch)
    if path[-1] == "kernel":
        inputs = 2 if path[-2] in ("o", "proj") else 1  # the maps out of heads take (N, H)
        return (math.prod(ours[inputs:]), math.prod(ours[:inputs]))
    return (math.prod(ours),) if path[-1] in ("bias", "scale") else ours


def _from_hub(tensor: np.ndarray, spec: TensorSpec) -> np.ndarray:
    if spec.path[-1] == "kernel":
        tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(spec.ours)


def _to_hub(leaf: Any, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    value = np.asarray(leaf if spec.layer is None else leaf[spec.layer])
    if spec.path[-1] == "kernel":
        value = value.reshape(-1, spec.shape[0]).T
    # safetensors writes the buffer as it lies in memory: a transposed view would be scrambled
    return np.ascontiguousarray(value.reshape(spec.shape).astype(dtype))


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _split(specs: list[TensorSpec], itemsize: int, limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        grown = size + math.prod(spec.shape) * itemsize
        if shards[-1] and grown > limit:
            shards.append([])
            grown -= size
        shards[-1].append(spec)
        size = grown
    return shards
