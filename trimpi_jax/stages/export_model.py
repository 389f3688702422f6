"""Find what a run left, and write it as a folder that transformers, vLLM and SGLang serve.

    given                              exported
    a run's folder                     its last stage that has a model or a checkpoint
    a stage's folder, 2_cot_sft        model/, or the newest of checkpoints/ while the stage runs
    ... /checkpoints or /checkpoints/40    that checkpoint
    a Hugging Face folder              itself, in another dtype or other shards

With `adapter`, the LoRA weights of the stage as a PEFT folder: from adapter/, or from a checkpoint.

Next: trimpi_jax/models/peft_adapter.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax

from trimpi_jax.io.checkpoints import restore_params, saved_steps
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_checks import read_config, stored_dtype
from trimpi_jax.models.hf_files import STORED_DTYPES
from trimpi_jax.models.hf_folder import complete_folder
from trimpi_jax.models.hf_weights import (
    MAX_SHARD_BYTES,
    copy_hf,
    save_hf,
)
from trimpi_jax.models.lora import lora_axes, merge_lora
from trimpi_jax.models.peft_adapter import save_adapter, set_adapter_base
from trimpi_jax.models.processor import load_processor
from trimpi_jax.sharding import make_mesh, param_shardings
from trimpi_jax.stages.model_files import base_of_stage, model_folder, write_aside
from trimpi_jax.stages.saving import checkpoint_folder


class Stage(NamedTuple):
    """A stage of a run."""

    workdir: Path
    config: dict[str, Any]  # the run's config.json
    number: int  # from 1
    step: int | None  # of the checkpoint asked for; None = the newest, or the finished model

    @property
    def name(self) -> str:
        return self.config["stages"][self.number - 1]

    @property
    def folder(self) -> Path:
        return self.workdir / f"{self.number}_{self.name}"

    @property
    def checkpoints(self) -> str:
        """Where its checkpoints lie while it runs."""
        return checkpoint_folder(self.config, self.folder)

    @property
    def has_lora(self) -> bool:
        return self.config[self.name].get("trainable") == "lora"


def export(
    checkpoint: Path,
    out: Path,
    *,
    adapter: bool = False,
    dtype: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Write a model or adapter folder; returns what was written, in a sentence.

    Args:
      checkpoint: see the module docstring.
      out: a folder that does not exist or is empty.
      adapter: the LoRA weights alone, as PEFT stores them.
      dtype: of the file; "" = that of the base model, float32 for an adapter.
      max_shard_bytes: start a new file when one would grow beyond this.

    Raises:
      ValueError, OSError: nothing to export there, or `out` is taken; nothing is written then.
    """
    checkpoint, out = checkpoint.expanduser().resolve(), out.expanduser().resolve()
    if dtype and dtype not in STORED_DTYPES:
        raise ValueError(f"dtype must be one of {sorted(STORED_DTYPES)}, got {dtype!r}.")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder; choose another.")
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"--checkpoint {checkpoint} is not a folder.")
    stage = find_stage(checkpoint, adapter=adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    if stage is None:
        return _export_folder(checkpoint, out, adapter, dtype, max_shard_bytes)
    if adapter and not stage.has_lora:
        raise ValueError(
            f"{stage.folder} trained {stage.config[stage.name].get('trainable')!r} weights, so it"
            f" has no adapter. {_lora_stages(stage)}"
        )
    if stage.step is None and (stage.folder / "model" / "config.json").is_file():
        return _export_finished(stage, out, adapter, dtype, max_shard_bytes)
    return _export_checkpoint(stage, out, adapter, dtype, max_shard_bytes)


def find_stage(checkpoint: Path, *, adapter: bool = False) -> Stage | None:
    """The stage that a folder of a run means; None for a plain model folder.

    Raises:
      ValueError: it is neither, or nothing has been saved yet.
    """
    step = None
    folder = checkpoint
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        step, folder = int(folder.name), folder.parent
    if folder.name in ("checkpoints", "model", "adapter") and run_config(folder.parent.parent):
        if folder.name == "checkpoints" and step is None:
            step = max(saved_steps(folder), default=None)
        folder = folder.parent
    if config := run_config(folder.parent):
        names = [f"{i}_{name}" for i, name in enumerate(config["stages"], start=1)]
        if folder.name in names:
            stage = Stage(folder.parent, config, names.index(folder.name) + 1, step)
            saved = saved_steps(stage.checkpoints)
            if step is None and not _has_model(folder) and not saved:
                raise ValueError(f"{folder} has neither a model nor a checkpoint yet.")
            if step is not None and step not in saved:
                raise ValueError(f"{folder} has no checkpoint {step}; it has {saved}.")
            return stage
    if config := run_config(folder):
        for number in range(len(config["stages"]), 0, -1):
            stage = Stage(folder, config, number, None)
            if _has_model(stage.folder) or saved_steps(stage.checkpoints):
                return stage
        raise ValueError(f"{folder} is a run, but none of its stages has saved anything yet.")
    if (folder / "config.json").is_file():
        return None
    raise ValueError(
        f"{checkpoint} is neither a run's folder, nor one of its stages, nor a Hugging Face model."
    )


def _export_folder(source, out, adapter, dtype, max_shard_bytes) -> str:
    """A plain model folder, rewritten."""
    if adapter:
        raise ValueError(f"{source} is a whole model; --adapter needs a LoRA stage of a run.")
    model = read_config(source)
    dtype = dtype or stored_dtype(source)
    load_processor(source, model)  # a folder without a tokenizer that fits could not be served

    def fill(part: Path) -> None:
        copy_hf(source, part, model, dtype, max_shard_bytes)
        complete_folder(part, source, model, dtype)

    write_aside(out, fill)
    return f"{out}: the model of {source}, {dtype}"


def _export_finished(stage: Stage, out, adapter, dtype, max_shard_bytes) -> str:
    if not adapter:
        source = stage.folder / "model"
        dtype = dtype or stored_dtype(model_folder(stage.config["model_dir"]))
        return _export_folder(source, out, False, dtype, max_shard_bytes)
    source = stage.folder / "adapter"
    if not (source / "adapter_config.json").is_file():
        raise ValueError(f"{source} is not there; was the stage run by an older version?")
    if dtype not in ("", "float32"):
        raise ValueError("a finished adapter is stored in float32; leave --dtype away")
    base = base_of_stage(stage.workdir, stage.config, stage.number)

    def fill(part: Path) -> None:
        shutil.copytree(source, part)
        set_adapter_base(part, str(base))

    write_aside(out, fill)
    return f"{out}: the adapter of {stage.folder}, for the model in {base}"


def _export_checkpoint(stage: Stage, out, adapter, dtype, max_shard_bytes) -> str:
    """From an Orbax checkpoint: parameters only, the optimizer's state stays on disk."""
    original = model_folder(stage.config["model_dir"])
    model = read_config(original)
    processor = load_processor(
        original,
        model,
        min_pixels=stage.config.get("min_pixels", 0),
        max_pixels=stage.config.get("max_pixels", 0),
    )
    if stage.step is None:
        stage = stage._replace(step=max(saved_steps(stage.checkpoints)))
    step, model = stage.step, with_stage_lora(stage, model)
    params = restore_stage(stage, model)
    where = f"step {step} of {stage.folder}"
    if adapter:
        base = base_of_stage(stage.workdir, stage.config, stage.number)
        write_aside(
            out, lambda part: save_adapter(part, model, params, str(base), dtype or "float32")
        )
        return f"{out}: the adapter of {where}, for the model in {base}"
    if stage.has_lora:
        params = jax.jit(merge_lora, static_argnums=1)(params, model.text.lora_scale)
    dtype = dtype or stored_dtype(original)

    def fill(part: Path) -> None:
        save_hf(part, model, params, dtype, max_shard_bytes)
        if jax.process_index() == 0:
            complete_folder(part, original, model, dtype, processor)

    write_aside(out, fill)
    return f"{out}: the model of {where}, {dtype}"


def with_stage_lora(stage: Stage, model: VLMConfig) -> VLMConfig:
    """The model with the factor alpha / rank of the stage's adapters, if it has them."""
    if not stage.has_lora:
        return model
    settings = stage.config[stage.name]
    scale = settings["lora_alpha"] / settings["lora_rank"]
    return dataclasses.replace(model, text=dataclasses.replace(model.text, lora_scale=scale))


def restore_stage(stage: Stage, model: VLMConfig, mesh: jax.sharding.Mesh | None = None) -> Any:
    """The parameters of a stage's checkpoint `stage.step`, adapters apart.

    `mesh` None: over all devices where the sizes allow it, else on one.
    """
    assert stage.step is not None
    axes = vlm.logical_axes(model)
    if stage.has_lora:
        axes = lora_axes(axes, model)

    def shardings(shapes: Any) -> Any:
        if mesh is not None:
            return param_shardings(axes, mesh, shapes)
        return _shardings(axes, shapes)

    return restore_params(stage.checkpoints, stage.step, shardings)


def read_checkpoint(stage: Stage, model: VLMConfig, mesh: jax.sharding.Mesh) -> Any:
    """The parameters of a stage's checkpoint `stage.step`, adapters merged."""
    model = with_stage_lora(stage, model)
    params = restore_stage(stage, model, mesh)
    if stage.has_lora:
        params = jax.jit(merge_lora, static_argnums=1)(params, model.text.lora_scale)
    return params


def _shardings(axes: Any, shapes: Any) -> Any:
    try:
        return param_shardings(axes, make_mesh(data=1, fsdp=-1), shapes)
    except ValueError:
        return param_shardings(axes, make_mesh(devices=jax.devices()[:1]), shapes)


def run_config(folder: Path) -> dict[str, Any] | None:
    """The config of a run's folder; None where it is none (a model has a config.json as well)."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return config if isinstance(config, dict) and "stages" in config else None


def _has_model(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()


def _lora_stages(stage: Stage) -> str:
    found = [
        str(other.folder)
        for other in (stage._replace(number=i + 1) for i in range(len(stage.config["stages"])))
        if other.has_lora
    ]
    return f"With LoRA: {found}." if found else "No stage of this run uses LoRA."
