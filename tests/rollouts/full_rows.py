"""The plain way that trees and shared prefixes must equal: one whole row per completion."""

import numpy as np

from trimpi_jax.types import Batch


def full_rows(prompts, completions, lengths, size):
    """Q prompts (a Batch) and completions int32 [Q, R, S] as a Batch of Q * R rows of `size`."""
    num_prompts, rollouts = lengths.shape
    rows = num_prompts * rollouts

    def repeated(leaf):
        return np.repeat(np.asarray(leaf), rollouts, axis=0)

    room = ((0, 0), (0, size - prompts.tokens.shape[1]))
    batch = Batch(
        tokens=np.pad(repeated(prompts.tokens), room),
        loss_mask=np.zeros((rows, size), bool),
        lengths=repeated(prompts.lengths),
        positions=np.pad(repeated(prompts.positions), (room[0], (0, 0), room[1])),
        rope_delta=repeated(prompts.rope_delta),
        visual_index=np.pad(repeated(prompts.visual_index), room, constant_values=-1),
        patches=repeated(prompts.patches),
        patch_hw=repeated(prompts.patch_hw),
        patch_segment=repeated(prompts.patch_segment),
        valid=repeated(prompts.valid),
    )
    for at in range(rows):
        count, prompt = int(lengths[at // rollouts, at % rollouts]), int(batch.lengths[at])
        batch.tokens[at, prompt : prompt + count] = completions[
            at // rollouts, at % rollouts, :count
        ]
        batch.loss_mask[at, prompt : prompt + count] = True
        following = prompt + batch.rope_delta[at] + np.arange(count, dtype=np.int32)
        batch.positions[at, :, prompt : prompt + count] = following[None]
        batch.lengths[at] = prompt + count
    return batch


def completion_logprobs(logits, rows, lengths, steps):
    """float32 [Q, R, S] of the completions in full rows, from log-softmaxed logits [B, T, V]."""
    found = np.zeros((*lengths.shape, steps), np.float32)
    chosen = np.take_along_axis(np.asarray(logits)[:, :-1], rows.tokens[:, 1:, None], axis=-1)[
        ..., 0
    ]
    for at in range(lengths.size):
        q, r = divmod(at, lengths.shape[1])
        found[q, r, : lengths[q, r]] = chosen[at][rows.loss_mask[at, 1:]]
    return found
