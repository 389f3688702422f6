"""Weights in and out of Hugging Face directories: config.json and *.safetensors, nothing else.

    load_params   disk -> devices; a host reads the parts that its devices hold, tensor by tensor
    load_hf       disk -> numpy, all of it; for small models and tests
    save_hf       devices or numpy -> disk, tensor by tensor
    copy_hf       disk -> disk, in another dtype or other shards

Memory of the host, beside the weights themselves: about one tensor. Exchanging axes, casting and
stacking the layers happen on the devices. Pickled weights are never opened, remote code never run.

Next: trimpi_jax/models/peft_adapter.py
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_checks import check_weights, read_config
from trimpi_jax.models.hf_files import (
    INDEX_FILE,
    SINGLE_FILE,
    STORED_DTYPES,
    Located,
    ToWrite,
    read_block,
    write_file,
    write_index,
)
from trimpi_jax.models.hf_names import (
    Index,
    TensorSpec,
    disk_to_ours,
    ours_to_disk,
    tensor_specs,
)
from trimpi_jax.models.layers import Params
from trimpi_jax.models.lora import is_lora_leaf
from trimpi_jax.models.vlm import param_shapes

MAX_SHARD_BYTES = 5 * 2**30  # the hub's habit: shards of about 5 GB


def load_params(
    directory: str | Path, config: VLMConfig, shardings: Any, *, dtype: Any = np.float32
) -> Params:
    """Reads a checkpoint onto the devices.

    Every process calls it with the same arguments and reads only what its own devices hold. Layers
    are put one by one into their stacked leaf, which is donated, so no second copy exists.

    Args:
      directory: holds model.safetensors, or shards with their index.
      config: from `read_config`.
      shardings: a NamedSharding per weight, as `sharding.param_shardings` gives.
      dtype: of the returned weights.

    Returns:
      A tree of jax arrays.

    Raises:
      As `check_weights`, before anything is read.
    """
    found = check_weights(directory, config)
    shapes = param_shapes(config)
    by_path: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in tensor_specs(config):
        by_path.setdefault(spec.path, []).append(spec)
    params: Params = {}
    for path, specs in by_path.items():
        sharding = _leaf(shardings, path)
        if specs[0].layer is None:
            convert = _converter(_kind(specs[0]), sharding, np.dtype(dtype))
            value = convert(_read(found, specs[0], sharding))
        else:
            value = _stack(found, specs, _leaf(shapes, path).shape, sharding, dtype)
        _set_leaf(params, path, value.block_until_ready())
    return params


def load_hf(directory: str | Path, *, dtype: Any = np.float32) -> tuple[VLMConfig, Params]:
    """Reads a Qwen2.5-VL checkpoint into the memory of the host.

    Args:
      directory: holds config.json and model.safetensors, or shards with their index.
      dtype: of the returned weights.

    Returns:
      (config, params as numpy arrays).

    Raises:
      FileNotFoundError: no config.json or no safetensors.
      ValueError: another architecture, or what `check_weights` complains about.
    """
    config = read_config(directory)
    found = check_weights(directory, config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, dtype), param_shapes(config))
    for spec in tensor_specs(config):
        block = read_block(found[spec.name], spec, tuple(slice(size) for size in spec.unfolded))
        target = _leaf(params, spec.path)
        target[... if spec.layer is None else spec.layer] = disk_to_ours(block, spec)
    return config, params


def save_hf(
    directory: str | Path,
    config: VLMConfig,
    params: Params,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json and weights that transformers' `from_pretrained` loads.

    With several processes all must call it; the first one writes.

    Args:
      directory: made if missing.
      config: the model.
      params: plain weights, numpy or jax; merge LoRA first.
      dtype: "float32", "bfloat16" or "float16" on disk.
      max_shard_bytes: start a new file when one would grow beyond this.

    Raises:
      ValueError: LoRA leaves, an unknown dtype, or weights that do not fit the config.
    """
    _check_tree(config, params)
    write_hf(directory, config, functools.partial(_to_disk, params), dtype, max_shard_bytes)


