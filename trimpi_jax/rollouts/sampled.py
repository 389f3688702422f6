"""Joint groups on the host: what was sampled and graded, kept, saved, and laid out for training.

A group is one prompt with its R = 2G rollouts, policy-free ones first. Groups wait here between
sampling and the update; those that wait for the next step (dynamic sampling draws more than it
needs) travel in the checkpoint, so that a killed run takes the identical next step.

Source: paper section 4 (PolicyRollout, dynamic sampling).
Next: trimpi_jax/objectives/advantages.py
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from data_pipelines.example import Example, decode_record, encode_record
from trimpi_jax.inputs.batching import Agree, choose_bucket
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models.processor import Processor
from trimpi_jax.rollouts.groups import PromptSizes, plain_view
from trimpi_jax.types import GroupBatch

SPREAD = 1e-6  # rewards of a group that differ by less are equal


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt's joint group. S is the length limit of the run."""

    example: Example
    tokens: np.ndarray  # int32 [R, S]
    lengths: np.ndarray  # int32 [R]
    stopped: np.ndarray  # bool [R]
    sampled_logprobs: np.ndarray  # float32 [R, S]
    rewards: np.ndarray  # float32 [R], with every penalty
    # float32 [R, S] under the policy-free prompt, by the actor that sampled; None = not aged yet
    behavior_logprobs: np.ndarray | None = None
    order: int = 0  # its place among the groups of all processes that wait for the next step

    @property
    def has_spread(self) -> bool:
        """Whether the group teaches anything: its rewards are not all equal."""
        return bool(np.ptp(self.rewards) > SPREAD)


def make_group_batch(
    groups: Sequence[Group],
    processor: Processor,
    sizes: PromptSizes,
    completion_buckets: Sequence[int],
    num_groups: int,
    agree: Agree = list,
) -> GroupBatch:
    """Groups as arrays of `num_groups` rows, the missing ones invalid.

    Args:
        groups: of this process, possibly none.
        processor: of the model.
        sizes: shapes that prompts may take.
        completion_buckets: and completions.
        num_groups: of this process's part of the batch.
        agree: where several processes make a batch together, see `fill_batch`.

    Raises:
        ValueError: a completion holds a visual token, which no image belongs to.
    """
    rows = [encode_prompt(group.example, processor, policy_in_prompt=False) for group in groups]
    prompts = plain_view(rows, sizes, num_groups, agree).batch
    longest = max((int(group.lengths.max()) for group in groups), default=0)
    rollouts = max((len(group.tokens) for group in groups), default=0)
    size, rollouts = agree([choose_bucket(longest, completion_buckets), rollouts])
    batch = GroupBatch(
        prompts=prompts,
        completions=np.zeros((num_groups, rollouts, size), np.int32),
        lengths=np.zeros((num_groups, rollouts), np.int32),
        rewards=np.zeros((num_groups, rollouts), np.float32),
        sampled_logprobs=np.zeros((num_groups, rollouts, size), np.float32),
    )
    for i, group in enumerate(groups):
        said = np.arange(group.tokens.shape[1])[None] < group.lengths[:, None]
        if (said & (group.tokens == processor.image_token_id)).any():
            raise ValueError(
                f"a completion of {group.example.example_id} holds an image token; the sampler"
                " never draws one, so these rollouts come from elsewhere"
            )
        batch.completions[i] = group.tokens[:, :size]
        batch.lengths[i] = group.lengths
        batch.rewards[i] = group.rewards
        batch.sampled_logprobs[i] = group.sampled_logprobs[:, :size]
    return batch


def deal_groups(owners: Sequence[int], shares: int, room: int) -> list[int]:
    """The share that trains on each of the groups of an update; as few as can be change theirs.

        owners 0 0 0 1, two shares with room for two each    ->    0 0 1 1

    Args:
        owners: the share that has sampled each group.
        shares: how many there are.
        room: groups of an update that a share has rows for; owners are at most shares * room.
    """
    left, dealt = [room] * shares, list(owners)
    for i, owner in enumerate(owners):
        left[owner] -= 1
        if left[owner] < 0:
            dealt[i] = -1
    left = [max(number, 0) for number in left]
    for i, owner in enumerate(dealt):
        if owner < 0:
            dealt[i] = left.index(max(left))
            left[dealt[i]] -= 1
    return dealt


def behavior_of(groups: Sequence[Group], shape: tuple[int, ...]) -> np.ndarray:
    """Kept behavior log-probs, float32 [Q, R, S] = shape; zeros where a group has none."""
    found = np.zeros(shape, np.float32)
    for i, group in enumerate(groups):
        if group.behavior_logprobs is not None:
            kept = group.behavior_logprobs[:, : shape[2]]
            found[i, :, : kept.shape[1]] = kept
    return found


def encode_groups(groups: Sequence[Group]) -> list[str]:
    """JSON-able: one base64 text per group, for a checkpoint."""
    return [base64.b64encode(msgpack.packb(_plain(group))).decode() for group in groups]


def decode_groups(saved: Sequence[str]) -> list[Group]:
    """Inverse of `encode_groups`."""
    return [_from_plain(msgpack.unpackb(base64.b64decode(text))) for text in saved]


_ARRAYS = ("tokens", "lengths", "stopped", "sampled_logprobs", "rewards", "behavior_logprobs")


def _plain(group: Group) -> dict[str, Any]:
    fields: dict[str, Any] = {"example": encode_record(group.example)}
    for name in _ARRAYS:
        leaf = getattr(group, name)
        if leaf is not None:
            fields[name] = (leaf.dtype.str, leaf.shape, leaf.tobytes())
    return fields


def _from_plain(fields: dict[str, Any]) -> Group:
    example = decode_record(fields.pop("example"))
    arrays: dict[str, Any] = {
        name: np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()
        for name, (dtype, shape, data) in fields.items()
    }
    return Group(example=example, **arrays)
