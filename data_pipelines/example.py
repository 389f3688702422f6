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

    A photo is turned as its EXIF orientation says. IMAGE_FORMATS are read, in 8-bit grey or RGB,
    with or without transparency. What would have to be guessed is refused: which frame of an
    animation, which inks CMYK means, which half of 16 bits, whether a palette is one of colours.

    Args:
        encoded: a PNG, JPEG, ... file's bytes.
        where: named in the error (example id and image number).

    Raises:
        ValueError: not an image, truncated, more than MAX_IMAGE_PIXELS pixels, animated, or in
            CMYK, palette or 16-bit colours.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{where}: {image.width}x{image.height} pixels are more than the limit of"
                    f" {MAX_IMAGE_PIXELS}; scale the file down"
                )
            if odd := _what_is_odd(image, encoded):
                raise ValueError(f"{where}: {odd}; save it as an 8-bit RGB PNG or JPEG")
            image = ImageOps.exif_transpose(image)  # photos of a phone held upright
            if image.mode in ("RGBA", "LA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, rgba)
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
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"{where}: {len(encoded)} bytes that are no readable image ({error})"
        ) from error


def _what_is_odd(image: Image.Image, encoded: bytes) -> str:
    """Why the pixels of a file are not plainly 8-bit RGB; "" when they are."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG with a preview behind it is one
        return f"an animation or a stack of {frames} pictures"
    if image.mode in ("CMYK", "LAB", "HSV"):
        return f"colours in {image.mode}, which mean nothing without their profile"
    if image.mode in ("P", "PA"):
        return "colours from a palette (every GIF has one)"
    bits = 8
    if image.format == "PNG":  # Pillow opens 16-bit RGB as RGB
        bits = encoded[24]  # the depth of IHDR: 8 bytes of signature, 8 of chunk head, 8 of size
    elif image.format == "TIFF":
        bits = max(getattr(image, "tag_v2", {}).get(258, (1,)))  # BitsPerSample
    if bits > 8 or image.mode.startswith(("I", "F")):
        return "more than 8 bits a channel"
    return ""


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
