"""The shapes of the released Qwen2.5-VL models, for planning without their files.

A run reads its shapes from the config.json of its model folder; these say what size a folder is,
and let a memory plan or a benchmark do without one.

Source: config.json of huggingface.co/Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
Next: trimpi_jax/models/packing.py
"""

from __future__ import annotations

import difflib

from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig


def _release(
    width: int, depth: int, heads: int, kv_heads: int, mlp: int, vocab: int, vision_mlp: int
) -> VLMConfig:
    return VLMConfig(
        VisionConfig(mlp_width=vision_mlp, out_width=width),
        TextConfig(
            vocab_size=vocab,
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=kv_heads,
            mlp_width=mlp,
            tied=width == 2048,  # the 3B model alone
        ),
    )


RELEASES: dict[str, VLMConfig] = {
    "3b": _release(2048, 36, 16, 2, 11008, 151936, 3420),
    "7b": _release(3584, 28, 28, 4, 18944, 152064, 3420),
    "32b": _release(5120, 64, 40, 8, 27648, 152064, 3456),
    "72b": _release(8192, 80, 64, 8, 29568, 152064, 3456),
}


def parse_size(name: str) -> str:
    """One of RELEASES.

    Raises:
      ValueError: another name (with the closest match).
    """
    if name not in RELEASES:
        close = difflib.get_close_matches(name.lower(), RELEASES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown size '{name}'{hint} Sizes: {list(RELEASES)}")
    return name


def check_size(name: str, config: VLMConfig) -> None:
    """Complain when a model is not of the size that a config was made for.

    Raises:
      ValueError: width, depth, heads or MLP of the language model differ.
    """
    wanted = RELEASES[parse_size(name)].text
    names = ("width", "depth", "heads", "kv_heads", "mlp_width")
    differences = [
        f"{field} {getattr(config.text, field)} instead of {getattr(wanted, field)}"
        for field in names
        if getattr(config.text, field) != getattr(wanted, field)
    ]
    if differences:
        raise ValueError(
            f"the config is for size {name}, the model folder is another: {differences}. Choose"
            " size=... to match --config.model_dir."
        )
