"""The reference side of the parity tests: tiny random Qwen2.5-VL models of transformers.

Weights are drawn wide, with random biases and norm scales: the reference's own initialisation has
zero biases and unit norms, which hides errors. Needs torch; import it after `importorskip`.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.parity.rows import IMAGE_TOKEN, VISION_END, VISION_START, VOCAB, Row
from trimpi_jax.models.vision import PIXEL_MEAN, PIXEL_STD

torch.set_num_threads(2)


def tiny_model(
    *, tied: bool, seed: int = 0, vision_width: int = 64, text_width: int = 64
) -> Qwen2_5_VLForConditionalGeneration:
    """Two ViT blocks (window, full), two layers, four heads on two key/value heads."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": text_width,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": {64: [2, 3, 3], 32: [1, 1, 2]}[text_width],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": vision_width,
            "intermediate_size": 100,
            "num_heads": 4,
            "out_hidden_size": text_width,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "norm" in name or "ln_q" in name else 0.0
            weight.copy_(centre + 0.08 * torch.randn_like(weight))
    return model


def hf_inputs(row: Row, merge: int = 2, patch: int = 14) -> dict[str, torch.Tensor]:
    """The keyword arguments of the reference model for one row."""
    tokens = torch.tensor(row.tokens).long()[None]
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
    }
    if row.images:
        rows = [_pixel_rows(image, merge, patch) for image in row.images]
        inputs["pixel_values"] = torch.tensor(np.concatenate(rows))
        inputs["image_grid_thw"] = torch.tensor(
            [(1, image.shape[0] // patch, image.shape[1] // patch) for image in row.images]
        )
    return inputs


def _pixel_rows(image: np.ndarray, merge: int, patch: int) -> np.ndarray:
    """Normalised rows [U, 1176] as the reference's image processor orders them, spelled out."""
    scaled = (image / 255.0 - np.array([[PIXEL_MEAN]])) / np.array([[PIXEL_STD]])
    rows = []
    side = patch * merge
    for top in range(0, image.shape[0], side):
        for left in range(0, image.shape[1], side):
            for y in range(top, top + side, patch):
                for x in range(left, left + side, patch):
                    cut = scaled[y : y + patch, x : x + patch].transpose(2, 0, 1)
                    rows.append(np.stack([cut, cut], axis=1).reshape(-1))
    return np.asarray(rows, np.float32)
