"""Which tensor of a Hugging Face checkpoint is which weight of ours, and how it lies on disk.

One rule covers every tensor. A torch matrix is [outputs, inputs] with heads flattened; ours is
[*inputs, *outputs]:

    kernel   on disk [*outputs, *inputs], flattened to two axes         (Conv3d and head too)
    others   on disk as here, flattened                                 (bias, scale, embedding)

so both directions are one exchange of axes, and a round trip is bitwise exact. Names are those of
the hub (`model.layers...`, `visual...`); the longer ones that transformers uses in memory since
4.52 (`model.language_model...`, `model.visual...`) are read too.

Source: https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct, model.safetensors.index.json.
Next: trimpi_jax/models/hf_files.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.vlm import param_shapes

Index = tuple[slice, ...]

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
LONG_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))


class TensorSpec(NamedTuple):
    """One tensor on disk, and where it lives in our tree."""

    name: str  # hub name
    shape: tuple[int, ...]  # on disk
    path: tuple[str, ...]  # in our tree
    layer: int | None  # index on the stacked axis
    ours: tuple[int, ...]  # our shape, without the stacked axis
    inputs: int  # how many of our first axes are the inputs of a kernel; 0 = no kernel

    @property
    def disk_axes(self) -> tuple[int, ...]:
        """Our axes in their order on disk: those of the outputs before those of the inputs."""
        axes = range(len(self.ours))
        return (*axes[self.inputs :], *axes[: self.inputs])

    @property
    def unfolded(self) -> tuple[int, ...]:
        """The shape on disk with its axes named one by one, as ours are."""
        return tuple(self.ours[axis] for axis in self.disk_axes)


def tensor_specs(config: VLMConfig) -> list[TensorSpec]:
    """Every tensor of a checkpoint in a fixed order; a tied head has none."""
    specs = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        path = tuple(key.key for key in key_path)
        hub = MODULES["/".join(path[:-1])]
        name = hub + (".bias" if path[-1] == "bias" else ".weight")
        stacked = "{i}" in hub
        ours = leaf.shape[1:] if stacked else leaf.shape
        inputs, shape = _stored(config, path, ours)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            specs.append(TensorSpec(name.format(i=layer), shape, path, layer, ours, inputs))
    return specs


def short_name(stored: str) -> str:
    """The hub spelling of a name as transformers 4.52 and later hold it in memory."""
    for long, short in LONG_NAMES:
        if stored.startswith(long):
            return short + stored.removeprefix(long)
    return stored


def disk_to_ours(tensor: Any, spec: TensorSpec) -> Any:
    """An array as it lies on disk, in our shape; numpy or jax, no copy in numpy."""
    order = np.argsort(spec.disk_axes)
    return tensor.reshape(spec.unfolded).transpose(*(int(axis) for axis in order))


def ours_to_disk(leaf: Any, spec: TensorSpec) -> Any:
    """Our array in the shape on disk; numpy or jax."""
    return leaf.transpose(*spec.disk_axes).reshape(spec.shape)


def flat_runs(index: Index, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of the flattened array that a block covers, in order.

    [2:4] of 6              (2, 4)
    [:, 1:2, :] of 3 2 5    (5, 10) (15, 20) (25, 30)
    """
    covered = np.arange(math.prod(sizes)).reshape(tuple(sizes))[index].reshape(-1)
    breaks = np.flatnonzero(np.diff(covered) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(covered, breaks)]


def fold_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that differ only in the layer number as one, with the first name of each.

    model.layers.0.mlp.up_proj.weight, model.layers.1...    model.layers.{0-1}.mlp.up_proj.weight
    """
    layers: dict[tuple[str, str], list[int]] = {}
    firsts: dict[tuple[str, str], str] = {}
    for name in names:
        found = re.match(r"(.*(?:layers|blocks)\.)(\d+)(\..*)", name)
        key = (found[1], found[3]) if found else (name, "")
        firsts.setdefault(key, name)
        layers.setdefault(key, []).extend([int(found[2])] if found else [])
    folded = []
    for key, first in firsts.items():
        numbers = sorted(layers[key])
        starts = [n for n in numbers if n - 1 not in numbers]
        ends = [n for n in numbers if n + 1 not in numbers]
        pairs = zip(starts, ends, strict=True)
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)
        folded.append((f"{key[0]}{{{spans}}}{key[1]}" if len(numbers) > 1 else first, first))
    return folded


def _stored(
    config: VLMConfig, path: tuple[str, ...], ours: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """(number of input axes, shape on disk) of a weight."""
    vision = config.vision
    if path == ("vision", "patch_embed", "kernel"):
        patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return 3, (vision.width, vision.channels, *patch)
    if path[-1] == "kernel":
        inputs = 2 if path[-2] in ("o", "proj") else 1  # the maps out of heads take (N, H)
        return inputs, (math.prod(ours[inputs:]), math.prod(ours[:inputs]))
    return 0, (math.prod(ours),) if path[-1] in ("bias", "scale") else ours
