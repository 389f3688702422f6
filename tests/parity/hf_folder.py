"""A model folder read by transformers alone, beside what this project reads of it.

The reference's side is all its own: its tokenizer, image processor, chat template and model read
the folder. The questions are worded as ClevrPolicy's. Needs torch; import it after `importorskip`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_pipelines.example import Example
from tests.tiny_model import make_png, make_question
from trimpi_jax.inputs.batching import make_batch
from trimpi_jax.inputs.encode import chat_messages, encode_prompt
from trimpi_jax.models import vlm
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.models.processor import load_processor

APPLY = jax.jit(vlm.apply, static_argnums=1)
PICTURE = make_png(3, 112, 140)
QUESTIONS = {  # name -> (question, whether its policy is in the prompt)
    "image": (make_question(0, images=(PICTURE,)), False),
    "image behind a policy": (make_question(1, images=(PICTURE,)), True),
    "two images": (make_question(2, images=(PICTURE, make_png(4, 84, 56))), False),
    "text": (make_question(3, images=()), False),
}


class Reference(NamedTuple):
    """What transformers makes of a folder."""

    tokenizer: Any
    images: Any
    model: Any

    def inputs(self, example: Example, policy_in_prompt: bool) -> dict[str, torch.Tensor]:
        """From messages and files to tensors, its own way."""
        messages = chat_messages(example, policy_in_prompt=policy_in_prompt)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        inputs = {}
        if example.images:
            files = [Image.open(io.BytesIO(data)).convert("RGB") for data in example.images]
            inputs = dict(self.images(images=files, return_tensors="pt"))
            first, *rest = text.split("<|image_pad|>")
            counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
            parts = ["<|image_pad|>" * n + part for n, part in zip(counts, rest, strict=True)]
            text = "".join([first, *parts])
        tokens = self.tokenizer(text, return_tensors="pt")
        pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return inputs | {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "mm_token_type_ids": (tokens["input_ids"] == pad).int(),
        }

    def logits(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """[T, V] of one row."""
        with torch.no_grad():
            return self.model(**inputs).logits[0].numpy()


def load_reference(folder: Path) -> Reference:
    """The folder in float32; no weight may be missing or left over."""
    model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return Reference(
        transformers.AutoTokenizer.from_pretrained(folder),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        model.eval(),
    )


def assert_same_logits(reference: Reference, folder: Path) -> None:
    """QUESTIONS: the same tokens, and logits within 1e-5 of the largest."""
    config, params = load_hf(folder)
    processor = load_processor(folder, config)
    rows = [
        encode_prompt(example, processor, policy_in_prompt=aware)
        for example, aware in QUESTIONS.values()
    ]
    batch = make_batch(
        rows,
        num_rows=len(rows),
        num_tokens=max(len(row.tokens) for row in rows),
        num_windows=max(len(row.images.patches) for row in rows),
    )
    found = np.asarray(APPLY(jax.device_put(params), config, batch))
    for (name, question), row, mine in zip(QUESTIONS.items(), rows, found, strict=True):
        inputs = reference.inputs(*question)
        np.testing.assert_array_equal(row.tokens, inputs["input_ids"][0].numpy(), err_msg=name)
        theirs = reference.logits(inputs)
        # float32 of a trained model: roundings grow with the largest logit, not with each
        atol = 1e-5 * max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=atol, rtol=0, err_msg=name)
