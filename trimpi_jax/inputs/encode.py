"""One Example becomes tokens, positions, packed patches and a loss mask. Host side, numpy.

    SFT        s s v v q q a a e     s system, v visual, q query, a answer, e end of message
    loss_mask  . . . . . . 1 1 1     only what the model must say
    VM-CPT     P P v v q q a a e     P policy document (its own images are v)
    loss_mask  . 1 . . 1 1 1 1 1     every text target, never a visual token (nor the first token)

A policy-aware prompt carries the policy as its system message, so it comes first and its keys and
values are the same for every question about it; a policy-free prompt has the template's default
system message.

Source: paper section 4 (the VM-CPT mask), section 2 (prompts).
Next: trimpi_jax/inputs/batching.py
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines.example import IMAGE_MARK, Example, completion_text, decode_image
from trimpi_jax.models.packing import PackedImages, mrope_positions, pack_images
from trimpi_jax.models.processor import (
    Processor,
    encode_completion,
    encode_prompt_tokens,
    encode_text,
    expand_image_tokens,
    render_prompt,
    resize_image,
)

LossOn = Literal["nothing", "completion", "text"]


class EncodedRow(NamedTuple):
    """One row before batching; T = its true length."""

    tokens: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    positions: np.ndarray  # int32 [3, T]
    rope_delta: int
    visual_index: np.ndarray  # int32 [T]
    images: PackedImages
    segments: np.ndarray | None = None  # int32 [T] from 1, in a row packed of several


def encode_prompt(example: Example, processor: Processor, *, policy_in_prompt: bool) -> EncodedRow:
    """The prompt of an Example, ready to be continued; nothing counts as a target."""
    return _encode(example, processor, policy_in_prompt, None, "nothing")


def encode_example(
    example: Example,
    processor: Processor,
    *,
    policy_in_prompt: bool,
    with_cot: bool,
    loss_on: LossOn,
) -> EncodedRow:
    """Prompt and gold completion.

    Args:
        example: the record.
        processor: of the model.
        policy_in_prompt: whether the policy document is the system message.
        with_cot: whether the completion has the chain of thought before the boxed answer.
        loss_on: "completion" for SFT, "text" for VM-CPT.

    Raises:
        ValueError: `with_cot` and the Example has none; an unreadable image.
    """
    if with_cot and not example.cot:
        raise ValueError(f"example {example.example_id} has no chain of thought; use the cot split")
    text = completion_text(example.cot if with_cot else "", example.answer)
    return encode_with_completion(
        example, processor, text, policy_in_prompt=policy_in_prompt, loss_on=loss_on
    )


def encode_with_completion(
    example: Example,
    processor: Processor,
    text: str,
    *,
    policy_in_prompt: bool,
    loss_on: LossOn,
) -> EncodedRow:
    """Prompt and a given completion text."""
    tokens = encode_completion(processor, text)
    return _encode(example, processor, policy_in_prompt, tokens, loss_on)


class PolicyPrefix(NamedTuple):
    """A policy document as it stands before every question about it."""

    key: str  # equal for equal documents
    text: str  # the rendered template up to the end of the document
    row: EncodedRow  # its tokens and images


def policy_key(example: Example) -> str:
    """A name of the policy document, text and images; "" where there is none."""
    if not example.policy_text:
        return ""
    digest = hashlib.sha256(example.policy_text.encode())
    for image in example.policy_images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()


def encode_policy_prefix(example: Example, processor: Processor) -> PolicyPrefix | None:
    """The policy message alone, or None where the prompt does not begin with it.

    Positions and tokens before the question do not depend on it, so their keys and values are the
    same for all questions about the policy. A template that writes anything else first, or merges
    tokens across the border, is found out here by encoding the whole prompt once.
    """
    policy, *_ = chat_messages(example, policy_in_prompt=True)
    text = processor.tokenizer.apply_chat_template([policy], tokenize=False)
    images = _resized(example, example.policy_images, processor)
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    tokens = expand_image_tokens(processor, encode_text(processor, text), sizes)
    packed = pack_images(images, processor.vision)
    prefix = PolicyPrefix(policy_key(example), text, _row(tokens, packed, processor))
    whole = encode_prompt(example, processor, policy_in_prompt=True)
    if not render_prompt(processor, chat_messages(example, policy_in_prompt=True)).startswith(text):
        return None
    behind = encode_behind_policy(
        example, processor, prefix, encode_prompt(example, processor, policy_in_prompt=False)
    )
    joined = np.concatenate([tokens, behind.tokens])
    return prefix if np.array_equal(joined, whole.tokens) else None


def encode_behind_policy(
    example: Example, processor: Processor, prefix: PolicyPrefix, free: EncodedRow
) -> EncodedRow:
    """What follows the policy in a policy-aware prompt, its positions going on from there.

    Args:
        example: the record.
        processor: of the model.
        prefix: of its policy, from `encode_policy_prefix`.
        free: the policy-free prompt of the same Example; its images are used again.
    """
    text = render_prompt(processor, chat_messages(example, policy_in_prompt=True))
    tokens = encode_text(processor, text[len(prefix.text) :])
    patch = processor.vision.patch_size
    sizes = [(height * patch, width * patch) for _, height, width in free.images.grids]
    row = _row(expand_image_tokens(processor, tokens, sizes), free.images, processor)
    offset = len(prefix.row.tokens) + prefix.row.rope_delta
    return row._replace(positions=row.positions + offset, rope_delta=row.rope_delta + offset)


def chat_messages(example: Example, *, policy_in_prompt: bool) -> list[dict[str, Any]]:
    """The conversation: the policy (when asked for) as system, then images and query as user.

    `meta["earlier_turns"]`, [role, text] each, come between the two; `meta["answer_begins"]` is
    what the assistant has said so far, to be continued.
    """
    user: list[dict[str, str]] = [{"type": "image"} for _ in example.images]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in example.meta.get("earlier_turns", ())
    ]
    messages.append({"role": "user", "content": [*user, {"type": "text", "text": example.query}]})
    if begun := example.meta.get("answer_begins"):
        messages.append({"role": "assistant", "content": begun})
    if not policy_in_prompt:
        return messages
    if not example.policy_text:
        raise ValueError(f"example {example.example_id} has no policy text to put in its prompt")
    system: list[dict[str, str]] = []
    for number, piece in enumerate(example.policy_text.split(IMAGE_MARK)):
        if number:
            system.append({"type": "image"})
        if piece:
            system.append({"type": "text", "text": piece})
    return [{"role": "system", "content": system}, *messages]


def _naming_the_example(encode: Callable[..., EncodedRow]) -> Callable[..., EncodedRow]:
    """What cannot be encoded is told with the id of its Example."""

    @functools.wraps(encode)
    def encode_or_name(example: Example, *args: Any) -> EncodedRow:
        try:
            return encode(example, *args)
        except ValueError as error:
            if example.example_id in str(error):
                raise
            raise ValueError(f"example {example.example_id}: {error}") from error

    return encode_or_name


@_naming_the_example
def _encode(
    example: Example,
    processor: Processor,
    policy_in_prompt: bool,
    completion_tokens: np.ndarray | None,
    loss_on: LossOn,
) -> EncodedRow:
    encoded_images = (*example.policy_images, *example.images)
    if not policy_in_prompt:
        encoded_images = example.images
    images = _resized(example, encoded_images, processor)
    prompt = encode_prompt_tokens(
        processor,
        chat_messages(example, policy_in_prompt=policy_in_prompt),
        [(image.shape[0], image.shape[1]) for image in images],
    )
    tokens = prompt
    if completion_tokens is not None:
        tokens = np.concatenate([prompt, completion_tokens])
    row = _row(tokens, pack_images(images, processor.vision), processor)
    if loss_on == "completion":
        row.loss_mask[len(prompt) :] = True
    elif loss_on == "text":
        row.loss_mask[1:] = row.visual_index[1:] < 0
    return row


def _resized(example: Example, encoded: Sequence[bytes], processor: Processor) -> list[np.ndarray]:
    return [
        resize_image(decode_image(data, f"example {example.example_id}, image {i}"), processor)
        for i, data in enumerate(encoded)
    ]


def _row(tokens: np.ndarray, packed: PackedImages, processor: Processor) -> EncodedRow:
    """Tokens with their positions and images; nothing is a target yet."""
    positions, delta = mrope_positions(
        tokens, packed.grids, processor.image_token_id, processor.vision.merge_size
    )
    visual_index = np.full(len(tokens), -1, np.int32)
    if packed.slots:
        visual_index[tokens == processor.image_token_id] = np.concatenate(packed.slots)
    mask = np.zeros(len(tokens), bool)
    return EncodedRow(tokens, mask, positions, delta, visual_index, packed)
