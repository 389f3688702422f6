"""Example: the one record that every dataset is turned into and every stage reads.

An Example is what the paper calls (P_T, P_I, I, Q, C, A): policy text and policy images, input
images, query, chain of thought and answer. On disk it is one MessagePack map (schema below), so a
shard can be read from any language.

    key            type          meaning
    example_id     str           unique in its dataset
    images         list[bytes]   input images, encoded (PNG or JPEG)
    query          str           what the user asks; never contains the policy
    answer         str           the canonical answer, e.g. "Case 3"
    cot            str           chain of thought between <think> and </think>; "" = none
    policy_name    str           the name that the query uses; "" = no policy
    policy_text    str           the policy document; "<image>" marks where a policy image goes
    policy_images  list[bytes]   the document's own images, in order of their marks
    meta           map           JSON-like facts for graders and reports (scene, path, seed, ...)

Source: paper section 2 and 4 (the task and the VM-CPT sequence).
Next: data_pipelines/shards.py
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import msgpack
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_MARK = "<image>"
MAX_IMAGE_PIXELS = 40_000_000  # larger files are refused before decoding (decompression bombs)
# Only these are tried: some of Pillow's other readers run external programs (EPS: Ghostscript)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclasses.dataclass(frozen=True)
class Example:
    """One record; see the module docstring for the meaning of the fields."""

    example_id: str
    images: tuple[bytes, ...]
    query: str
    answer: str
    cot: str = ""
    policy_name: str = ""
    policy_text: str = ""
    policy_images: tuple[bytes, ...] = ()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


_FIELDS = {field.name for field in dataclasses.fields(Example)}
_IMAGE_FIELDS = ("images", "policy_images")


def encode_record(example: Example) -> bytes:
    """One Example as MessagePack bytes; equal Examples give equal bytes (maps in key order)."""
    return msgpack.packb(_in_key_order(dataclasses.asdict(example)), use_bin_type=True)


def decode_record(record: bytes) -> Example:
    """The Example of one record.

    Raises:
        ValueError: not MessagePack, or fields are missing, unknown or of another type.
    """
    try:
        fields = msgpack.unpackb(record, raw=False)
    except Exception as error:  # msgpack raises several unrelated types for broken bytes
        raise ValueError(f"not an Example record ({error}); rebuild the shard") from error
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        found = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"an Example record has the fields {sorted(_FIELDS)}, found {found}")
    wrong = [name for name, value in fields.items() if not _has_type(name, value)]
    if wrong:
        raise ValueError(f"an Example record has other types in {wrong}; rebuild the shard")
    images: dict[str, Any] = {name: tuple(fields[name]) for name in _IMAGE_FIELDS}
    return Example(**(fields | images))


def completion_text(cot: str, answer: str) -> str:
    r"""What the model should say: `<think>cot</think>\boxed{answer}`; without CoT only the box."""
    thought = f"<think>{cot}</think>" if cot else ""
    return f"{thought}\\boxed{{{answer}}}"


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [Y, X, 3] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(encoded: bytes, where: str = "image") -> np.ndarray:
    """Encoded bytes as uint8 RGB [Y, X, 3]; transparency is dropped on white.

    16-bit grey keeps its high byte; of an animation the first frame is taken; a photo is turned
    as its EXIF orientation says. IMAGE_FORMATS are read.

    Args:
        encoded: a PNG, JPEG, ... file's bytes.
        where: named in the error (example id and image number).

    Raises:
        ValueError: not an image, truncated, or more than MAX_IMAGE_PIXELS pixels.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{where}: {image.width}x{image.height} pixels are more than the limit of"
                    f" {MAX_IMAGE_PIXELS}; scale the file down"
                )
            image = ImageOps.exif_transpose(image)  # photos of a phone held upright
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, rgba)
            if image.mode.startswith("I;16"):  # convert("RGB") would clip all above 255 to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except ValueError:
        raise
    except Image.DecompressionBombError as error:  # Pillow has a limit of its own, above ours
        raise ValueError(
            f"{where}: more than {MAX_IMAGE_PIXELS} pixels; scale the file down ({error})"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{where}: {len(encoded)} bytes that are no readable image of"
            f" {', '.join(IMAGE_FORMATS)}"
        ) from error
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{where}: {len(encoded)} bytes that are no readable image ({error})"
        ) from error


def image_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) in px that `decode_image` would give, read from the file's head alone."""
    with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
        return (image.width, image.height) if turned else (image.height, image.width)


def _has_type(name: str, value: Any) -> bool:
    if name in _IMAGE_FIELDS:
        return isinstance(value, list) and all(isinstance(item, bytes) for item in value)
    return isinstance(value, dict if name == "meta" else str)


def _in_key_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_key_order(value[key]) for key in sorted(value)}
    return [_in_key_order(item) for item in value] if isinstance(value, list | tuple) else value
