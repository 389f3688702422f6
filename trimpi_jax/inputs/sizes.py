"""How large the rows of an Example will be, without decoding a picture or packing a patch.

In: an Example. Out: tokens and vision windows of its prompts and tokens of its completions; what
`encode.py` would make of it, at a fraction of the work. Shapes are chosen from these numbers.

Next: trimpi_jax/inputs/batching.py
"""

from __future__ import annotations

from typing import NamedTuple

from data_pipelines.example import Example, completion_text, image_size
from trimpi_jax.inputs.encode import chat_messages
from trimpi_jax.models.packing import count_windows
from trimpi_jax.models.processor import (
    Processor,
    encode_completion,
    encode_prompt_tokens,
    smart_resize,
)


class PromptSize(NamedTuple):
    """Of one prompt."""

    tokens: int
    windows: int


class ExampleSize(NamedTuple):
    """Of one Example."""

    free: PromptSize
    aware: PromptSize | None  # None = it has no policy text
    completion_tokens: int  # gold, with its chain of thought if it has one


class SizeReader:
    """Measures Examples; what a policy document adds to a prompt is measured once a document.

    The document is a message of its own between special tokens, so what it adds does not depend on
    the question.
    """

    def __init__(self, processor: Processor):
        self.processor = processor
        self._added: dict[tuple, PromptSize] = {}

    def measure(self, example: Example) -> ExampleSize:
        """Sizes of an Example's rows."""
        free = self._prompt(example, policy_in_prompt=False)
        text = completion_text(example.cot, example.answer)
        aware = None
        if example.policy_text:
            document = (example.policy_text, example.policy_images)
            if document not in self._added:
                whole = self._prompt(example, policy_in_prompt=True)
                self._added[document] = PromptSize(
                    whole.tokens - free.tokens, whole.windows - free.windows
                )
            added = self._added[document]
            aware = PromptSize(free.tokens + added.tokens, free.windows + added.windows)
        return ExampleSize(free, aware, len(encode_completion(self.processor, text)))

    def _prompt(self, example: Example, *, policy_in_prompt: bool) -> PromptSize:
        vision = self.processor.vision
        images = (*example.policy_images, *example.images) if policy_in_prompt else example.images
        sizes = [
            smart_resize(
                *image_size(image),
                factor=vision.patch_size * vision.merge_size,
                min_pixels=self.processor.min_pixels,
                max_pixels=self.processor.max_pixels,
            )
            for image in images
        ]
        messages = chat_messages(example, policy_in_prompt=policy_in_prompt)
        tokens = len(encode_prompt_tokens(self.processor, messages, sizes))
        return PromptSize(tokens, sum(count_windows(*size, vision) for size in sizes))
