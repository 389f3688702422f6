"""The released sizes of Qwen2.5-VL by name, for what needs no weights.

Source: the config.json files of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
Next: trimpi_jax/models/packing.py
"""

from __future__ import annotations

from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig


def _preset(vision_mlp: int, **text) -> VLMConfig:
    return VLMConfig(
        vision=VisionConfig(mlp_width=vision_mlp, out_width=text["width"]), text=TextConfig(**text)
    )


PRESETS: dict[str, VLMConfig] = {
    "3b": _preset(
        3420, width=2048, depth=36, heads=16, kv_heads=2, mlp_width=11008, vocab_size=151936
    ),
    "7b": _preset(
        3420,
        width=3584,
        depth=28,
        heads=28,
        kv_heads=4,
        mlp_width=18944,
        vocab_size=152064,
        tied=False,
    ),
    "32b": _preset(
        3456,
        width=5120,
        depth=64,
        heads=40,
        kv_heads=8,
        mlp_width=27648,
        vocab_size=152064,
        tied=False,
    ),
    "72b": _preset(
        3456,
        width=8192,
        depth=80,
        heads=64,
        kv_heads=8,
        mlp_width=29568,
        vocab_size=152064,
        tied=False,
    ),
}
