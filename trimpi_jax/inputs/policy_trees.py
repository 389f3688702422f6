"""Several questions about one policy as one row: the policy once, then the questions as branches.

    row   P P P P P | v v q q a a e | v v q q a e | ...   P policy, v picture, q question, a answer
    a branch sees   the policy and itself, never another branch

Equal to one row a question, for a fraction of the work: a policy is far longer than a question.
Branches have pictures of their own, which is what sets these rows apart from the groups of RL.

Next: trimpi_jax/stages/nano_reading.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np

from data_pipelines.example import Example, completion_text
from trimpi_jax.inputs.encode import chat_messages
from trimpi_jax.models.nano_tokenizer import DEFAULT_SYSTEM
from trimpi_jax.models.packing import mrope_positions
from trimpi_jax.models.processor import (
    Processor,
    encode_completion,
    encode_text,
    expand_image_tokens,
    render_prompt,
)
from trimpi_jax.types import Array


@flax.struct.dataclass
class TreeBatch:
    """Z policies with R questions each; every leaf leads with Z."""

    tokens: Array  # int32 [Z, P], the policy message
    positions: Array  # int32 [Z, 3, P]
    lengths: Array  # int32 [Z]
    visual_index: Array  # int32 [Z, P], slot in the row's policy pictures, -1 = text
    branch_tokens: Array  # int32 [Z, R, S]
    branch_positions: Array  # int32 [Z, 3, R, S]
    branch_visual_index: Array  # int32 [Z, R, S], slot in the branch's own picture, -1 = text
    loss_mask: Array  # bool [Z, R, S], True = a target, predicted from the token before


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Slots of a TreeBatch: Z rows, R branches, P and S tokens, and policy pictures of a row."""

    rows: int
    branches: int
    policy_tokens: int
    branch_tokens: int
    policy_pictures: int = 0


class DoesNotFit(ValueError):
    """A row is longer than the shape; the message says by how much."""


def make_tree_batch(
    rows: Sequence[Sequence[Example]],
    processor: Processor,
    shape: TreeShape,
    *,
    picture_px: tuple[int, int],
    policy_picture_px: tuple[int, int],
) -> TreeBatch:
    """Rows of questions that share a policy, or that have none.

    Args:
        rows: shape.rows lists of shape.branches Examples. The Examples of a list have equal policy
            texts; its images are counted by the marks in it, and an Example's by `images`; the
            pictures themselves are not looked at.
        processor: of the model.
        shape: slots.
        picture_px, policy_picture_px: (height, width) after resizing.

    Raises:
        DoesNotFit: naming the part that is too long.
    """
    z, r = shape.rows, shape.branches
    p, s = shape.policy_tokens, shape.branch_tokens
    batch = TreeBatch(
        tokens=np.zeros((z, p), np.int32),
        positions=np.zeros((z, 3, p), np.int32),
        lengths=np.zeros(z, np.int32),
        visual_index=np.full((z, p), -1, np.int32),
        branch_tokens=np.zeros((z, r, s), np.int32),
        branch_positions=np.zeros((z, 3, r, s), np.int32),
        branch_visual_index=np.full((z, r, s), -1, np.int32),
        loss_mask=np.zeros((z, r, s), bool),
    )
    for row, examples in enumerate(rows):
        text = _policy_message(examples[0], processor)
        tokens, positions, visual, delta = _encode(
            text, processor, policy_picture_px, examples[0].policy_text.count("<image>")
        )
        _check(len(tokens), p, "policy")
        if (visual >= 0).sum() and examples[0].policy_text.count("<image>") > shape.policy_pictures:
            raise DoesNotFit(f"{examples[0].policy_text.count('<image>')} policy pictures")
        batch.tokens[row, : len(tokens)] = tokens
        batch.positions[row, :, : len(tokens)] = positions
        batch.visual_index[row, : len(tokens)] = visual
        batch.lengths[row] = len(tokens)
        for branch, example in enumerate(examples):
            prompt = render_prompt(
                processor, chat_messages(example, policy_in_prompt=bool(example.policy_text))
            )
            assert prompt.startswith(text), "the chat template writes something before the policy"
            said = completion_text(example.cot, example.answer) if example.cot else example.answer
            answer = encode_completion(processor, said)
            asked, places, own, after = _encode(
                prompt[len(text) :], processor, picture_px, len(example.images)
            )
            used, whole = len(asked), len(asked) + len(answer)
            _check(whole, s, "question")
            start = len(tokens) + delta
            batch.branch_tokens[row, branch, :used] = asked
            batch.branch_tokens[row, branch, used:whole] = answer
            batch.branch_positions[row, :, branch, :used] = places + start
            batch.branch_positions[row, :, branch, used:whole] = (
                start + used + after + np.arange(len(answer))
            )
            batch.branch_visual_index[row, branch, :used] = own
            batch.loss_mask[row, branch, used:whole] = True
    return batch


def _policy_message(example: Example, processor: Processor) -> str:
    """The rendered system message: the policy, or the template's default."""
    if example.policy_text:
        message = chat_messages(example, policy_in_prompt=True)[0]
    else:
        message = {"role": "system", "content": [{"type": "text", "text": DEFAULT_SYSTEM}]}
    return processor.tokenizer.apply_chat_template([message], tokenize=False)


def _encode(text: str, processor: Processor, picture_px: tuple[int, int], pictures: int):
    """(tokens, positions, visual_index, what to add to a length for the next position)."""
    tokens = expand_image_tokens(processor, encode_text(processor, text), [picture_px] * pictures)
    patch = processor.vision.patch_size
    grids = [(1, picture_px[0] // patch, picture_px[1] // patch)] * pictures
    positions, delta = mrope_positions(
        tokens, grids, processor.image_token_id, processor.vision.merge_size
    )
    visual = np.full(len(tokens), -1, np.int32)
    marks = tokens == processor.image_token_id
    visual[marks] = np.arange(marks.sum())
    return tokens, positions, visual, delta


def _check(size: int, room: int, part: str) -> None:
    if size > room:
        raise DoesNotFit(f"a {part} of {size} tokens; the shape has room for {room}")
