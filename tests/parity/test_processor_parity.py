"""Images from file size to pixel rows: what transformers' PIL processor makes of them, to 1e-6."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.tiny_model import load_tiny_processor
from trimpi_jax.models.config import VisionConfig
from trimpi_jax.models.packing import pack_images
from trimpi_jax.models.processor import encode_prompt_tokens, resize_image, smart_resize
from trimpi_jax.models.vision import normalise_pixels

pytest.importorskip("torch")
reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

VISION = VisionConfig(depth=1, width=64, heads=4, full_attention_blocks=())
LIMITS = [(56 * 56, 28 * 28 * 1280), (4 * 28 * 28, 100_000), (200_000, 300_000)]
NORMALISE = jax.jit(normalise_pixels, static_argnums=1)


def odd_sizes():
    """Sides from 1 px: primes, halves of a cell, thin strips, one multiple of the cell."""
    rng = np.random.default_rng(0)
    drawn = [tuple(int(side) for side in pair) for pair in rng.integers(20, 700, (24, 2))]
    strips = [(1, 150), (3, 599), (601, 4), (13, 1300), (10, 2000)]
    return [*drawn, *strips, (42, 70), (98, 126), (1, 1), (29, 29), (280, 308), (320, 480)]


@pytest.mark.parametrize("limits", LIMITS)
def test_pixel_rows(limits):
    processor = dataclasses.replace(
        load_tiny_processor(), vision=VISION, min_pixels=limits[0], max_pixels=limits[1]
    )
    theirs = reference.Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits[0], "longest_edge": limits[1]}
    )
    rng = np.random.default_rng(1)
    for height, width in odd_sizes():
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(images=[image], return_tensors="np", input_data_format="channels_last")
        resized = resize_image(image, processor)
        packed = pack_images([resized], VISION)
        assert packed.grids == [tuple(expected["image_grid_thw"][0])], (height, width)
        rows = packed.patches.reshape(-1, 4, 588)[packed.slots[0]].reshape(-1, 588)
        bucket = -len(rows) % 1024  # few shapes to compile
        ours = np.asarray(NORMALISE(np.pad(rows, ((0, bucket), (0, 0))), VISION))[: len(rows)]
        frames = expected["pixel_values"].reshape(-1, 3, 2, 196)
        for frame in (0, 1):
            np.testing.assert_allclose(
                ours.reshape(-1, 3, 196), frames[:, :, frame], atol=1e-6, rtol=0
            )
        messages = [{"role": "user", "content": [{"type": "image"}]}]
        tokens = encode_prompt_tokens(processor, messages, [resized.shape[:2]])
        assert (tokens == processor.image_token_id).sum() == len(rows) // 4


def test_sizes_of_all_shapes():
    """4,000 sizes; the reference refuses the same ones."""
    rng = np.random.default_rng(2)
    sides = np.exp(rng.uniform(0, np.log(6000), (4000, 2))).astype(int)
    refused = 0
    for height, width in sides.tolist():
        for low, high in LIMITS:
            try:
                expected = reference.smart_resize(height, width, 28, low, high)
            except ValueError:
                refused += 1
                with pytest.raises(ValueError, match="aspect ratio"):
                    smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
                continue
            ours = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert ours == expected, (height, width, low, high)
    assert refused > 100
