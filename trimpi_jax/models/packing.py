"""Lay images out for the vision tower, and tokens out for M-RoPE, on the host (numpy only).

In: resized uint8 images, token ids. Out: the window-major arrays and positions of `types.Batch`.
Everything that depends on the size of an image is decided here, so the device sees dense arrays,
one gather into the text embeddings, and one shape per bucket.

An image of 4 x 6 patches, merge 2, windows of 2 x 2 merged cells; a letter is a merged cell
(four patches), a dot an empty slot:

    image      a b | c        windows    a b d e     slots of the merged stream, in the row-major
               d e | f                   c f . .     order of the language model:
                                                     a b c d e f -> 0 1 4 2 3 5

Source: Qwen2.5-VL (arXiv:2502.13923); the row order of transformers' `image_processing_qwen2_vl`,
the windows of its `get_window_index`, the positions of its `get_rope_index`.
Next: trimpi_jax/models/vision.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trimpi_jax.models.config import VisionConfig


class PackedImages(NamedTuple):
    """The images of one row, window after window. W windows of P patch slots; M = W * P / 4."""

    patches: np.ndarray  # uint8 [W, P, C * patch * patch], channels first inside a row
    patch_hw: np.ndarray  # int32 [W, P, 2], patch coordinates (row, column) inside its image
    patch_segment: np.ndarray  # int32 [W, P], 0 = empty slot, i = i-th image (from 1)
    slots: list[np.ndarray]  # per image int32 [M_i]: slot of each visual token, row-major order
    grids: list[tuple[int, int, int]]  # per image (1, rows, columns) in patches


def pack_images(images: Sequence[np.ndarray], config: VisionConfig) -> PackedImages:
    """Cut images into patches and lay them out window-major.

    Args:
      images: uint8 [Y, X, C] each, sides already multiples of `patch_size * merge_size` pixels.
      config: patch_size and window_size in pixels, merge_size in patches.

    Returns:
      PackedImages; with no image every array has W = 0.

    Raises:
      ValueError: naming every image of a wrong type, rank, channel count or side.
    """
    _check(images, config)
    patch, merge, slots_per_window = config.patch_size, config.merge_size, config.window_patches
    row_width = config.channels * patch * patch
    patches = [np.zeros((0, slots_per_window, row_width), np.uint8)]
    patch_hw = [np.zeros((0, slots_per_window, 2), np.int32)]
    segments = [np.zeros((0, slots_per_window), np.int32)]
    slots, grids, windows_so_far = [], [], 0
    for number, image in enumerate(images, start=1):
        height, width = image.shape[0] // patch, image.shape[1] // patch
        window, inside, count = _window_slots(height // merge, width // merge, config.window_cells)
        cells_per_window = config.window_cells**2

        # [Y X C] -> [cell row, row in cell, ph, cell column, column in cell, pw, C]
        cut = image.reshape(height // merge, merge, patch, width // merge, merge, patch, -1)
        # -> [cell row, cell column, row in cell, column in cell, C, ph, pw] -> [M, 4, C ph pw]
        rows = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, merge * merge, row_width)
        row_of, column_of = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        coordinates = np.stack([row_of, column_of], axis=-1).astype(np.int32)
        coordinates = coordinates.reshape(height // merge, merge, width // merge, merge, 2)
        coordinates = coordinates.transpose(0, 2, 1, 3, 4).reshape(-1, merge * merge, 2)

        packed = np.zeros((count, cells_per_window, merge * merge, row_width), np.uint8)
        packed_hw = np.zeros((count, cells_per_window, merge * merge, 2), np.int32)
        segment = np.zeros((count, cells_per_window, merge * merge), np.int32)
        packed[window, inside] = rows
        packed_hw[window, inside] = coordinates
        segment[window, inside] = number
        patches.append(packed.reshape(count, slots_per_window, row_width))
        patch_hw.append(packed_hw.reshape(count, slots_per_window, 2))
        segments.append(segment.reshape(count, slots_per_window))
        slots.append(((windows_so_far + window) * cells_per_window + inside).astype(np.int32))
        grids.append((1, height, width))
        windows_so_far += count
    return PackedImages(
        patches=np.concatenate(patches),
        patch_hw=np.concatenate(patch_hw),
        patch_segment=np.concatenate(segments),
        slots=slots,
        grids=grids,
    )


def count_windows(height_px: int, width_px: int, config: VisionConfig) -> int:
    """Windows of one image whose sides are multiples of `patch_size * merge_size` pixels."""
    cell = config.patch_size * config.merge_size
    side = config.window_cells
    return -(-(height_px // cell) // side) * -(-(width_px // cell) // side)


def mrope_positions(
    tokens: np.ndarray,
    grids: Sequence[tuple[int, int, int]],
    image_token_id: int,
    merge_size: int,
) -> tuple[np.ndarray, int]:
    """Three-axis positions of a row, and what to add to its length for the next text token.

        tokens   a  b  <image of 2 x 3 cells>  c
        T        0  1  2 2 2 2 2 2             5        an image starts at the running position,
        H        0  1  2 2 2 3 3 3             5        its cells count rows and columns from there,
        W        0  1  2 3 4 2 3 4             5        text goes on max(2, 3) later

    Args:
      tokens: int [T], the real tokens of one row; an image is `h * w / merge_size^2` consecutive
        `image_token_id`.
      grids: (t, h, w) in patches for each image, in order; t = 1.
      image_token_id: the placeholder.
      merge_size: patches per side of a merged cell.

    Returns:
      (positions int32 [3, T], delta): the next text token stands at `T + delta` on all axes.

    Raises:
      ValueError: placeholders and grids do not match.
    """
    tokens = np.asarray(tokens)
    is_image = tokens == image_token_id
    cells = [t * (h // merge_size) * (w // merge_size) for t, h, w in grids]
    if int(is_image.sum()) != sum(cells):
        raise ValueError(
            f"The row has {int(is_image.sum())} image tokens (id {image_token_id}), but its "
            f"{len(cells)} images need {cells}, together {sum(cells)}. Repeat the placeholder "
            "once per merged cell, and never cut a row inside an image."
        )
    positions = np.zeros((3, tokens.size), np.int32)
    start, current = 0, 0
    for (t, h, w), count in zip(grids, cells, strict=True):
        image_start = start + int(np.argmax(is_image[start:]))
        if not is_image[image_start : image_start + count].all():
            raise ValueError(
                f"The image at token {image_start} needs {count} consecutive image tokens for "
                f"its grid {(t, h, w)}, but text comes between them."
            )
        text = image_start - start
        positions[:, start:image_start] = current + np.arange(text)[None]
        current += text
        shape = (t, h // merge_size, w // merge_size)
        positions[:, image_start : image_start + count] = current + np.indices(shape).reshape(3, -1)
        current += max(h, w) // merge_size
        start = image_start + count
    positions[:, start:] = current + np.arange(tokens.size - start)[None]
    delta = int(positions.max()) + 1 - tokens.size if tokens.size else 0
    return positions, delta


def _window_slots(rows: int, columns: int, side: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Window and rank inside it of every merged cell in row-major order, and the window count.

    Windows of side x side cells tile the image from its top left corner; those at the right and
    bottom edge may be short, and their cells still stand first in the window.
    """
    row, column = np.indices((rows, columns)).reshape(2, -1)
    windows_across = -(-columns // side)
    window = (row // side) * windows_across + column // side
    width_here = np.minimum(side, columns - (column // side) * side)
    inside = (row % side) * width_here + column % side
    return window, inside, -(-rows // side) * windows_across


def _check(images: Sequence[np.ndarray], config: VisionConfig) -> None:
    factor = config.patch_size * config.merge_size
    wrong = [
        f"image {i}: {image.dtype} {tuple(image.shape)}"
        for i, image in enumerate(images)
        if image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != config.channels
        or 0 in image.shape
        or image.shape[0] % factor
        or image.shape[1] % factor
    ]
    if wrong:
        raise ValueError(
            f"Images must be uint8 [Y, X, {config.channels}] with both sides multiples of "
            f"{factor} pixels (patch_size {config.patch_size} x merge_size {config.merge_size}); "
            "got " + "; ".join(wrong) + ". Resize them first."
        )
