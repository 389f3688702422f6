"""Low-rank adapters on the linear maps of the language model.

    y = x W + (alpha / R) (x A) B        A [*inputs, R] random, B [R, *outputs] zero at first

The two leaves live beside the kernel in the same dict ("kernel", "bias", "lora_a", "lora_b"), so
checkpoints, shardings and optimizers see one tree. The factor alpha / R is the static field
`lora_scale` of the text config. Rollouts should use adapters unmerged: merging into bfloat16
weights rounds small updates away.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); A initialised as peft's "kaiming uniform".
Next: trimpi_jax/models/hf_weights.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.language import linear_maps
from trimpi_jax.models.layers import Params

LEAVES = ("lora_a", "lora_b")
TRAINABLE = ("lora", "all", "all_but_vision")


def add_lora(params: Params, config: VLMConfig, key: jax.Array, rank: int) -> Params:
    """Puts a pair (A, B) beside every kernel of the language layers; B = 0, so nothing changes.

    A ~ uniform(-1/sqrt(I), 1/sqrt(I)), I the number of inputs of the map.

    Raises:
      ValueError: rank < 1, or adapters are already there.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, got {rank}.")
    layers = dict(params["language"]["layers"])
    for number, (name, declared) in enumerate(linear_maps(config.text).items()):
        if "lora_a" in layers[name]:
            raise ValueError(f"{name} already has LoRA leaves; merge or drop them first.")
        inputs = tuple(size for _, size in declared.inputs)
        outputs = tuple(size for _, size in declared.outputs)
        bound = 1 / math.sqrt(math.prod(inputs))
        shape = (config.text.depth, *inputs, rank)
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
        b = jnp.zeros((config.text.depth, rank, *outputs))
        layers[name] = {**layers[name], "lora_a": a, "lora_b": b}
    return _with_layers(params, layers)


def lora_axes(axes: Params, config: VLMConfig) -> Params:
    """Logical axes of a tree after `add_lora`, from those before it."""
    layers = dict(axes["language"]["layers"])
    for name, declared in linear_maps(config.text).items():
        inputs = tuple(axis for axis, _ in declared.inputs)
        outputs = tuple(axis for axis, _ in declared.outputs)
        pair = {
            "lora_a": ("layers", *inputs, "lora_rank"),
            "lora_b": ("layers", "lora_rank", *outputs),
        }
        layers[name] = {**layers[name], **pair}
    return _with_layers(axes, layers)


def merge_lora(params: Params, scale: float) -> Params:
    """W + scale A B, and no LoRA leaves any more; a tree without them comes back as it is.

    Args:
      scale: alpha / rank, the `lora_scale` of the text config.
    """
    layers = {}
    for name, leaves in params["language"]["layers"].items():
        plain = {leaf: value for leaf, value in leaves.items() if leaf not in LEAVES}
        if "lora_a" in leaves:
            depth, rank = leaves["lora_a"].shape[0], leaves["lora_a"].shape[-1]
            a = leaves["lora_a"].reshape(depth, -1, rank)  # [L, *inputs, R] -> [L, I, R]
            b = leaves["lora_b"].reshape(depth, rank, -1)  # [L, R, *outputs] -> [L, R, O]
            update = jnp.einsum("lir,lro->lio", a, b).reshape(plain["kernel"].shape)
            plain["kernel"] = (plain["kernel"] + scale * update).astype(plain["kernel"].dtype)
        layers[name] = plain
    return _with_layers(params, layers)


def is_lora_leaf(path: Sequence[Any]) -> bool:
    """True where a path (of strings, or of jax tree keys) ends in an adapter weight."""
    return bool(path) and getattr(path[-1], "key", path[-1]) in LEAVES


def trainable_mask(params: Params, mode: str) -> Params:
    """A tree of Python bools: which weights the optimizer changes.

    Args:
      mode: "lora" (adapters only), "all", or "all_but_vision" (the language model).

    Raises:
      ValueError: an unknown mode; "lora" without adapters, or another mode with them, since the
        factors and the kernel they add to would then train together.
    """
    if mode not in TRAINABLE:
        raise ValueError(f"Trainable weights must be one of {TRAINABLE}, got {mode!r}.")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    has_lora = any(is_lora_leaf(path) for path in paths)
    if has_lora != (mode == "lora"):
        raise ValueError(
            f"mode {mode!r} on weights {'with' if has_lora else 'without'} LoRA leaves. Use "
            "add_lora with mode 'lora', and merge_lora before training all weights."
        )

    def one(path, _):
        if mode == "lora":
            return is_lora_leaf(path)
        return mode == "all" or path[0].key != "vision"

    return jax.tree_util.tree_map_with_path(one, params)


def _with_layers(tree: Params, layers: Params) -> Params:
    return {**tree, "language": {**tree["language"], "layers": layers}}
