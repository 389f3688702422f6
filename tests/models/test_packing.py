"""Window-major packing and M-RoPE positions on layouts small enough to read."""

import numpy as np
import pytest

from trimpi_jax.models.config import VisionConfig
from trimpi_jax.models.packing import mrope_positions, pack_images

# windows of 2 x 2 merged cells
CONFIG = VisionConfig(depth=1, width=64, heads=4, window_size=56, full_attention_blocks=())


def test_the_picture_of_the_docstring():
    image = np.zeros((4 * 14, 6 * 14, 3), np.uint8)
    packed = pack_images([image], CONFIG)
    assert packed.grids == [(1, 4, 6)]
    assert packed.patches.shape == (2, 16, 588)
    np.testing.assert_array_equal(packed.slots[0], [0, 1, 4, 2, 3, 5])
    np.testing.assert_array_equal(packed.patch_segment[0], 1)
    np.testing.assert_array_equal(packed.patch_segment[1], [1] * 8 + [0] * 8)
    # the second cell of the first window: patch columns 2 and 3 of rows 0 and 1
    np.testing.assert_array_equal(packed.patch_hw[0, 4:8], [[0, 2], [0, 3], [1, 2], [1, 3]])


def test_pixels_are_channel_first_and_in_place():
    image = np.random.default_rng(0).integers(0, 256, (84, 56, 3), dtype=np.uint8)
    packed = pack_images([image], CONFIG)
    for window, slot in zip(*np.nonzero(packed.patch_segment), strict=True):
        row, column = packed.patch_hw[window, slot] * 14
        cut = image[row : row + 14, column : column + 14].transpose(2, 0, 1)
        np.testing.assert_array_equal(packed.patches[window, slot], cut.reshape(-1))


def test_several_images_and_none():
    images = [np.full((28, 28, 3), value, np.uint8) for value in (1, 2)]
    packed = pack_images(images, CONFIG)
    assert packed.patches.shape == (2, 16, 588)
    np.testing.assert_array_equal([s.tolist() for s in packed.slots], [[0], [4]])
    np.testing.assert_array_equal(packed.patch_segment.max(axis=1), [1, 2])
    empty = pack_images([], CONFIG)
    assert empty.patches.shape == (0, 16, 588)
    assert empty.slots == [] and empty.grids == []


def test_bad_images_are_listed_together():
    images = [np.zeros((28, 28, 3), np.uint8), np.zeros((30, 28, 3), np.uint8), np.zeros((28, 28))]
    with pytest.raises(ValueError, match=r"28 pixels.*image 1.*30.*image 2: float64"):
        pack_images(images, CONFIG)


def test_positions_of_the_docstring():
    positions, delta = mrope_positions(np.array([1, 2] + [9] * 6 + [3]), [(1, 4, 6)], 9, 2)
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5],
            [0, 1, 2, 2, 2, 3, 3, 3, 5],
            [0, 1, 2, 3, 4, 2, 3, 4, 5],
        ],
    )
    assert delta == 6 - 9


def test_positions_of_text():
    positions, delta = mrope_positions(np.arange(4), [], 9, 2)
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3]] * 3)
    assert delta == 0
    positions, delta = mrope_positions(np.zeros(0, np.int32), [], 9, 2)
    assert positions.shape == (3, 0) and delta == 0


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([9, 9, 9], [(1, 4, 4)], "3 image tokens.*together 4"),
        ([9], [], "1 image tokens.*together 0"),
        ([9, 9, 1, 9, 9], [(1, 4, 4)], "text comes between"),
    ],
)
def test_placeholders_must_match(tokens, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(np.array(tokens), grids, 9, 2)
