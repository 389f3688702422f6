"""The models of a run on disk: the base it starts from, and what each stage leaves.

    workdir/2_cot_sft/checkpoints/   while the stage runs: everything a resume needs (Orbax)
                      model/         after it: the whole model, Hugging Face layout, float32
                      adapter/       of a LoRA stage: what it trained, PEFT layout, float32
    workdir/final/                   the last model, in the dtype of the base

Next: trimpi_jax/stages/export_model.py
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_folder import complete_folder
from trimpi_jax.models.hf_weights import check_weights, load_params, read_config, save_hf
from trimpi_jax.models.peft_adapter import save_adapter
from trimpi_jax.models.processor import Processor, load_processor
from trimpi_jax.models.releases import check_size
from trimpi_jax.sharding import param_shardings


def model_folder(model_dir: str | Path) -> Path:
    """The base model's folder; a relative path is looked up beside the package, then as given."""
    folder = Path(model_dir)
    packaged = Path(__file__).parent.parent / folder
    return packaged if not folder.is_absolute() and packaged.is_dir() else folder


def open_base(config: ConfigDict) -> tuple[VLMConfig, Processor]:
    """Config and processor of the base model, after a look at the headers of its weights.

    Raises:
      ValueError, OSError: anything that would stop the run later; nothing has been written yet.
    """
    if not config.model_dir:
        raise ValueError(
            "which model? Give --config.model_dir=/path/to/Qwen2.5-VL-3B-Instruct: a folder with"
            " config.json, *.safetensors and the tokenizer"
        )
    folder = model_folder(config.model_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"--config.model_dir: {folder} is not a folder")
    model = read_config(folder)
    if config.get("size"):
        check_size(config.size, model)
    check_weights(folder, model)
    processor = load_processor(
        folder,
        model,
        min_pixels=config.get("min_pixels", 0),
        max_pixels=config.get("max_pixels", 0),
    )
    return model, processor


def load_weights(folder: Path, model: VLMConfig, mesh: jax.sharding.Mesh) -> Any:
    """Float32 weights of a model folder, laid over the mesh as they are read."""
    shardings = param_shardings(vlm.logical_axes(model), mesh, vlm.param_shapes(model))
    return load_params(folder, model, shardings)


def write_model(
    folder: Path,
    base: Path,
    model: VLMConfig,
    params: Any,
    processor: Processor,
    dtype: str = "float32",
) -> None:
    """A Hugging Face folder, complete or absent."""

    def fill(part: Path) -> None:
        save_hf(part, model, params, dtype)
        if jax.process_index() == 0:
            complete_folder(part, base, model, dtype, processor)

    write_aside(folder, fill)


def write_adapter(folder: Path, base: Path, model: VLMConfig, params: Any) -> None:
    """A PEFT folder of the LoRA leaves, complete or absent."""
    write_aside(folder, lambda part: save_adapter(part, model, params, str(base)))


def write_aside(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a folder beside the wanted one, then give it the name; the first process moves it."""
    part = folder.with_name(folder.name + ".part")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
    try:
        fill(part)
    except BaseException:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)


def base_of_stage(workdir: Path, config: Any, number: int) -> Path:
    """The model folder that stage `number` (from 1) starts from."""
    if number == 1:
        return model_folder(config["model_dir"]).resolve()
    return workdir / f"{number - 1}_{config['stages'][number - 2]}" / "model"
