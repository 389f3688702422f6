"""Records round-trip; images become RGB or one clear error that names them."""

import io
import struct
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.example import (
    MAX_IMAGE_PIXELS,
    Example,
    decode_image,
    decode_record,
    encode_png,
    encode_record,
)

JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
EXAMPLES = st.builds(
    Example,
    example_id=st.text(),
    images=st.lists(st.binary(), max_size=3).map(tuple),
    query=st.text(),
    answer=st.text(),
    cot=st.text(),
    policy_name=st.text(),
    policy_text=st.text(),
    policy_images=st.lists(st.binary(), max_size=2).map(tuple),
    meta=st.dictionaries(st.text(max_size=4), JSON_LIKE, max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(EXAMPLES)
def test_a_record_brings_back_its_example(example):
    assert decode_record(encode_record(example)) == example


def test_equal_examples_give_equal_bytes_whatever_the_order_of_their_maps():
    one = Example("a", (b"x",), "q", "y", meta={"depth": 2, "tree": {"case": 1, "at": [0]}})
    two = Example("a", (b"x",), "q", "y", meta={"tree": {"at": [0], "case": 1}, "depth": 2})
    assert encode_record(one) == encode_record(two)
    assert encode_record(one) != encode_record(Example("b", (b"x",), "q", "y", meta=one.meta))


def _fields(**changes):
    fields = msgpack.unpackb(encode_record(Example("a", (b"x",), "q", "y")))
    return msgpack.packb({**fields, **changes})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "not an Example record"),
        (b"\xc1 no such type", "not an Example record"),
        (encode_record(Example("a", (b"x",), "q", "y"))[:-3], "not an Example record"),
        (msgpack.packb([1, 2]), "found list"),
        (msgpack.packb({"example_id": "a"}), "found .'example_id'."),
        (_fields(extra=1), "'extra'"),
        (_fields(images=3), r"other types in \['images'\]"),
        (_fields(images=["text"]), r"other types in \['images'\]"),
        (_fields(example_id=7, meta=[]), r"other types in \['example_id', 'meta'\]"),
        (_fields(**{"query": b"bytes"}), r"other types in \['query'\]"),
    ],
)
def test_a_bad_record_is_a_value_error_that_says_why(record, message):
    with pytest.raises(ValueError, match=message):
        decode_record(record)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_are_never_an_example(record):
    with pytest.raises(ValueError, match="Example record"):
        decode_record(record)


def _saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def test_png_round_trip_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_png(pixels)), pixels)


def test_transparency_is_laid_on_white():
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    # alpha 51/255 = 0.2: black over white gives 0.8 * 255 = 204
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert decode_image(_saved(Image.fromarray(rgba))).tolist() == expected
    grey_alpha = np.array([[[10, 255], [10, 0]]], np.uint8)
    expected = [[[10, 10, 10], [255, 255, 255]]]
    assert decode_image(_saved(Image.fromarray(grey_alpha, "LA"))).tolist() == expected


def _png_file(width: int, height: int, *, depth: int, rows: bytes) -> bytes:
    """A PNG in RGB as it lies in a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds three bytes of it."""
    return _png_file(width, height, depth=8, rows=b"\0\0\0")


def _paletted() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 200, 100, 50, 1, 2, 3])
    image.putdata([1, 2, 0])
    return image


def _rgb_of_16_bits() -> bytes:
    """A PNG that Pillow opens as plain RGB, dropping a half of its bits."""
    rows = b"".join(b"\0" + bytes(range(24)) for _ in range(4))  # 4 pixels of 3 x 2 bytes a row
    return _png_file(4, 4, depth=16, rows=rows)


def _frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 3), (90 * i, 0, 0)) for i in range(count)]


def _animated(form: str) -> bytes:
    first, *others = _frames(3)
    return _saved(first, form, save_all=True, append_images=others)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (_saved(_paletted()), "colours from a palette"),
        (_saved(_paletted(), transparency=2), "colours from a palette"),
        (_saved(_frames(1)[0], "GIF"), "colours from a palette"),
        (_saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"), "colours in CMYK"),
        (_saved(Image.new("CMYK", (8, 8)), "TIFF"), "colours in CMYK"),
        (_saved(Image.fromarray(np.array([[0, 65535]], np.uint16))), "more than 8 bits"),
        (_saved(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF"), "more than 8 bits"),
        (_rgb_of_16_bits(), "more than 8 bits"),
        (_animated("GIF"), "an animation or a stack of 3 pictures"),
        (_animated("PNG"), "an animation or a stack of 3 pictures"),
        (_animated("WEBP"), "an animation or a stack of 3 pictures"),
        (_animated("TIFF"), "an animation or a stack of 3 pictures"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(encoded, message):
    with pytest.raises(ValueError, match=f"example 5, image 2: {message}.*8-bit RGB PNG or JPEG"):
        decode_image(encoded, "example 5, image 2")


def test_a_photo_with_a_preview_behind_it_is_read():
    first, *others = _frames(2)
    encoded = _saved(first, "MPO", save_all=True, append_images=others)
    assert decode_image(encoded).shape == (3, 4, 3)


def test_one_bit_and_grey_images_become_rgb():
    bits = Image.fromarray(np.array([[True, False]]))
    assert decode_image(_saved(bits)).tolist() == [[[255, 255, 255], [0, 0, 0]]]
    grey = Image.fromarray(np.array([[7, 200]], np.uint8))
    assert decode_image(_saved(grey)).tolist() == [[[7, 7, 7], [200, 200, 200]]]


def test_a_decompression_bomb_is_refused_before_decoding():
    with pytest.raises(ValueError, match="example 7"):
        decode_image(_png_header(50_000, 50_000), "example 7")
    assert MAX_IMAGE_PIXELS < 8000 * 6000  # below Pillow's own limit, above ours
    with pytest.raises(ValueError, match="8000x6000 pixels are more than the limit"):
        decode_image(_png_header(8000, 6000), "example 8")
    with pytest.raises(ValueError, match=r"example 9: .*pixels"):  # 200 megapixels
        decode_image(_png_header(20_000, 10_000), "example 9")


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_named(encoded):
    with pytest.raises(ValueError, match=rf"example 3: {len(encoded)} bytes that are no readable"):
        decode_image(encoded, "example 3")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "WEBP"])
def test_a_truncated_image_is_an_error_not_a_grey_half(form):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = _saved(Image.fromarray(pixels), form)
    assert decode_image(whole).shape == (40, 40, 3)
    with pytest.raises(ValueError, match="no readable image"):
        decode_image(whole[: len(whole) // 2])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_give_an_image_or_a_value_error(changes):
    damaged = bytearray(encode_png(np.full((6, 6, 3), 90, np.uint8)))
    for at, value in changes:
        damaged[at % len(damaged)] = value
    try:
        pixels = decode_image(bytes(damaged))
    except ValueError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3


def test_a_photo_is_turned_as_its_exif_says():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255  # left half white
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # "turn 90 degrees clockwise to see it upright"
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    turned = decode_image(buffer.getvalue())
    assert turned.shape == (40, 20, 3)
    assert turned[:20].min() == 255 and turned[20:].max() == 0  # white is now on top


def test_formats_that_run_programs_are_not_tried():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(ValueError, match="no readable image"):
        decode_image(eps)
