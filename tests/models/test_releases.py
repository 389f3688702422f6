"""The four sizes: their parameters, counted, and their config.json in the spellings of the hub."""

import math

import jax
import pytest

from trimpi_jax.models import hf_names, vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.releases import RELEASES, check_size, parse_size

# all parameters, those of the vision tower (counted by transformers on meta tensors)
PARAMETERS = {
    "3b": (3_754_622_976, 668_684_288),
    "7b": (8_292_166_656, 676_550_144),
    "32b": (33_452_718_336, 688_841_984),
    "72b": (73_410_777_344, 704_573_696),
}
# tensors of a file; a tied head has none
TENSORS = {"3b": 824, "7b": 729, "32b": 1161, "72b": 1353}


@pytest.mark.parametrize("size", RELEASES)
def test_parameters(size):
    shapes = vlm.param_shapes(RELEASES[size])
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert (count(shapes), count(shapes["vision"])) == PARAMETERS[size]
    assert len(hf_names.tensor_specs(RELEASES[size])) == TENSORS[size]


def hub_config(size):
    """config.json as the hub has it: old spellings; the 32B file leaves vision fields out."""
    text = RELEASES[size].text
    vision = {
        "hidden_size": 1280,
        "intermediate_size": RELEASES[size].vision.mlp_width,
        "out_hidden_size": text.width,
        "in_chans": 3,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "spatial_patch_size": 14,
        "window_size": 112,
        "tokens_per_second": 2,
        "model_type": "qwen2_5_vl",
    }
    if size != "32b":
        vision |= {
            "depth": 32,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "intermediate_size": text.mlp_width,
        "vocab_size": text.vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": text.tied,
        "use_sliding_window": False,
        "eos_token_id": [151645, 151643],
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }


@pytest.mark.parametrize("size", RELEASES)
def test_hub_files(size):
    assert VLMConfig.from_hf(hub_config(size)) == RELEASES[size]
    assert VLMConfig.from_hf(RELEASES[size].to_hf("bfloat16")) == RELEASES[size]


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_a_tied_head_is_read_at_either_level(level):
    fields = hub_config("3b") | {"text_config": {}}
    del fields["tie_word_embeddings"]
    assert not VLMConfig.from_hf(fields).text.tied
    (fields if level == "top" else fields["text_config"])["tie_word_embeddings"] = True
    assert VLMConfig.from_hf(fields) == RELEASES["3b"]


def test_null_means_absent():
    fields = hub_config("7b")
    fields["vision_config"] |= {"in_channels": None, "depth": None, "num_heads": None}
    fields["text_config"] = {"hidden_size": None, "rope_parameters": None}
    assert VLMConfig.from_hf(fields) == RELEASES["7b"]


def test_sizes_are_checked():
    check_size("7b", RELEASES["7b"])
    with pytest.raises(ValueError, match=r"for size 7b.*width 2048 instead of 3584"):
        check_size("7b", RELEASES["3b"])
    with pytest.raises(ValueError, match=r"unknown size '3B'; did you mean 3b\?"):
        parse_size("3B")
