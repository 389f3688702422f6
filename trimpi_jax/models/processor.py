"""The host side of the model: text to ids, images to resized pixels, in Hugging Face layout.

In: a folder with tokenizer.json, tokenizer_config.json (chat template) and
preprocessor_config.json. Out: token ids with one placeholder per merged visual cell, and uint8
images whose sides are multiples of `patch_size * merge_size`. Normalisation happens on the device
(`models.vision`), so an image travels as bytes.

Source: transformers `processing_qwen2_5_vl.py`, `image_processing_pil_qwen2_vl.py` (smart_resize,
PIL bicubic on uint8), Qwen2.5-VL's chat template.
Next: trimpi_jax/inputs/encode.py
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimpi_jax.models.config import VisionConfig, VLMConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
MAX_ASPECT = 200  # transformers smart_resize


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, chat template and image sizes of one model folder."""

    tokenizer: Any  # transformers PreTrainedTokenizerFast
    vision: VisionConfig
    image_token_id: int
    stop_token_ids: tuple[int, ...]  # the first one ends a message: <|im_end|>
    vocab_size: int
    min_pixels: int
    max_pixels: int


def load_processor(folder: str | Path, config: VLMConfig) -> Processor:
    """The processor of a model folder.

    Raises:
        ValueError: files are missing, there is no chat template, or the tokenizer does not know
            the image token that the model uses.
    """
    from transformers import AutoTokenizer  # slow import: only where a tokenizer is needed

    folder = Path(folder)
    missing = [
        name
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
        if not (folder / name).is_file()
    ]
    if missing:
        raise ValueError(f"{folder} lacks {missing}; copy them from the model's original folder")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if not tokenizer.chat_template:
        raise ValueError(f"{folder}/tokenizer_config.json has no chat_template")
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ValueError(
            f"{folder}: <|image_pad|> is id {tokenizer.convert_tokens_to_ids('<|image_pad|>')} in"
            f" the tokenizer, but image_token_id is {config.image_token_id} in config.json"
        )
    sizes = json.loads((folder / "preprocessor_config.json").read_text())
    size = sizes.get("size") or {}
    return Processor(
        tokenizer=tokenizer,
        vision=config.vision,
        image_token_id=config.image_token_id,
        stop_token_ids=tuple(config.eos_token_ids),
        vocab_size=config.text.vocab_size,
        min_pixels=int(sizes.get("min_pixels") or size.get("shortest_edge") or 56 * 56),
        max_pixels=int(sizes.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280),
    )


def copy_processor_files(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer, template and preprocessor files of a model folder to another."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Sides in px, multiples of `factor`, area within bounds, aspect kept as well as possible.

    Rounds half to even, as Python's `round` in the reference does.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"image of {width}x{height} px: aspect ratio above {MAX_ASPECT}")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def resize_image(pixels: np.ndarray, processor: Processor) -> np.ndarray:
    """uint8 [Y, X, 3] resized (PIL bicubic) to what the vision tower takes."""
    height, width = smart_resize(
        pixels.shape[0],
        pixels.shape[1],
        factor=processor.vision.patch_size * processor.vision.merge_size,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
    )
    if (height, width) == pixels.shape[:2]:
        return pixels
    image = Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode_prompt_tokens(
    processor: Processor, messages: Sequence[dict[str, Any]], image_sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Token ids int32 [T] of a chat prompt up to and with the assistant's header.

    Args:
        processor: see `load_processor`.
        messages: chat messages; a content is a string or a list of {"type": "image"} and
            {"type": "text", "text": ...}.
        image_sizes: (height, width) in px after `resize_image`, in the order of the images.

    Raises:
        ValueError: the template wrote another number of image marks than there are images.
    """
    text = processor.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    tokens = encode_text(processor, text)
    cell = processor.vision.patch_size * processor.vision.merge_size
    counts = [(height // cell) * (width // cell) for height, width in image_sizes]
    marks = np.flatnonzero(tokens == processor.image_token_id)
    if len(marks) != len(counts):
        raise ValueError(
            f"the prompt has {len(marks)} image marks but {len(counts)} images: does a text"
            " contain <|image_pad|>, or the chat template drop images?"
        )
    repeats = np.ones(len(tokens), np.int64)
    repeats[marks] = counts
    return np.repeat(tokens, repeats)


def encode_text(processor: Processor, text: str) -> np.ndarray:
    """Token ids int32 [T] of a text, special tokens in it recognised, none added."""
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray(ids, np.int32)


def encode_completion(processor: Processor, text: str) -> np.ndarray:
    """Token ids int32 [S] of what the model says, with its end-of-message token."""
    return np.append(encode_text(processor, text), np.int32(processor.stop_token_ids[0]))


def decode_completion(processor: Processor, tokens: np.ndarray) -> str:
    """The text of completion ids; stop tokens at the end are dropped."""
    ids = [int(token) for token in tokens]
    while ids and ids[-1] in processor.stop_token_ids:
        ids.pop()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)
