"""PolicyRollout's two views of a prompt, as batches: host side, numpy.

    policy-free    system: default       user: image, query     -> G rollouts (2G without PoRo)
    policy-aware   system: the policy    user: image, query     -> G rollouts

A policy comes first in the policy-aware prompt, so it is read once and shared. The prompts of one
policy are laid out next to each other, in chunks of equal size behind one copy of its keys and
values; `-` is an empty row:

    prompts of policies   A B A A B A        chunks of 2    A: 0 2   A: 3 5   B: 1 4
    prompts of policies   A B A A            chunks of 2    A: 0 2   A: 3 -   B: 1 -

Source: paper section 4 (PolicyRollout).
Next: trimpi_jax/rollouts/choosing.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trimpi_jax.inputs.batching import Agree, bucket_of, choose_bucket, make_batch, slots_of
from trimpi_jax.inputs.encode import EncodedRow, PolicyPrefix
from trimpi_jax.types import Batch

VIEWS = ("policy_free", "policy_aware")
MAX_EMPTY_SHARE = 0.25  # of the rows that chunks may leave empty


@dataclasses.dataclass(frozen=True)
class PromptSizes:
    """Shapes that prompts may take: buckets of tokens, and of vision windows a row."""

    token_buckets: tuple[int, ...]
    window_buckets: tuple[int, ...]


class View(NamedTuple):
    """One view of Q prompts, ready for the sampler."""

    rows: list[EncodedRow]  # of the Q prompts, in their order; behind the policy, where it is apart
    batch: Batch
    row_of: np.ndarray  # int32 [Q], the batch row of each prompt
    policies: list[PolicyPrefix]  # documents apart from the prompts; empty = none is
    policy_of: np.ndarray  # int32 [Z], the document before each chunk of the batch


class Chunks(NamedTuple):
    """Where prompts stand behind shared policies."""

    row_of: np.ndarray  # int32 [Q]
    policy_of: np.ndarray  # int32 [Z], number of the policy of each chunk
    size: int  # rows a chunk


def plain_view(
    rows: list[EncodedRow], sizes: PromptSizes, num_rows: int, agree: Agree = list
) -> View:
    """Prompts in order, in the smallest bucket that holds them all, each with all its tokens.

    Args:
        rows: of this process, possibly none.
        sizes: allowed shapes.
        num_rows: of this process's part of the batch.
        agree: where several processes make a batch together, see `fill_batch`.
    """
    bucket = bucket_of(rows, sizes.token_buckets, sizes.window_buckets)
    tokens, windows, *slots = agree([*bucket, *slots_of(rows)])
    batch = make_batch(rows, num_rows=num_rows, num_tokens=tokens, num_windows=windows, slots=slots)
    place = np.arange(len(rows), dtype=np.int32)
    return View(rows, batch, place, [], np.zeros((0,), np.int32))


def shared_view(
    rows: list[EncodedRow],
    policies: list[PolicyPrefix],
    owners: Sequence[int],
    sizes: PromptSizes,
    num_rows: int,
    *,
    max_chunk: int,
    rows_multiple: int = 1,
    everyone: Sequence[Sequence[int]] = (),
    agree: Agree = list,
) -> View:
    """Prompts behind their policies, which stand apart and are shared; no images.

    Args:
        rows: what follows the policy, from `encode_behind_policy`.
        policies: the documents, each once; of all processes.
        owners: the number of each row's document.
        sizes: allowed shapes.
        num_rows: prompts that the layout makes room for.
        max_chunk: prompts that may share one copy of a policy while decoding.
        rows_multiple: the number of chunks must be a multiple of it (devices of the batch axes).
        everyone: the owners of every part of the batch, where several processes make it together.
        agree: the same for sizes, see `fill_batch`.
    """

    def pad(some: Sequence[int]) -> list[int]:
        return [*some, *[some[-1] if some else 0] * (num_rows - len(some))]

    chunks = plan_chunks(pad(owners), max_chunk, rows_multiple, [pad(some) for some in everyone])
    count = len(chunks.policy_of) * chunks.size
    in_order: list[EncodedRow | None] = [None] * count
    for row, place in zip(rows, chunks.row_of, strict=False):
        in_order[place] = without_images(row)  # the visual tokens are those of the free view
    longest = max((len(row.tokens) for row in rows), default=0)
    tokens, *slots = agree([choose_bucket(longest, sizes.token_buckets), *slots_of(rows)])
    batch = make_batch(in_order, num_rows=count, num_tokens=tokens, num_windows=0, slots=slots)
    return View(rows, batch, chunks.row_of[: len(rows)], policies, chunks.policy_of)


def plan_chunks(
    owners: Sequence[int],
    max_chunk: int,
    rows_multiple: int = 1,
    everyone: Sequence[Sequence[int]] = (),
) -> Chunks:
    """Lay prompts out in chunks of one policy each; the largest chunks that leave few rows empty.

    Args:
        owners: the policy number of each prompt.
        max_chunk: largest chunk; chunks are powers of two.
        rows_multiple: the number of chunks becomes a multiple of it.
        everyone: the owners of every part of a batch, all of the same length: their plans have
            chunks of the same size, and as many.
    """
    policies = np.asarray(owners, np.int32)
    limit = len(owners) * (1 + MAX_EMPTY_SHARE)

    def count_chunks(size: int) -> int:
        counts = [
            sum(-(-int(count) // size) for count in np.bincount(some))
            for some in everyone or [owners]
        ]
        return -(-max(counts) // rows_multiple) * rows_multiple

    size = 1
    while size * 2 <= min(max_chunk, len(owners)):
        size *= 2
    while size > 1 and count_chunks(size) * size > limit:
        size //= 2
    row_of = np.zeros(len(owners), np.int32)
    policy_of: list[int] = []
    for owner in np.unique(policies):
        members = np.flatnonzero(policies == owner)
        row_of[members] = len(policy_of) * size + np.arange(len(members))
        policy_of += [int(owner)] * -(-len(members) // size)
    policy_of += [policy_of[-1]] * (count_chunks(size) - len(policy_of))
    return Chunks(row_of, np.asarray(policy_of, np.int32), size)


def without_images(row: EncodedRow) -> EncodedRow:
    """The row with no patches; its `visual_index` still points into the visual tokens."""
    images = row.images
    empty = {name: getattr(images, name)[:0] for name in ("patches", "patch_hw", "patch_segment")}
    return row._replace(images=images._replace(**empty))


def fits(row: EncodedRow, sizes: PromptSizes, *, images: bool = True) -> bool:
    """Whether a row fits the largest bucket; without `images`, its tokens only."""
    windows = len(row.images.patches) if images else 0
    return len(row.tokens) <= max(sizes.token_buckets) and windows <= max(sizes.window_buckets)
