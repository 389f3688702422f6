"""The nano tokenizer with a model small enough for tests, and questions to ask it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

import trimpi_jax
from configs import nano_base
from data_pipelines.clevr_policy import wording
from data_pipelines.example import Example, encode_png
from tests.data_pipelines.policy_reader import BLUE_SPHERE, RED_CUBE, RED_CYLINDER, TREE
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import Processor
from trimpi_jax.stages.nano_base import make_model_config

ASSETS = Path(trimpi_jax.__file__).parent / "assets" / "nano"


@functools.cache
def tiny_config() -> VLMConfig:
    """Width 32, two layers; window of 56 px = 2 x 2 visual tokens; the nano vocabulary."""
    config = nano_base.get_config()
    config.model.update(
        {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "kv_heads": 1,
            "head_width": 16,
            "mlp_width": 48,
            "mrope_section": (2, 3, 3),
            "vision_width": 32,
            "vision_depth": 2,
            "vision_heads": 2,
            "vision_mlp_width": 48,
            "full_attention_blocks": (1,),
        }
    )
    return make_model_config(config)


@functools.cache
def load_tiny_processor() -> Processor:
    """The nano tokenizer; images between one and six visual tokens a side."""
    from transformers import PreTrainedTokenizerFast

    config = tiny_config()
    return Processor(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(str(ASSETS)),
        vision=config.vision,
        image_token_id=config.image_token_id,
        stop_token_ids=config.eos_token_ids,
        vocab_size=config.text.vocab_size,
        min_pixels=28 * 28,
        max_pixels=168 * 112,
    )


def tiny_params(config: VLMConfig, seed: int = 0, spread: float = 0.2) -> Any:
    """Random weights wide enough that distributions are far from uniform."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, vlm.param_shapes(config))


def make_png(seed: int = 0, height: int = 56, width: int = 56) -> bytes:
    """Noise; 28 px a side of a visual token."""
    rng = np.random.default_rng(seed)
    return encode_png(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_question(number: int = 0, **changes: Any) -> Example:
    """A ClevrPolicy question of the hand-made tree with one image of 2 x 2 visual tokens."""
    scene = (RED_CUBE, BLUE_SPHERE, RED_CYLINDER)
    example = Example(
        example_id=f"q{number}",
        images=(make_png(number),),
        query=wording.query(TREE.name),
        answer="Case 3",
        cot=wording.chain_of_thought(TREE, scene),
        policy_name=TREE.name,
        policy_text=wording.policy_text(TREE),
    )
    return dataclasses.replace(example, **changes)
