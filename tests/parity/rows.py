"""Rows of tokens and images for model tests, and their Batch. numpy only."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from trimpi_jax.models import vlm
from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig
from trimpi_jax.models.packing import mrope_positions, pack_images
from trimpi_jax.types import Batch

VOCAB = 320
IMAGE_TOKEN, VISION_START, VISION_END = 310, 308, 309


@dataclasses.dataclass(frozen=True)
class Row:
    """Real tokens of a row, placeholders repeated, and its images."""

    tokens: np.ndarray
    images: list[np.ndarray]


# what a row looks like: text lengths, with an image (rows, columns in merged cells) between each
LAYOUTS = {
    "two_images": ((3, 4, 5), ((5, 8), (11, 5))),  # unequal sizes, short windows at the edges
    "aligned": ((2, 6), ((4, 8),)),  # a multiple of the window: two full windows
    "text_only": ((23,), ()),
    "three_images": ((1, 1, 2, 3), ((1, 1), (2, 9), (5, 4))),
}


def make_row(layout: str, seed: int = 0) -> Row:
    """Random tokens and pixels for one of LAYOUTS."""
    texts, cells = LAYOUTS[layout]
    rng = np.random.default_rng([seed, list(LAYOUTS).index(layout)])
    images = [rng.integers(0, 256, (28 * h, 28 * w, 3), dtype=np.uint8) for h, w in cells]
    pieces = [rng.integers(3, 300, texts[0])]
    for (h, w), text in zip(cells, texts[1:], strict=True):
        pieces += [[VISION_START], [IMAGE_TOKEN] * (h * w), [VISION_END]]
        pieces += [rng.integers(3, 300, text)]
    return Row(np.concatenate(pieces).astype(np.int32), images)


def make_batch(
    rows: list[Row], config: VLMConfig, length: int | None = None, windows: int | None = None
) -> Batch:
    """Packs rows into a Batch of `length` tokens and `windows` windows, or just enough."""
    packed = [pack_images(row.images, config.vision) for row in rows]
    length = length or max(row.tokens.size for row in rows)
    windows = windows if windows is not None else max(p.patches.shape[0] for p in packed)
    count, p = len(rows), config.vision.window_patches
    width = config.vision.channels * config.vision.patch_size**2
    batch = {
        "tokens": np.zeros((count, length), np.int32),
        "loss_mask": np.zeros((count, length), bool),
        "lengths": np.array([row.tokens.size for row in rows], np.int32),
        "positions": np.zeros((count, 3, length), np.int32),
        "rope_delta": np.zeros(count, np.int32),
        "visual_index": np.full((count, length), -1, np.int32),
        "patches": np.zeros((count, windows, p, width), np.uint8),
        "patch_hw": np.zeros((count, windows, p, 2), np.int32),
        "patch_segment": np.zeros((count, windows, p), np.int32),
        "valid": np.ones(count, bool),
    }
    for i, (row, images) in enumerate(zip(rows, packed, strict=True)):
        t, w = row.tokens.size, images.patches.shape[0]
        batch["tokens"][i, :t] = row.tokens
        batch["loss_mask"][i, :t] = row.tokens != config.image_token_id
        positions, delta = mrope_positions(
            row.tokens, images.grids, config.image_token_id, config.vision.merge_size
        )
        batch["positions"][i, :, :t], batch["rope_delta"][i] = positions, delta
        is_image = np.flatnonzero(row.tokens == config.image_token_id)
        if images.slots:
            batch["visual_index"][i, is_image] = np.concatenate(images.slots)
        batch["patches"][i, :w] = images.patches
        batch["patch_hw"][i, :w] = images.patch_hw
        batch["patch_segment"][i, :w] = images.patch_segment
    return Batch(**batch)


def tiny_config(*, tied: bool = True, depth: int = 2, layer_loop: str = "scan") -> VLMConfig:
    """The tiny model of the parity tests: a window block, then a full one, and so on."""
    return VLMConfig(
        vision=VisionConfig(
            depth=depth,
            width=64,
            heads=4,
            mlp_width=100,
            out_width=64,
            full_attention_blocks=tuple(range(1, depth, 2)),
        ),
        text=TextConfig(
            vocab_size=VOCAB,
            width=64,
            depth=2,
            heads=4,
            kv_heads=2,
            head_width=16,
            mlp_width=96,
            mrope_section=(2, 3, 3),
            tied=tied,
            max_positions=512,
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=0,
        layer_loop=layer_loop,
    )


def random_params(config: VLMConfig, seed: int = 0, spread: float = 0.08):
    """Wide random weights with nonzero biases and uneven norm scales, numpy float32."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, vlm.param_shapes(config))
