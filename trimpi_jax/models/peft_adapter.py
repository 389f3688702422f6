"""LoRA weights as a PEFT folder: adapter_config.json and adapter_model.safetensors.

    ours   language/layers/q/lora_a [L, *inputs, R]    theirs ...q_proj.lora_A.weight [R, inputs]
           language/layers/q/lora_b [L, R, *outputs]          ...q_proj.lora_B.weight [outputs, R]

Names are those that transformers 4.52 and later use in memory, which is what PEFT, vLLM and SGLang
expect of an adapter of Qwen2.5-VL. The vision tower has maps of the same names and no adapters, so
it is excluded by name.

Source: PEFT 0.17 and later, `LoraConfig` and `get_peft_model_state_dict`.
Next: trimpi_jax/models/hf_folder.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_files import STORED_DTYPES, ToWrite, write_file
from trimpi_jax.models.hf_names import LONG_NAMES, MODULES
from trimpi_jax.models.layers import Params
from trimpi_jax.models.lora import LEAVES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LONG, SHORT = LONG_NAMES[0]


def save_adapter(
    directory: str | Path,
    config: VLMConfig,
    params: Params,
    base: str,
    dtype: str = "float32",
) -> None:
    """Writes the LoRA leaves of a tree as a PEFT adapter.

    With several processes all must call it; the first one writes.

    Args:
      directory: made if missing.
      config: the model; its `text.lora_scale` is alpha / rank.
      params: weights with LoRA leaves; the others are not looked at.
      base: path or hub name of the model that the adapter belongs to.
      dtype: on disk; an adapter is small, so float32 loses nothing and costs little.

    Raises:
      ValueError: no LoRA leaves, or an unknown dtype.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(STORED_DTYPES)}, got {dtype!r}.")
    adapted = {
        name: leaves for name, leaves in params["language"]["layers"].items() if "lora_a" in leaves
    }
    if not adapted:
        raise ValueError("The weights hold no LoRA leaves: there is no adapter to write.")
    leaves = {name: {leaf: adapted[name][leaf] for leaf in LEAVES} for name in adapted}
    if jax.process_count() > 1:  # parts of a leaf may lie on other hosts
        leaves = multihost_utils.process_allgather(leaves, tiled=True)
    if jax.process_index():
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, rank = [], 0
    for name in adapted:
        module = MODULES[f"language/layers/{name}"].replace(SHORT, f"base_model.model.{LONG}", 1)
        a, b = (_flat(leaves[name][leaf], leaf) for leaf in LEAVES)
        rank = a.shape[1]
        for layer in range(config.text.depth):
            for letter, stacked in (("A", a), ("B", b)):
                tensors.append(
                    ToWrite(
                        f"{module.format(i=layer)}.lora_{letter}.weight",
                        stacked.shape[1:],
                        functools.partial(_layer, stacked, layer, dtype),
                    )
                )
    write_file(directory / WEIGHTS_FILE, tensors, dtype)
    fields = adapter_fields(config, sorted(adapted), rank, base)
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def adapter_fields(config: VLMConfig, names: list[str], rank: int, base: str) -> dict[str, Any]:
    """The dict of an adapter_config.json."""
    alpha = config.text.lora_scale * rank
    suffixes = [MODULES[f"language/layers/{name}"].rsplit(".", 1)[1] for name in names]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(suffixes),
        "exclude_modules": r".*visual\..*",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def set_adapter_base(directory: str | Path, base: str) -> None:
    """Names another place of the model that an adapter on disk belongs to."""
    file = Path(directory) / CONFIG_FILE
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _flat(leaf: Any, name: str) -> np.ndarray:
    """[L, *inputs, R] -> [L, R, I], or [L, R, *outputs] -> [L, O, R]."""
    value = np.asarray(leaf)
    if name == "lora_a":
        return value.reshape(value.shape[0], -1, value.shape[-1]).swapaxes(1, 2)
    return value.reshape(*value.shape[:2], -1).swapaxes(1, 2)


def _layer(stacked: np.ndarray, layer: int, dtype: str) -> np.ndarray:
    return stacked[layer].astype(STORED_DTYPES[dtype])
