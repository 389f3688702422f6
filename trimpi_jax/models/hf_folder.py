"""What a model folder holds beside its weights, for a folder that others can serve.

    config.json              in the words of the base model, with the dtype that is stored now
    generation_config.json   the base's, or one made from config.json's ids
    tokenizer, template, preprocessor files of the base; image sizes as they were trained

Next: trimpi_jax/models/processor.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import (
    IMAGE_FILES,
    Processor,
    copy_processor_files,
    image_settings,
    size_limits,
)

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


def complete_folder(
    folder: str | Path,
    base: str | Path,
    config: VLMConfig,
    dtype: str,
    processor: Processor | None = None,
) -> None:
    """Adds to the weights of a folder what transformers, vLLM and SGLang need to serve it.

    Args:
      folder: where the weights were written.
      base: the model folder that they started from.
      config: of the model that was written.
      dtype: of the weights in `folder`.
      processor: of the run; where its image sizes differ from the base's they are written down.
    """
    folder, base = Path(folder), Path(base)
    copy_processor_files(base, folder)
    fields = json.loads((base / "config.json").read_text())
    if (
        VLMConfig.from_hf(fields).to_hf() == config.to_hf()
    ):  # else the words would say another model
        _write_json(folder / "config.json", with_dtype(fields, dtype))
    if not (folder / "generation_config.json").is_file():
        _write_json(folder / "generation_config.json", generation_fields(config))
    if not any((folder / name).is_file() for name in TEMPLATE_FILES):
        template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
        if isinstance(template, str):  # transformers' processors look for it in a file of its own
            (folder / TEMPLATE_FILES[0]).write_text(template)
    if processor is not None:
        _write_image_sizes(folder, processor)


def with_dtype(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json dict that says in what its weights are stored, wherever it says so."""
    changed = dict(fields)
    for name in ("text_config", "vision_config"):
        part = fields.get(name)
        if isinstance(part, dict):
            changed[name] = part | {key: dtype for key in DTYPE_KEYS if key in part}
    keys = [key for key in DTYPE_KEYS if key in fields]
    return changed | dict.fromkeys(keys or ["torch_dtype"], dtype)  # every version reads the latter


def generation_fields(config: VLMConfig) -> dict[str, Any]:
    """The dict of a generation_config.json: the ids, and nothing that changes sampling."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }


def _write_image_sizes(folder: Path, processor: Processor) -> None:
    sizes = (processor.min_pixels, processor.max_pixels)
    if size_limits(image_settings(folder)) == sizes:
        return
    for name in IMAGE_FILES:
        if not (folder / name).is_file():
            continue
        fields = json.loads((folder / name).read_text())
        settings = fields.get("image_processor", fields)
        if name == "processor_config.json" and "image_processor" not in fields:
            continue
        for key, value in zip(("min_pixels", "max_pixels"), sizes, strict=True):
            if key in settings:
                settings[key] = value
        settings["size"] = {"shortest_edge": sizes[0], "longest_edge": sizes[1]}
        _write_json(folder / name, fields)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
