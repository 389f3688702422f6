"""The host side of the model: text to ids, images to resized pixels, in Hugging Face layout.

In: a folder with tokenizer.json, tokenizer_config.json, a chat template and
preprocessor_config.json, as the hub has it or as transformers 5 writes it. Out: token ids with one
placeholder per merged visual cell, and uint8 images whose sides are multiples of `patch_size *
merge_size`. Normalisation happens on the device (`models.vision`), so an image travels as bytes.

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
from trimpi_jax.models.vision import PIXEL_MEAN, PIXEL_STD

PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")  # hub; transformers 5
MAX_ASPECT = 200  # transformers smart_resize
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280  # transformers' class defaults
BICUBIC = 3  # PIL's number, as preprocessor files spell it


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


def load_processor(
    folder: str | Path,
    config: VLMConfig,
    *,
    min_pixels: int = 0,
    max_pixels: int = 0,
) -> Processor:
    """The processor of a model folder.

    Args:
        folder: holds tokenizer.json, tokenizer_config.json, and preprocessor_config.json (hub) or
            processor_config.json (transformers 5).
        config: of the model.
        min_pixels, max_pixels: area of a resized image in px; 0 = what the folder says.

    Raises:
        ValueError: files are missing, there is no chat template, it has no place for images, the
            tokenizer does not know the image token that the model uses, or images are prepared in
            a way that this port does not have.
    """
    from transformers import AutoTokenizer  # slow import: only where a tokenizer is needed

    folder = Path(folder)
    missing = [
        name
        for name in ("tokenizer.json", "tokenizer_config.json")
        if not (folder / name).is_file()
    ]
    if not any((folder / name).is_file() for name in IMAGE_FILES):
        missing.append(IMAGE_FILES[0])
    if missing:
        raise ValueError(f"{folder} lacks {missing}; copy them from the model's original folder")
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    _use_processor_template(tokenizer, folder)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder} has no chat template (chat_template.jinja, chat_template.json or"
            " chat_template in tokenizer_config.json)"
        )
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ValueError(
            f"{folder}: <|image_pad|> is id {tokenizer.convert_tokens_to_ids('<|image_pad|>')} in"
            f" the tokenizer, but image_token_id is {config.image_token_id} in config.json"
        )
    if len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, more than vocab_size"
            f" {config.text.vocab_size} of config.json"
        )
    settings = image_settings(folder)
    _check_image_settings(folder, settings, config.vision)
    smallest, largest = size_limits(settings)
    smallest, largest = min_pixels or smallest, max_pixels or largest
    if not 0 < smallest <= largest:
        raise ValueError(f"{folder}: min_pixels {smallest} and max_pixels {largest} are no range")
    processor = Processor(
        tokenizer=tokenizer,
        vision=config.vision,
        image_token_id=config.image_token_id,
        stop_token_ids=_stop_token_ids(folder, config),
        vocab_size=config.text.vocab_size,
        min_pixels=smallest,
        max_pixels=largest,
    )
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    cell = config.vision.patch_size * config.vision.merge_size
    try:
        encode_prompt_tokens(processor, probe, [(cell, cell)])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: the chat template does not place images: {error}. Is it that of a text-only"
            " model?"
        ) from error
    return processor


def image_settings(folder: Path) -> dict[str, Any]:
    """The image part of preprocessor_config.json, or of transformers 5's processor_config.json."""
    for name in IMAGE_FILES:
        if not (folder / name).is_file():
            continue
        try:
            fields = json.loads((folder / name).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / name} is not valid JSON: {error}") from error
        if name == IMAGE_FILES[0]:
            return fields
        if "image_processor" in fields:
            return fields["image_processor"]
    raise ValueError(f"{folder} has no image settings; copy preprocessor_config.json to it")


def size_limits(settings: dict[str, Any]) -> tuple[int, int]:
    """(min_pixels, max_pixels) in either spelling; the older one wins, as in transformers."""
    size = settings.get("size") or {}
    return (
        int(settings.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS),
        int(settings.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS),
    )


def copy_processor_files(source: str | Path, target: str | Path) -> None:
    """Copy tokenizer, template and preprocessor files of a model folder to another."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Sides in px, multiples of `factor`, area within bounds, aspect kept as well as possible.

    Rounds half to even, as Python's `round` in the reference does. A side that rounds to nothing
    makes the area nothing, so the image is scaled up, again as in the reference.

    Raises:
        ValueError: the aspect ratio is above 200.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"image of {width}x{height} px: aspect ratio above {MAX_ASPECT}; crop it, or cut it in"
            " several images"
        )
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
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
    tokens = encode_text(processor, render_prompt(processor, messages))
    return expand_image_tokens(processor, tokens, image_sizes)


def render_prompt(processor: Processor, messages: Sequence[dict[str, Any]]) -> str:
    """The chat as text, up to and with the assistant's header.

    Where the last message is the assistant's, its text follows the header, to be continued.
    """
    begun = ""
    if messages and messages[-1]["role"] == "assistant":
        begun, messages = messages[-1]["content"], messages[:-1]
    rendered = processor.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return rendered + begun


def expand_image_tokens(
    processor: Processor, tokens: np.ndarray, image_sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Each image mark repeated once per merged cell of its image; int32 [T].

    Raises:
        ValueError: another number of marks than of images.
    """
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


def _stop_token_ids(folder: Path, config: VLMConfig) -> tuple[int, ...]:
    """Those of config.json, then those that generation_config.json adds (<|endoftext|>)."""
    file, more = folder / "generation_config.json", []
    if file.is_file():
        try:
            more = json.loads(file.read_text()).get("eos_token_id") or []
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is no JSON object: {error}") from error
    more = more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys((*config.eos_token_ids, *more)))


def _use_processor_template(tokenizer: Any, folder: Path) -> None:
    """chat_template.json, the older form, holds the template with images; the newest form wins."""
    file = folder / "chat_template.json"
    if file.is_file() and not (folder / "chat_template.jinja").is_file():
        try:
            tokenizer.chat_template = json.loads(file.read_text())["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no chat template ({error!r})") from error


def _check_image_settings(folder: Path, settings: dict[str, Any], vision: VisionConfig) -> None:
    """Complain about every way of preparing images that would silently not be followed."""
    expected = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
        "resample": BICUBIC,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    problems = [
        f"{name} {settings[name]!r} instead of {value!r}"
        for name, value in expected.items()
        if settings.get(name, value) not in (value, None)
    ]
    for name, value, size in (
        ("image_mean", PIXEL_MEAN, 3),
        ("image_std", PIXEL_STD, 3),
        ("rescale_factor", (1 / 255,), 1),
    ):
        found = np.atleast_1d(np.asarray(settings.get(name) or value, np.float64))
        if found.shape != (size,) or np.abs(found - np.asarray(value)).max() > 1e-6:
            problems.append(f"{name} {settings[name]!r} instead of {value}")
    if problems:
        raise ValueError(
            f"{folder}: the model's images are prepared otherwise than here: " + "; ".join(problems)
        )
