"""PolicyRollout's two views of a prompt, and the training rows of its joint group.

    policy-free    system: default       user: image, query     -> G rollouts (2G without PoRo)
    policy-aware   system: the policy    user: image, query     -> G rollouts
    training       the policy-free prompt followed by each of the 2G completions

Source: paper section 4 (PolicyRollout).
Next: trimpi_jax/grading/answers.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.example import Example
from trimpi_jax.inputs.batching import choose_bucket, make_batch
from trimpi_jax.inputs.encode import EncodedRow, encode_prompt
from trimpi_jax.models.processor import Processor
from trimpi_jax.types import Batch

VIEWS = ("policy_free", "policy_aware")


def fits(
    example: Example,
    processor: Processor,
    *,
    with_policy: bool,
    token_buckets: Sequence[int],
    windows: int,
) -> bool:
    """Whether every view of a prompt that will be sampled from fits the largest bucket."""
    rows = [
        encode_prompt(example, processor, policy_in_prompt=aware)
        for aware in ((False, True) if with_policy else (False,))
    ]
    return all(
        len(row.tokens) <= max(token_buckets) and len(row.images.patches) <= windows for row in rows
    )


class View(NamedTuple):
    """One view of Q prompts: encoded rows and the batch made of them."""

    rows: list[EncodedRow]
    batch: Batch


def make_view(
    examples: Sequence[Example],
    processor: Processor,
    *,
    policy_in_prompt: bool,
    token_buckets: Sequence[int],
    windows: int,
    num_rows: int | None = None,
) -> View:
    """Prompts of one view in the smallest bucket that holds them all.

    Raises:
        ValueError: naming the examples that fit no bucket (nothing is cut).
    """
    rows = [
        encode_prompt(example, processor, policy_in_prompt=policy_in_prompt) for example in examples
    ]
    too_long = [
        f"{example.example_id}: {len(row.tokens)} tokens, {len(row.images.patches)} windows"
        for example, row in zip(examples, rows, strict=True)
        if len(row.tokens) > max(token_buckets) or len(row.images.patches) > windows
    ]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts fit no bucket of {sorted(token_buckets)} tokens and"
            f" {windows} windows (nothing is cut): {too_long[:4]}. Add a larger bucket."
        )
    longest = max(len(row.tokens) for row in rows)
    batch = make_batch(
        rows,
        num_rows=num_rows or len(rows),
        num_tokens=choose_bucket(longest, token_buckets),
        num_windows=windows,
    )
    return View(rows, batch)


def make_training_rows(
    free: View, tokens: np.ndarray, lengths: np.ndarray, token_buckets: Sequence[int]
) -> Batch:
    """The policy-free prompts continued by their completions, as a Batch of Q * R rows.

    The rows carry no patches (W = 0): the images are encoded once per prompt and their visual
    tokens repeated for the R rollouts, in the same order (row q * R + i).

    Args:
        free: the policy-free view of Q prompts.
        tokens: int32 [Q, R, S] completions.
        lengths: int32 [Q, R].
        token_buckets: allowed row lengths.
    """
    num_prompts, rollouts = lengths.shape
    longest = max(
        len(row.tokens) + int(lengths[q].max(initial=0)) for q, row in enumerate(free.rows)
    )
    size = choose_bucket(longest, token_buckets)
    rows = num_prompts * rollouts
    slots, patch_bytes = free.batch.patches.shape[2:]
    batch = Batch(
        tokens=np.zeros((rows, size), np.int32),
        loss_mask=np.zeros((rows, size), bool),
        lengths=np.ones((rows,), np.int32),
        positions=np.zeros((rows, 3, size), np.int32),
        rope_delta=np.zeros((rows,), np.int32),
        visual_index=np.full((rows, size), -1, np.int32),
        patches=np.zeros((rows, 0, slots, patch_bytes), np.uint8),
        patch_hw=np.zeros((rows, 0, slots, 2), np.int32),
        patch_segment=np.zeros((rows, 0, slots), np.int32),
        valid=np.zeros((rows,), bool),
    )
    for q, row in enumerate(free.rows):
        prompt = len(row.tokens)
        for i in range(rollouts):
            at, count = q * rollouts + i, int(lengths[q, i])
            batch.tokens[at, :prompt] = row.tokens
            batch.tokens[at, prompt : prompt + count] = tokens[q, i, :count]
            batch.loss_mask[at, prompt : prompt + count] = True
            batch.lengths[at] = prompt + count
            batch.positions[at, :, :prompt] = row.positions
            following = prompt + row.rope_delta + np.arange(count, dtype=np.int32)
            batch.positions[at, :, prompt : prompt + count] = following[None]
            batch.rope_delta[at] = row.rope_delta
            batch.visual_index[at, :prompt] = row.visual_index
            batch.valid[at] = True
    return batch
