"""Encoded rows become a Batch of a static shape: few buckets, nothing cut, nothing lost silently.

A bucket is (rows, tokens, windows). A row that is longer than the largest bucket is dropped and
counted; the count is a metric. Shapes are chosen on the host before the device sees anything, so
the number of compiled programs is at most the number of buckets.

Next: trimpi_jax/objectives/cross_entropy.py
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from trimpi_jax.inputs.encode import EncodedRow
from trimpi_jax.inputs.sequence_packing import pack_rows, row_counts
from trimpi_jax.types import Batch


class Fitted(NamedTuple):
    """Rows that fit, and how many did not."""

    rows: list[EncodedRow]
    kept: list[int]  # indices of the rows that fit
    too_long: int
    longest: int  # tokens of the longest row seen


def drop_too_long(rows: Sequence[EncodedRow], max_tokens: int, max_windows: int) -> Fitted:
    """Keep the rows of at most `max_tokens` tokens and `max_windows` windows, in order."""
    kept = [
        i
        for i, row in enumerate(rows)
        if len(row.tokens) <= max_tokens and len(row.images.patches) <= max_windows
    ]
    longest = max((len(row.tokens) for row in rows), default=0)
    return Fitted([rows[i] for i in kept], kept, len(rows) - len(kept), longest)


def choose_bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        ValueError: it is larger than all of them.
    """
    for bucket in sorted(buckets):
        if size <= bucket:
            return bucket
    raise ValueError(
        f"{size} is more than the largest bucket of {sorted(buckets)}; add a larger bucket"
    )


def as_buckets(sizes: int | Sequence[int]) -> tuple[int, ...]:
    """A config's number or numbers as ascending buckets."""
    return (sizes,) if isinstance(sizes, int) else tuple(sorted(sizes))


def plan_buckets(
    sizes: Sequence[int], *, max_buckets: int = 4, worth: float = 0.05, rounded: bool = True
) -> tuple[int, ...]:
    """The few buckets that waste the least: chosen from the sizes of a dataset.

    Of all ways to choose k buckets that hold every size, the one with the fewest padded slots, by
    dynamic programming over the distinct sizes; the smallest k after which one more bucket (one
    more compiled program) would save less than `worth` of the real slots.

        sizes 10 10 10 100     k = 1: (100,) pads 270     k = 2: (16, 104) pads 22

    Args:
        sizes: tokens or windows of every row, at least one.
        max_buckets: compiled programs that are allowed.
        worth: saved slots for each real one that justify one more.
        rounded: whether buckets are sizes of `round_up`; otherwise they are sizes that occur.

    Returns:
        ascending buckets.
    """
    possible = [round_up(int(size)) if rounded else int(size) for size in sizes]
    values, counts = np.unique(possible, return_counts=True)
    real = max(int(np.sum(sizes)), 1)
    n = len(values)
    filled = np.concatenate([[0], np.cumsum(counts)])  # rows of the first i values
    # slots[j, i]: values j..i-1 all padded to value i-1
    least = np.full((max_buckets + 1, n + 1), np.inf)
    least[0, 0] = 0
    previous = np.zeros((max_buckets + 1, n + 1), int)
    plans: list[tuple[float, tuple[int, ...]]] = []
    for k in range(1, min(max_buckets, n) + 1):
        for i in range(1, n + 1):
            slots = least[k - 1, :i] + (filled[i] - filled[:i]) * values[i - 1]
            previous[k, i] = int(np.argmin(slots))
            least[k, i] = slots[previous[k, i]]
        chosen, i = [], n
        for level in range(k, 0, -1):
            chosen.append(int(values[i - 1]))
            i = int(previous[level, i])
        plans.append((float(least[k, n]), tuple(reversed(chosen))))
    for (slots, buckets), (fewer, _) in itertools.pairwise(plans):
        if slots - fewer < worth * real:
            return buckets
    return plans[-1][1]


