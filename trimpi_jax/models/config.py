"""The shape of a Qwen2.5-VL model, read from and written to Hugging Face's config.json.

Three frozen dataclasses, hashable, so a config can be a static argument of `jax.jit`. Fields that
no checkpoint stores (`layer_loop`, `attention`, `lora_scale`) say how to run the model and never
reach the disk.

Source: transformers `configuration_qwen2_5_vl.py` (5.x) and the config.json files of the 3B, 7B,
32B and 72B releases, which spell several fields differently; both spellings are read.
Next: trimpi_jax/models/packing.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trimpi_jax.ops.kernels import IMPLEMENTATIONS

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
LAYER_LOOPS = ("scan", "unrolled")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Pixels: patch_size, window_size. Patches: merge_size."""

    depth: int = 32
    width: int = 1280
    heads: int = 16
    mlp_width: int = 3420
    out_width: int = 2048  # D of the language model
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    channels: int = 3
    tokens_per_second: int = 2  # video only; kept for the round trip
    init_std: float = 0.02
    rms_eps: float = 1e-6  # transformers fixes it in Qwen2_5_VLVisionBlock, not in the config
    rope_theta: float = 10000.0  # transformers fixes it in Qwen2_5_VisionRotaryEmbedding

    def __post_init__(self):
        problems = []
        if self.heads <= 0 or self.width % self.heads or (self.width // max(self.heads, 1)) % 4:
            problems.append(f"width {self.width} must be heads {self.heads} x a multiple of 4")
        if self.window_cells < 1:
            problems.append(
                f"window_size {self.window_size} holds no cell of merge_size {self.merge_size} x "
                f"patch_size {self.patch_size} pixels"
            )
        if any(not 0 <= block < self.depth for block in self.full_attention_blocks):
            problems.append(
                f"fullatt_block_indexes {self.full_attention_blocks} outside depth {self.depth}"
            )
        if problems:
            raise ValueError("Vision config: " + "; ".join(problems) + ".")

    @property
    def head_width(self) -> int:
        """Numbers per head."""
        return self.width // self.heads

    @property
    def window_cells(self) -> int:
        """Merged cells along a side of a window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """P, patch slots of a window."""
        return (self.window_cells * self.merge_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model. `mrope_section` counts rotary frequencies per axis (T, H, W)."""

    vocab_size: int = 151936
    width: int = 2048
    depth: int = 36
    heads: int = 16
    kv_heads: int = 2
    head_width: int = 128
    mlp_width: int = 11008
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tied: bool = True
    max_positions: int = 128000
    init_std: float = 0.02
    lora_scale: float = 1.0  # alpha / rank; used only where LoRA leaves exist; not on disk

    def __post_init__(self):
        problems = []
        if self.kv_heads <= 0 or self.heads % self.kv_heads:
            problems.append(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_width:
            problems.append(
                f"mrope_section {self.mrope_section} must be three counts that add up to half of "
                f"the head width {self.head_width}"
            )
        if problems:
            raise ValueError("Text config: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """The whole model, and the ids by which text and images meet."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int = 151643
    eos_token_ids: tuple[int, ...] = (151645, 151643)  # <|im_end|>, <|endoftext|>
    pad_token_id: int = 151643
    layer_loop: str = "scan"  # "scan": one compiled layer; "unrolled": all, for tiny models
    attention: str = "xla"  # one of ops.kernels.IMPLEMENTATIONS

    def __post_init__(self):
        if self.layer_loop not in LAYER_LOOPS:
            raise ValueError(f"layer_loop must be one of {LAYER_LOOPS}, got {self.layer_loop!r}.")
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, got {self.attention!r}.")
        if self.vision.out_width != self.text.width:
            raise ValueError(
                f"The vision tower ends in width {self.vision.out_width}, but the language model "
                f"has width {self.text.width}; out_hidden_size must equal hidden_size."
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VLMConfig:
        """Reads the dict of a config.json.

        Accepted: text fields at the top level (hub files) or under `text_config` (transformers
        4.52 and later); `rope_scaling` or `rope_parameters`; `tie_word_embeddings` at either level
        (true at one is enough, as in transformers); `in_chans` or `in_channels`; missing vision
        fields (the released defaults); one EOS id or a list.

        Raises:
          ValueError: another architecture, a text-only model, or options this port does not have.
        """
        nested = {k: v for k, v in (config.get("text_config") or {}).items() if v is not None}
        _check_architecture(config, nested)
        text = {**config, **nested}
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        rope_theta = rope.get("rope_theta", text.get("rope_theta", 1e6))
        _check_options(text, rope)
        heads = text["num_attention_heads"]
        head_width = text.get("head_dim") or text["hidden_size"] // heads
        tied = config.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
        eos = text.get("eos_token_id")
        eos = cls.eos_token_ids if eos is None else eos
        bos = text.get("bos_token_id")
        pad = text.get("pad_token_id")
        ids = {
            name: text[name]
            for name in (
                "image_token_id",
                "video_token_id",
                "vision_start_token_id",
                "vision_end_token_id",
            )
            if text.get(name) is not None
        }
        return cls(
            vision=_vision_from_hf(config["vision_config"], text["hidden_size"]),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                width=text["hidden_size"],
                depth=text["num_hidden_layers"],
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_width=head_width,
                mlp_width=text["intermediate_size"],
                rms_eps=text.get("rms_norm_eps", 1e-5),  # the class default; releases say 1e-6
                rope_theta=float(rope_theta),
                mrope_section=tuple(rope.get("mrope_section", TextConfig.mrope_section)),
                tied=bool(tied),
                max_positions=text.get("max_position_embeddings", 32768),
                init_std=text.get("initializer_range", 0.02),
            ),
            bos_token_id=cls.bos_token_id if bos is None else bos,
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            pad_token_id=cls.pad_token_id if pad is None else pad,
            **ids,
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The dict of a config.json that transformers loads; `dtype` names the stored numbers."""
        vision, text = self.vision, self.text
        rope = {
            "rope_type": "default",
            "rope_theta": text.rope_theta,
            "mrope_section": list(text.mrope_section),
        }
        eos = list(self.eos_token_ids)
        text_fields = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_width,
            "intermediate_size": text.mlp_width,
            "hidden_act": "silu",
            "rms_norm_eps": text.rms_eps,
            "rope_theta": text.rope_theta,
            "max_position_embeddings": text.max_positions,
            "initializer_range": text.init_std,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.pad_token_id,
        }
        return {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            **text_fields,
            "rope_scaling": {**rope, "type": "mrope"},  # the spelling of transformers 4.x
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                **text_fields,
                "rope_parameters": rope,  # the spelling of transformers 5.x
                "tie_word_embeddings": text.tied,
                "dtype": dtype,
            },
            "vision_config": {
                "model_type": MODEL_TYPE,
                "depth": vision.depth,
                "hidden_size": vision.width,
                "num_heads": vision.heads,
                "intermediate_size": vision.mlp_width,
                "out_hidden_size": vision.out_width,
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "spatial_patch_size": vision.patch_size,
                "spatial_merge_size": vision.merge_size,
                "window_size": vision.window_size,
                "fullatt_block_indexes": list(vision.full_attention_blocks),
                "in_channels": vision.channels,
                "in_chans": vision.channels,
                "tokens_per_second": vision.tokens_per_second,
                "initializer_range": vision.init_std,
                "hidden_act": "silu",
            },
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": text.tied,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


def _check_architecture(config: Mapping[str, Any], nested: Mapping[str, Any]) -> None:
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise ValueError(
            f"config.json describes model_type {found!r} (architectures "
            f"{config.get('architectures')}); this model needs {MODEL_TYPE!r}: a Qwen2.5-VL "
            "checkpoint of any size."
        )
    if not config.get("vision_config"):
        raise ValueError(
            "config.json has no vision_config: this is a text-only model. Use a Qwen2.5-VL "
            "checkpoint with its vision tower."
        )
    text = {**config, **nested}
    needed = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    )
    missing = [name for name in needed if text.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {missing}, at the top level and under text_config.")


def _check_options(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    problems = []
    if text.get("use_sliding_window"):
        problems.append("use_sliding_window=true (only full causal attention is implemented)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        problems.append(f"rope type {kind!r} (only the unscaled M-RoPE is implemented)")
    if text.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {text['hidden_act']!r} (only silu is implemented)")
    if problems:
        raise ValueError("config.json asks for " + "; ".join(problems) + ".")


def _vision_from_hf(vision: Mapping[str, Any], text_width: int) -> VisionConfig:
    names = {
        "depth": "depth",
        "num_heads": "heads",
        "intermediate_size": "mlp_width",
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "spatial_merge_size": "merge_size",
        "window_size": "window_size",
        "tokens_per_second": "tokens_per_second",
        "initializer_range": "init_std",
        "in_chans": "channels",
        "in_channels": "channels",
    }
    vision = {name: value for name, value in vision.items() if value is not None}  # null = absent
    fields = {ours: vision[theirs] for theirs, ours in names.items() if theirs in vision}
    depth = fields.get("depth", VisionConfig.depth)
    blocks = vision.get("fullatt_block_indexes", VisionConfig.full_attention_blocks)
    # transformers' class default for hidden_size is 3584, which no release has; hub files say 1280
    return VisionConfig(
        **fields,
        width=vision.get("hidden_size", VisionConfig.width),
        out_width=vision.get("out_hidden_size", text_width),
        full_attention_blocks=tuple(sorted(block for block in blocks if block < depth)),
    )
