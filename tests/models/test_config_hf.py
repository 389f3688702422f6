"""config.json of the releases in all spellings, in and out."""

import json

import pytest

from tests.parity.rows import tiny_config
from trimpi_jax.models.config import TextConfig, VisionConfig, VLMConfig

# The 3B release as its hub file spells it (fields that this port ignores left out)
HUB_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
EXPECTED_3B = VLMConfig(VisionConfig(), TextConfig(), eos_token_ids=(151645,))


def nested(config):
    """The same file as transformers 5.x writes it."""
    top = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id")
    text = {name: value for name, value in config.items() if name not in top}
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": scaling["mrope_section"],
    }
    return {**{name: config[name] for name in top}, "text_config": text}


def test_hub_spelling():
    assert VLMConfig.from_hf(HUB_3B) == EXPECTED_3B


def test_nested_spelling():
    assert VLMConfig.from_hf(nested(HUB_3B)) == EXPECTED_3B


def test_missing_vision_fields_are_the_releases():
    sparse = {**HUB_3B, "vision_config": {"out_hidden_size": 2048, "in_chans": 3}}
    assert VLMConfig.from_hf(sparse) == EXPECTED_3B


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied):
    config = tiny_config(tied=tied)
    assert VLMConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert VLMConfig.from_hf(EXPECTED_3B.to_hf("bfloat16")) == EXPECTED_3B


def test_sizes():
    vision = EXPECTED_3B.vision
    assert (vision.head_width, vision.window_cells, vision.window_patches) == (80, 4, 64)


def test_hashable():
    assert len({tiny_config(), tiny_config(), tiny_config(tied=False)}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl.*needs 'qwen2_5_vl'"),
        ({"model_type": "llama", "vision_config": None}, "llama"),
        ({"vision_config": None}, "text-only"),
        ({"vocab_size": None, "hidden_size": None}, "vocab_size.*hidden_size"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "16 query heads"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}, "mrope_section"),
        ({"hidden_size": 4096, "head_dim": 128}, "out_hidden_size must equal"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_hf({**HUB_3B, **change})


def test_bad_vision_numbers_are_listed_together():
    with pytest.raises(ValueError, match=r"width 100.*window_size 14.*outside depth 2"):
        VisionConfig(depth=2, width=100, heads=3, window_size=14, full_attention_blocks=(5,))


def test_bad_layer_loop():
    with pytest.raises(ValueError, match="layer_loop"):
        tiny_config(layer_loop="while")