def round_up(size: int) -> int:
    """The next size that a program is worth compiling for: multiples of 8, above 512 of 64."""
    if size <= 8:
        return max(size, 1)
    step = 8 if size <= 512 else 64
    return -(-size // step) * step


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """Which shapes the batches of a training stage may have.

    With `pack_tokens` several examples share a row of that length, and the batch has fewer rows;
    without (0) a row is one example, and its length is the smallest bucket for the longest.
    """

    rows: int  # examples a batch
    token_buckets: tuple[int, ...]
    window_buckets: tuple[int, ...]
    pack_tokens: int = 0
    pack_windows: int = 0  # vision windows of a packed row
    row_multiple: int = 1  # rows divide by it: devices times micro-batches

    def __post_init__(self):
        if not self.pack_tokens:
            if self.pack_windows:
                raise ValueError("pack_windows has no effect without pack_tokens; set both or none")
            return
        tokens, windows = max(self.token_buckets), max(self.window_buckets)
        if self.pack_tokens < tokens or self.pack_windows < windows:
            raise ValueError(
                f"packed rows of {self.pack_tokens} tokens and {self.pack_windows} windows cannot"
                f" hold every row: pack_tokens must be at least {tokens} (the largest of"
                f" row_buckets) and pack_windows at least {windows}"
            )

    def every(self) -> list[tuple[int, int, int]]:
        """All shapes (rows, tokens, windows) that `fill_batch` can make, smallest first."""
        if self.pack_tokens:
            counts = row_counts(self.rows, self.row_multiple)
            return [(count, self.pack_tokens, self.pack_windows) for count in counts]
        return [
            (self.rows, tokens, windows)
            for tokens in sorted(self.token_buckets)
            for windows in sorted(self.window_buckets)
        ]


# sizes that this process wants -> the sizes that all take: the largest of each
Agree = Callable[[Sequence[int]], Sequence[int]]


def fill_batch(rows: Sequence[EncodedRow], shapes: BatchShapes, agree: Agree = list) -> Batch:
    """A Batch of all rows in the smallest of the shapes that holds them.

    Args:
        rows: of this process, possibly none.
        shapes: of this process's part of the batch.
        agree: where several processes make a batch together: the largest shape that one needs.

    Raises:
        ValueError: none does.
    """
    if shapes.pack_tokens:
        rows = pack_rows(rows, shapes.pack_tokens, shapes.pack_windows)
        count = choose_bucket(len(rows), row_counts(shapes.rows, shapes.row_multiple))
        size = count, shapes.pack_tokens, shapes.pack_windows
    else:
        size = shapes.rows, *bucket_of(rows, shapes.token_buckets, shapes.window_buckets)
    num_rows, num_tokens, num_windows, *slots = agree([*size, *slots_of(rows)])
    return make_batch(
        rows,
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_windows=num_windows,
        slots=slots,
        packed=bool(shapes.pack_tokens),
    )


def bucket_of(
    rows: Sequence[EncodedRow], token_buckets: Sequence[int], window_buckets: Sequence[int]
) -> tuple[int, int]:
    """The smallest (tokens, windows) that hold all rows, of which there may be none."""
    return (
        choose_bucket(max((len(row.tokens) for row in rows), default=0), token_buckets),
        choose_bucket(max((len(row.images.patches) for row in rows), default=0), window_buckets),
    )


def slots_of(rows: Sequence[EncodedRow | None]) -> tuple[int, int]:
    """(patch slots a window, bytes a patch) of rows; zeros where there is none."""
    return next((row.images.patches.shape[1:3] for row in rows if row is not None), (0, 0))


def make_batch(
    rows: Sequence[EncodedRow | None],
    *,
    num_rows: int,
    num_tokens: int,
    num_windows: int,
    slots: Sequence[int] = (0, 0),
    packed: bool = False,
) -> Batch:
    """A Batch [num_rows, num_tokens] with `num_windows` vision windows a row.

    Missing rows, None or after the last, are padding with `valid` False and length 1 (so that no
    attention row is empty). The batch has `segments` when one of the rows is packed. Where there
    may be no row to ask, `slots` is the result of `slots_of`, and `packed` says so.

    Raises:
        ValueError: more rows, tokens or windows than the shape holds.
    """
    real = [row for row in rows if row is not None]
    tokens = max((len(row.tokens) for row in real), default=0)
    windows = max((len(row.images.patches) for row in real), default=0)
    if len(rows) > num_rows or tokens > num_tokens or windows > num_windows:
        raise ValueError(
            f"{len(rows)} rows of up to {tokens} tokens and {windows} windows do not fit a batch of"
            f" {num_rows} rows, {num_tokens} tokens, {num_windows} windows"
        )
    packed = packed or any(row.segments is not None for row in real)
    patches, patch_bytes = slots_of(real) if real else slots
    batch = Batch(
        tokens=np.zeros((num_rows, num_tokens), np.int32),
        loss_mask=np.zeros((num_rows, num_tokens), bool),
        lengths=np.ones((num_rows,), np.int32),
        positions=np.zeros((num_rows, 3, num_tokens), np.int32),
        rope_delta=np.zeros((num_rows,), np.int32),
        visual_index=np.full((num_rows, num_tokens), -1, np.int32),
        patches=np.zeros((num_rows, num_windows, patches, patch_bytes), np.uint8),
        patch_hw=np.zeros((num_rows, num_windows, patches, 2), np.int32),
        patch_segment=np.zeros((num_rows, num_windows, patches), np.int32),
        valid=np.zeros((num_rows,), bool),
        segments=np.zeros((num_rows, num_tokens), np.int32) if packed else None,
    )
    for i, row in enumerate(rows):
        if row is None:
            continue
        length, count = len(row.tokens), len(row.images.patches)
        batch.tokens[i, :length] = row.tokens
        batch.loss_mask[i, :length] = row.loss_mask
        batch.lengths[i] = length
        batch.positions[i, :, :length] = row.positions
        batch.rope_delta[i] = row.rope_delta
        batch.visual_index[i, :length] = row.visual_index
        batch.patches[i, :count] = row.images.patches
        batch.patch_hw[i, :count] = row.images.patch_hw
        batch.patch_segment[i, :count] = row.images.patch_segment
        batch.valid[i] = True
        if packed:
            batch.segments[i, :length] = 1 if row.segments is None else row.segments
    return batch


def padding_waste(batch: Batch) -> float:
    """Share of the token slots of a batch that hold no real token."""
    used = int(np.where(batch.valid, batch.lengths, 0).sum())
    return 1.0 - used / batch.tokens.size