def copy_hf(
    source: str | Path,
    directory: str | Path,
    config: VLMConfig,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the weights of one folder into another, in another dtype or other shards.

    Tensor by tensor on the host; tensors that keep their dtype keep their bytes.

    Raises:
      As `check_weights`, and ValueError for an unknown dtype.
    """
    found = check_weights(source, config)

    def value(spec: TensorSpec, dtype: str) -> np.ndarray:
        whole = tuple(slice(size) for size in spec.unfolded)
        block = read_block(found[spec.name], spec, whole).reshape(spec.shape)
        return block.astype(STORED_DTYPES[dtype], copy=False)

    write_hf(directory, config, value, dtype, max_shard_bytes)


def write_hf(
    directory: str | Path,
    config: VLMConfig,
    value: Callable[[TensorSpec, str], np.ndarray],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """config.json, shards and index; `value(spec, dtype)` makes a tensor when its turn comes."""
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(STORED_DTYPES)}, got {dtype!r}.")
    directory, specs = Path(directory), tensor_specs(config)
    if jax.process_index():
        for spec in specs:  # every process takes part in the gathering of a tensor
            value(spec, dtype)
        return
    directory.mkdir(parents=True, exist_ok=True)
    shards = _split(specs, STORED_DTYPES[dtype].itemsize, max_shard_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [
            ToWrite(spec.name, spec.shape, functools.partial(value, spec, dtype)) for spec in shard
        ]
        total += write_file(directory / name, tensors, dtype)
        weight_map.update({spec.name: name for spec in shard})
    for file in (*directory.glob("model*.safetensors"), directory / INDEX_FILE):
        if file.name not in weight_map.values():
            file.unlink(missing_ok=True)  # an index or shards of an earlier save would be read
    if len(shards) > 1:
        write_index(directory, weight_map, total)
    text = json.dumps(config.to_hf(dtype), indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n")


def _read(found: Mapping[str, Located], spec: TensorSpec, sharding: NamedSharding) -> jax.Array:
    """A tensor as it lies on disk, its axes unfolded, cut over the devices as ours will be."""

    @functools.cache  # devices that hold the same part share one reading of it
    def block(*bounds: tuple[int, int]) -> np.ndarray:
        index = tuple(slice(start, stop) for start, stop in bounds)
        return read_block(found[spec.name], spec, index)

    def callback(index: Index | None) -> np.ndarray:
        assert index is not None
        sized = zip(index, spec.unfolded, strict=True)
        return block(*(part.indices(size)[:2] for part, size in sized))

    return jax.make_array_from_callback(spec.unfolded, _on_disk(sharding, spec), callback)


def _stack(found, specs, shape, sharding, dtype) -> jax.Array:
    """All layers of one kind, put one by one into a donated array."""
    one = NamedSharding(sharding.mesh, PartitionSpec(*_padded(sharding, len(shape))[1:]))
    put = _putter(_kind(specs[0]), sharding, np.dtype(dtype))
    stacked = jnp.zeros(shape, dtype, device=sharding)
    for spec in specs:
        tensor = _read(found, spec, one)
        # waiting bounds the memory: at most one tensor is on its way
        stacked = put(stacked, tensor, jnp.int32(spec.layer)).block_until_ready()
    return stacked


@functools.cache  # a compiled function each, used again by the next checkpoint of this shape
def _putter(kind: TensorSpec, sharding: NamedSharding, dtype: np.dtype) -> Any:
    def put(stacked, tensor, layer):
        value = disk_to_ours(tensor, kind).astype(dtype)
        return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@functools.cache
def _converter(kind: TensorSpec, sharding: NamedSharding, dtype: np.dtype) -> Any:
    return jax.jit(lambda tensor: disk_to_ours(tensor, kind).astype(dtype), out_shardings=sharding)


def _kind(spec: TensorSpec) -> TensorSpec:
    """What tensors of one shape have in common."""
    return spec._replace(name="", path=(), layer=None)


def _on_disk(sharding: NamedSharding, spec: TensorSpec) -> NamedSharding:
    names = _padded(sharding, len(spec.ours))
    return NamedSharding(sharding.mesh, PartitionSpec(*(names[axis] for axis in spec.disk_axes)))


def _padded(sharding: NamedSharding, rank: int) -> tuple[Any, ...]:
    return (*sharding.spec, *(None,) * (rank - len(sharding.spec)))


def _to_disk(params: Params, spec: TensorSpec, dtype: str) -> np.ndarray:
    """One tensor as it will lie on disk; gathered and cast on the devices where there are any."""
    leaf = _leaf(params, spec.path)
    if not isinstance(leaf, jax.Array):
        value = np.asarray(leaf if spec.layer is None else leaf[spec.layer])
        return np.ascontiguousarray(ours_to_disk(value, spec).astype(STORED_DTYPES[dtype]))
    layer = None if spec.layer is None else jnp.int32(spec.layer)
    return np.asarray(_gather(leaf, layer, _kind(spec), dtype))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gather_here(leaf: jax.Array, layer: jax.Array | None, spec: TensorSpec, dtype: str):
    value = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, 0, False)
    return ours_to_disk(value, spec).astype(STORED_DTYPES[dtype])


def _gather(leaf: jax.Array, layer: jax.Array | None, spec: TensorSpec, dtype: str) -> jax.Array:
    value = _gather_here(leaf, layer, spec, dtype)
    if value.is_fully_addressable:
        return value
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
    return jax.jit(lambda x: x, out_shardings=everywhere)(value)


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


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set_leaf(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


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
