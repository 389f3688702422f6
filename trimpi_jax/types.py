"""The axis letters, and the structs that cross floors.

Letters (one meaning each, in every docstring and every einsum of the project):

    B rows           T query positions   S key positions     D width         F MLP width
    N query heads    K key/value heads   H head width        L layers        V vocabulary
    Q prompts        G rollouts a view   W vision windows    P patch slots   M visual tokens
    Y X C pixels     U patches of an image before merging

`policy` is the document to be internalized, never the network. The network being trained is the
*actor*; rollouts come from the *behavior* actor; the KL anchor is the *reference*.

Next: trimpi_jax/sharding.py
"""

from __future__ import annotations

from typing import Any

import flax.struct

Array = Any  # np.ndarray on the host, jax.Array once placed; dtype and axes stand at each field


@flax.struct.dataclass
class Batch:
    """Rows ready for the device. Every leaf leads with B; every shape is made on the host.

    Images arrive window-major: a row's patches are laid out window after window, `P` slots each,
    and inside a window merged cell after merged cell (four consecutive slots are one 2x2 cell), so
    that the merged visual stream of a row has `M = W * P / 4` tokens in slot order.
    """

    tokens: Array  # int32 [B, T], right-padded with 0
    loss_mask: Array  # bool [B, T], True = this token counts as a target (predicted from T - 1)
    lengths: Array  # int32 [B], real tokens of the row; masks come from here, never from a pad id
    positions: Array  # int32 [B, 3, T], M-RoPE (temporal, height, width)
    rope_delta: Array  # int32 [B], position of the next text token = lengths + rope_delta
    visual_index: Array  # int32 [B, T], slot in the row's merged visual stream, -1 = a text token
    patches: Array  # uint8 [B, W, P, C * patch * patch], one frame of a still image
    patch_hw: Array  # int32 [B, W, P, 2], patch coordinates (row, column) inside the image
    patch_segment: Array  # int32 [B, W, P], 0 = empty slot, i = i-th image of the row (from 1)
    valid: Array  # bool [B], True = a real row, False = padding of the batch
    segments: Array = None  # int32 [B, T], 0 = padding, i = i-th example of a packed row; or absent


@flax.struct.dataclass
class Rollouts:
    """Sampled completions of Q prompts, G each.

    `tokens[q, g, :lengths[q, g]]` is the completion with its stop token, when it has one.
    """

    tokens: Array  # int32 [Q, G, S], 0 after the end
    logprobs: Array  # float32 [Q, G, S], nats under the distribution sampled from; 0 after the end
    lengths: Array  # int32 [Q, G]
    stopped: Array  # bool [Q, G], True = ended with a stop token, False = cut off at S


@flax.struct.dataclass
class GroupBatch:
    """Joint groups of Q prompts, ready to be trained on: R = 2G rollouts, policy-free ones first.

    `prompts.valid` is False for a group that only fills the batch.
    """

    prompts: Batch  # Q policy-free prompts with their images
    completions: Array  # int32 [Q, R, S]
    lengths: Array  # int32 [Q, R], tokens of the completions, the stop token included
    rewards: Array  # float32 [Q, R]
    sampled_logprobs: Array  # float32 [Q, R, S], as the sampler drew them, in their own view
