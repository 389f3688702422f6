"""Several short rows in one long row, so that fewer token slots are padding.

    rows      a a a a . . .      packed    a a a a b b c     segments  1 1 1 1 2 2 3
              b b . . . . .
              c . . . . . .

A token sees only its own segment; positions, loss masks and images are those of the single rows,
so the loss of a packed batch is the loss of the plain one.

In: encoded rows. Out: encoded rows with `segments`. First-fit decreasing: at most 11/9 of the
fewest rows, plus one (Johnson 1973).
Next: trimpi_jax/inputs/batching.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.models.packing import PackedImages

PATCHES_PER_TOKEN = 4  # of the merged visual stream: types.Batch, M = W * P / 4


def pack_rows(rows: Sequence[EncodedRow], max_tokens: int) -> list[EncodedRow]:
    """Rows of at most `max_tokens` tokens that hold all the given ones.

    Longest first, each into the first packed row with room; equal lengths keep their order.

    Raises:
        ValueError: a row is longer than `max_tokens`.
    """
    longest = max((len(row.tokens) for row in rows), default=0)
    if longest > max_tokens:
        raise ValueError(f"a row of {longest} tokens does not fit packed rows of {max_tokens}")
    bins: list[list[EncodedRow]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        size = len(row.tokens)
        place = next((i for i, free in enumerate(room) if free >= size), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[place].append(row)
        room[place] -= size
    return [_join(parts) for parts in bins]


def choose_row_count(needed: int, most: int, multiple: int) -> int:
    """`most`, halved as often as it still holds `needed` rows and divides by `multiple`.

    Few counts mean few compiled programs.

    Raises:
        ValueError: `needed` is more than `most`.
    """
    if needed > most:
        raise ValueError(f"{needed} packed rows do not fit a batch of {most}")
    while most % 2 == 0 and most // 2 >= needed and (most // 2) % multiple == 0:
        most //= 2
    return most


def _join(parts: Sequence[EncodedRow]) -> EncodedRow:
    """One row of several, with segments 1, 2, ..."""
    visual_index, patch_segment = [], []
    slots: list[np.ndarray] = []
    windows = images = 0
    for part in parts:
        offset = windows * part.images.patches.shape[1] // PATCHES_PER_TOKEN
        visual_index.append(np.where(part.visual_index >= 0, part.visual_index + offset, -1))
        segment = part.images.patch_segment
        patch_segment.append(np.where(segment > 0, segment + images, 0))
        slots += [slot + offset for slot in part.images.slots]
        windows += len(part.images.patches)
        images += len(part.images.grids)
    return EncodedRow(
        tokens=np.concatenate([part.tokens for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        positions=np.concatenate([part.positions for part in parts], axis=1),
        rope_delta=0,  # a packed row is never continued
        visual_index=np.concatenate(visual_index).astype(np.int32),
        images=PackedImages(
            patches=np.concatenate([part.images.patches for part in parts]),
            patch_hw=np.concatenate([part.images.patch_hw for part in parts]),
            patch_segment=np.concatenate(patch_segment).astype(np.int32),
            slots=slots,
            grids=[grid for part in parts for grid in part.images.grids],
        ),
        segments=np.repeat(
            np.arange(1, len(parts) + 1, dtype=np.int32), [len(part.tokens) for part in parts]
        ),
    )
