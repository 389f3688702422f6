"""Open the model that a folder means: weights on the mesh, processor, and where they come from.

    given                              opened
    a run's folder                     its last stage that has a model or a checkpoint
    a stage's folder, 2_cot_sft        model/, or the newest of checkpoints/ while the stage runs
    ... /checkpoints or /checkpoints/40    that checkpoint, its LoRA merged
    0_base of a run                    the model that the run started from
    a Hugging Face folder              itself

Next: trimpi_jax/stages/evaluate_folder.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from trimpi_jax.io.checkpoints import saved_steps
from trimpi_jax.io.storage import is_remote, open_folder
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.hf_weights import check_weights, read_config
from trimpi_jax.models.processor import Processor, load_processor
from trimpi_jax.stages.export_model import Stage, find_stage, read_checkpoint, run_config
from trimpi_jax.stages.model_files import load_weights, model_folder


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk. `stage` is None for a plain folder; `files` are what decides its weights."""

    given: Path
    files: Any  # a Hugging Face folder, or a checkpoint's folder (maybe in an object store)
    stage: Stage | None
    run: Path | None  # the run's folder that it lies in

    @property
    def is_checkpoint(self) -> bool:
        """Whether `files` is an Orbax checkpoint."""
        return self.stage is not None and self.stage.step is not None

    def run_config(self) -> ConfigDict | None:
        """The config of the run; None for a plain folder."""
        found = run_config(self.run) if self.run else None
        return ConfigDict(found) if found else None


def find_model(given: Path) -> ModelSource:
    """What `given` means.

    Raises:
        ValueError, OSError: it is no folder, or holds no model.
    """
    given = given.expanduser().resolve()
    if not given.is_dir():
        raise FileNotFoundError(f"--model {given} is not a folder.")
    if given.name == "0_base" and (found := run_config(given.parent)):
        return ModelSource(given, model_folder(found["model_dir"]).resolve(), None, given.parent)
    if given.name == "final" and run_config(given.parent):
        return ModelSource(given, given, None, given.parent)
    stage = find_stage(given)
    if stage is None:
        return ModelSource(given, given, None, None)
    files = stage.folder / "model"
    if stage.step is not None or not (files / "config.json").is_file():
        step = max(saved_steps(stage.checkpoints)) if stage.step is None else stage.step
        stage = stage._replace(step=step)
        place = stage.checkpoints
        files = (open_folder(place) if is_remote(place) else Path(place)) / str(step)
    return ModelSource(given, files, stage, stage.workdir)


def open_config(source: ModelSource, config: ConfigDict) -> tuple[VLMConfig, Processor]:
    """Config and processor, after a look at the headers of the weights.

    Raises:
        ValueError, OSError: anything that would stop reading the weights later.
    """
    folder = source.files
    if source.is_checkpoint:
        assert source.stage is not None
        folder = model_folder(source.stage.config["model_dir"])
    model = read_config(folder)
    if not source.is_checkpoint:
        check_weights(folder, model)
    processor = load_processor(
        folder,
        model,
        min_pixels=config.get("min_pixels", 0),
        max_pixels=config.get("max_pixels", 0),
    )
    return model, processor


def load_model(source: ModelSource, model: VLMConfig, mesh: jax.sharding.Mesh) -> Any:
    """Float32 weights, laid over the mesh as they are read."""
    if not source.is_checkpoint:
        return load_weights(source.files, model, mesh)
    assert source.stage is not None
    return read_checkpoint(source.stage, model, mesh)
