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


def pack_rows(rows: Sequence[EncodedRow], max_tokens: int, max_windows: int) -> list[EncodedRow]:
    """Rows that hold all given ones, of at most `max_tokens` tokens and `max_windows` windows.

    Longest first, each into the first packed row with room; equal lengths keep their order.

    Raises:
        ValueError: a row is larger than a packed row.
    """
    bins: list[list[EncodedRow]] = []
    room: list[tuple[int, int]] = []  # tokens, windows
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        tokens, windows = len(row.tokens), len(row.images.patches)
        if tokens > max_tokens or windows > max_windows:
            raise ValueError(
                f"a row of {tokens} tokens and {windows} windows does not fit packed rows of"
                f" {max_tokens} tokens and {max_windows} windows"
            )
        places = (i for i, (t, w) in enumerate(room) if t >= tokens and w >= windows)
        place = next(places, len(bins))
        if place == len(bins):
            bins.append([])
            room.append((max_tokens, max_windows))
        bins[place].append(row)
        room[place] = (room[place][0] - tokens, room[place][1] - windows)
    return [_join(parts) for parts in bins]


def row_counts(most: int, multiple: int) -> tuple[int, ...]:
    """How many packed rows a batch may have: `most`, halved while it divides by `multiple`.

    Few counts mean few compiled programs.
    """
    counts = [most]
    while counts[0] % 2 == 0 and (counts[0] // 2) % multiple == 0:
        counts.insert(0, counts[0] // 2)
    return tuple(counts)


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
