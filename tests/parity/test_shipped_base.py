"""The shipped base in transformers: the same tokens, pixels and logits, with and without images.

The reference's side is all its own: its tokenizer, image processor, chat template and model read
the folder. The questions are worded as ClevrPolicy's.
"""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny_model import ASSETS, make_png, make_question
from trimpi_jax.inputs.batching import make_batch
from trimpi_jax.inputs.encode import chat_messages, encode_prompt
from trimpi_jax.models import vlm
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.models.processor import load_processor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
images = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

APPLY = jax.jit(vlm.apply, static_argnums=1)
PICTURE = make_png(3, 112, 140)
QUESTIONS = {
    "image": (make_question(0, images=(PICTURE,)), False),
    "image behind a policy": (make_question(1, images=(PICTURE,)), True),
    "two images": (make_question(2, images=(PICTURE, make_png(4, 84, 56))), False),
    "text": (make_question(3, images=()), False),
}


@pytest.fixture(scope="module")
def reference():
    """(tokenizer, image processor, model), read by transformers."""
    model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        ASSETS, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS)
    return tokenizer, images.Qwen2VLImageProcessorPil.from_pretrained(ASSETS), model.eval()


@pytest.fixture(scope="module")
def ours():
    """(config, processor, params)."""
    config, params = load_hf(ASSETS)
    return config, load_processor(ASSETS, config), jax.device_put(params)


def reference_inputs(reference, example, policy_in_prompt):
    """Its own way from messages and files to tensors."""
    tokenizer, image_processor, _ = reference
    messages = chat_messages(example, policy_in_prompt=policy_in_prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = {}
    if example.images:
        files = [Image.open(io.BytesIO(data)).convert("RGB") for data in example.images]
        inputs = dict(image_processor(images=files, return_tensors="pt"))
        first, *rest = text.split("<|image_pad|>")
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        parts = ["<|image_pad|>" * n + part for n, part in zip(counts, rest, strict=True)]
        text = "".join([first, *parts])
    tokens = tokenizer(text, return_tensors="pt")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return inputs | {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "mm_token_type_ids": (tokens["input_ids"] == pad).int(),
    }


def test_the_same_logits(reference, ours):
    config, processor, params = ours
    rows = [
        encode_prompt(one, processor, policy_in_prompt=aware) for one, aware in QUESTIONS.values()
    ]
    batch = make_batch(
        rows,
        num_rows=len(rows),
        num_tokens=max(len(row.tokens) for row in rows),
        num_windows=max(len(row.images.patches) for row in rows),
    )
    found = np.asarray(APPLY(params, config, batch))
    for (name, (example, aware)), row, mine in zip(QUESTIONS.items(), rows, found, strict=True):
        inputs = reference_inputs(reference, example, aware)
        np.testing.assert_array_equal(row.tokens, inputs["input_ids"][0].numpy(), err_msg=name)
        with torch.no_grad():
            theirs = reference[2](**inputs).logits[0].numpy()

        # float32 of a trained model: roundings grow with the largest logit, not with each
        atol = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=atol, rtol=0, err_msg=name)


def test_the_picture_matters(reference):
    """Else equal logits would say nothing about how pictures are read."""
    example, _ = QUESTIONS["image"]
    logits = []
    for picture in (PICTURE, make_png(9, 112, 140)):
        inputs = reference_inputs(reference, dataclasses.replace(example, images=(picture,)), False)
        with torch.no_grad():
            logits.append(reference[2](**inputs).logits[0, -1].numpy())
    assert np.abs(logits[0] - logits[1]).max() > 0.1
