"""Checkpoints on disk: bitwise round trips, and every complaint at once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity.rows import random_params, tiny_config
from trimpi_jax.models import hf_weights, lora, vlm


@pytest.fixture(scope="module")
def untied():
    config = tiny_config(tied=False)
    return config, random_params(config)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("limit", [10**9, 200_000])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bitwise(tmp_path, tied, limit):
    config = tiny_config(tied=tied)
    params = random_params(config)
    hf_weights.save_hf(tmp_path, config, params, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) == 1) == (limit == 10**9)
    names = set().union(*(load_file(shard) for shard in shards))
    assert ("lm_head.weight" in names) == (not tied)
    assert "model.embed_tokens.weight" in names and "visual.merger.ln_q.weight" in names
    again, loaded = hf_weights.load_hf(tmp_path)
    assert again == config
    equal(loaded, params)


def test_matrices_are_stored_as_they_are_meant(tmp_path, untied):
    """A transposed view would be written scrambled: safetensors ignores strides."""
    config, params = untied
    hf_weights.save_hf(tmp_path, config, params)
    stored = load_file(tmp_path / "model.safetensors")
    layers, blocks = params["language"]["layers"], params["vision"]["blocks"]
    np.testing.assert_array_equal(
        stored["model.layers.1.mlp.gate_proj.weight"], layers["gate"]["kernel"][1].T
    )
    np.testing.assert_array_equal(
        stored["model.layers.0.self_attn.o_proj.weight"],
        layers["o"]["kernel"][0].reshape(64, 64).T,
    )
    np.testing.assert_array_equal(
        stored["visual.blocks.1.attn.qkv.weight"],
        blocks["qkv"]["kernel"][1].reshape(64, 192).T,
    )
    conv = params["vision"]["patch_embed"]["kernel"].reshape(3, 2, 14, 14, 64)
    np.testing.assert_array_equal(
        stored["visual.patch_embed.proj.weight"], conv.transpose(4, 0, 1, 2, 3)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files(tmp_path, untied, dtype):
    config, params = untied
    hf_weights.save_hf(tmp_path, config, jax.tree.map(jnp.asarray, params), dtype)
    _, wide = hf_weights.load_hf(tmp_path)
    equal(wide, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), params))
    _, narrow = hf_weights.load_hf(tmp_path, dtype=jnp.dtype(dtype))
    assert narrow["language"]["final_norm"]["scale"].dtype == dtype
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_long_names_are_read(tmp_path, untied):
    config, params = untied
    hf_weights.save_hf(tmp_path, config, params)
    file = tmp_path / "model.safetensors"

    def lengthen(name):
        if name.startswith("model."):
            return name.replace("model.", "model.language_model.", 1)
        return "model." + name if name.startswith("visual.") else name

    stored = {lengthen(name): value for name, value in load_file(file).items()}
    assert "model.language_model.norm.weight" in stored and "lm_head.weight" in stored
    save_file(stored, file, metadata={"format": "pt"})
    equal(hf_weights.load_hf(tmp_path)[1], params)


def test_a_tied_head_stored_again_is_ignored(tmp_path):
    config = tiny_config(tied=True)
    params = random_params(config)
    hf_weights.save_hf(tmp_path, config, params)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}, file)
    equal(hf_weights.load_hf(tmp_path)[1], params)


def test_all_misfits_are_listed(tmp_path, untied):
    hf_weights.save_hf(tmp_path, *untied)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored["model.norm.weight"], stored["visual.merger.mlp.0.bias"]
    stored["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    stored["visual.extra.weight"] = np.zeros(5, np.float32)
    save_file(stored, file)
    with pytest.raises(ValueError) as error:
        hf_weights.load_hf(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: 4 tensors do not fit")
    assert "missing: model.norm.weight [64]" in message
    assert "missing: visual.merger.mlp.0.bias [256]" in message
    assert "unknown: visual.extra.weight [5] in model.safetensors" in message
    assert "is [3, 4] in model.safetensors, the config says [96, 64]" in message


def test_damaged_files(tmp_path, untied):
    hf_weights.save_hf(tmp_path, *untied)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) // 2, 5, 0):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged or cut short \(\d+ bytes\)"):
            hf_weights.load_hf(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path, untied):
    (tmp_path / "config.json").write_text(json.dumps(untied[0].to_hf()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match="never opened"):
        hf_weights.load_hf(tmp_path)


def test_missing_files(tmp_path, untied):
    with pytest.raises(FileNotFoundError, match=r"No config\.json"):
        hf_weights.load_hf(tmp_path)
    hf_weights.save_hf(tmp_path, *untied, max_shard_bytes=200_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        hf_weights.load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        hf_weights.load_hf(tmp_path)


def test_saving_again_leaves_no_stale_shards(tmp_path, untied):
    config, params = untied
    hf_weights.save_hf(tmp_path, config, params, max_shard_bytes=200_000)
    changed = jax.tree.map(lambda a: a + 1, params)
    hf_weights.save_hf(tmp_path, config, changed)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / hf_weights.INDEX_FILE).exists()
    equal(hf_weights.load_hf(tmp_path)[1], changed)


def test_what_save_refuses(tmp_path, untied):
    config, params = untied
    with pytest.raises(ValueError, match="merge_lora"):
        adapted = lora.add_lora(params, config, jax.random.key(0), 2)
        hf_weights.save_hf(tmp_path, config, adapted)
    with pytest.raises(ValueError, match="dtype"):
        hf_weights.save_hf(tmp_path, config, params, "int8")
    with pytest.raises(
        ValueError, match=r"language/head/kernel: expected nothing, got \(64, 320\)"
    ):
        hf_weights.save_hf(tmp_path, tiny_config(tied=True), params)


def test_every_weight_has_one_name(untied):
    config, params = untied
    specs = hf_weights.tensor_specs(config)
    assert len({spec.name for spec in specs}) == len(specs) == 57
    stored = sum(int(np.prod(spec.shape)) for spec in specs)
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert jax.tree.structure(vlm.param_shapes(config)) == jax.tree.structure(params)
