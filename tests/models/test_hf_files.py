"""Reading on demand: each part once, no more than asked for, never the whole model on the host."""

import dataclasses
import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.parity.rows import random_params, tiny_config
from trimpi_jax.models import hf_files, hf_names, hf_weights, vlm
from trimpi_jax.sharding import make_mesh, param_shardings


def shardings_of(config, mesh):
    return param_shardings(vlm.logical_axes(config), mesh, vlm.param_shapes(config))


@pytest.fixture
def reads(monkeypatch):
    """Bytes of every read, in order."""
    sizes = []
    plain = hf_files.open_file

    class File:
        def __init__(self, file):
            self.inside = plain(file)

        def __enter__(self):
            self.inside.__enter__()
            return self

        def __exit__(self, *error):
            return self.inside.__exit__(*error)

        def keys(self):
            return self.inside.keys()

        def get_slice(self, name):
            part = self.inside.get_slice(name)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index):
                    value = part[index]
                    sizes.append(value.nbytes)
                    return value

            return Slice()

    monkeypatch.setattr(hf_files, "open_file", File)
    return sizes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = tiny_config(tied=False)
    params = random_params(config)
    folder = tmp_path_factory.mktemp("saved")
    hf_weights.save_hf(folder, config, params, max_shard_bytes=400_000)
    return folder, config, params


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_every_byte_is_read_once_whatever_the_mesh(saved, reads, axes):
    folder, config, params = saved
    mesh = make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    loaded = hf_weights.load_params(folder, config, shardings_of(config, mesh))
    assert sum(reads) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for array, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(shardings_of(config, mesh)), strict=True
    ):
        assert array.sharding == sharding


def test_cast_on_the_way(saved):
    folder, config, params = saved
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    loaded = hf_weights.load_params(folder, config, shardings_of(config, mesh), dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_one_part_asks_for_its_bytes_only(saved, reads):
    folder, config, params = saved
    found = hf_weights.check_weights(folder, config)
    spec = next(
        s for s in hf_names.tensor_specs(config) if s.name == "visual.blocks.1.attn.qkv.weight"
    )
    index = (slice(0, 3), slice(1, 2), slice(0, 16), slice(32, 48))  # qkv, head, width, inputs
    del reads[:]
    block = hf_files.read_block(found[spec.name], spec, index)
    assert sum(reads) == 3 * 1 * 16 * 16 * 4
    kernel = params["vision"]["blocks"]["qkv"]["kernel"][1]  # [inputs, qkv, head, width]
    np.testing.assert_array_equal(block, kernel[32:48, :, 1:2].transpose(1, 2, 3, 0))


def test_large_tensors_are_read_in_blocks(saved, reads, monkeypatch):
    folder, config, params = saved
    monkeypatch.setattr(hf_files, "BLOCK_BYTES", 10_000)
    mesh = make_mesh(devices=jax.devices()[:1])
    loaded = hf_weights.load_params(folder, config, shardings_of(config, mesh))
    assert max(reads) <= 10_000
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_the_host_holds_about_one_tensor(tmp_path):
    """48 MB of weights, the largest tensor 4 MB: import and export stay below three of them."""
    config = tiny_config()
    text = dataclasses.replace(
        config.text,
        width=256,
        depth=8,
        heads=16,
        vocab_size=4096,
        mlp_width=2048,
    )
    vision = dataclasses.replace(config.vision, out_width=256)
    config = dataclasses.replace(config, text=text, vision=vision)
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    shardings = shardings_of(config, mesh)
    params = jax.device_put(random_params(config), shardings)
    hf_weights.save_hf(tmp_path, config, params)  # compiles, too
    hf_weights.load_params(tmp_path, config, shardings)
    sizes = [4 * math.prod(spec.shape) for spec in hf_names.tensor_specs(config)]
    assert max(sizes) == 4 * 2**20 and sum(sizes) > 40 * 2**20

    def peak_of(call):
        tracemalloc.start()
        try:
            result = call()
            return result, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    loaded, peak = peak_of(lambda: hf_weights.load_params(tmp_path, config, shardings))
    assert peak < 3 * max(sizes), f"import held {peak / 2**20:.1f} MiB of host arrays"
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    _, peak = peak_of(lambda: hf_weights.save_hf(tmp_path / "again", config, loaded))
    assert peak < 3 * max(sizes), f"export held {peak / 2**20:.1f} MiB of host arrays"
    name = hf_weights.SINGLE_FILE
    assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("index", "sizes", "runs"),
    [
        ((slice(2, 4),), (6,), [(2, 4)]),
        ((slice(None), slice(1, 2), slice(None)), (3, 2, 5), [(5, 10), (15, 20), (25, 30)]),
        ((slice(1, 3), slice(None)), (4, 7), [(7, 21)]),
    ],
)
def test_flat_runs(index, sizes, runs):
    assert hf_names.flat_runs(index, sizes) == runs


def test_our_files_are_safetensors_of_the_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((i, 3)).astype(np.float32) for i in range(4)}
    file = tmp_path / "x.safetensors"
    total = hf_files.write_file(
        file,
        [hf_files.ToWrite(name, value.shape, lambda v=value: v) for name, value in tensors.items()],
        "float32",
    )
    assert total == sum(value.nbytes for value in tensors.values())
    again = load_file(file)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_a_view_that_is_not_contiguous_is_written_as_it_is_meant(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = tmp_path / "x.safetensors"
    hf_files.write_file(file, [hf_files.ToWrite("t", (4, 3), lambda: value.T)], "float32")
    np.testing.assert_array_equal(load_file(file)["t"], value.T)


def test_a_promise_that_is_not_kept_is_an_error(tmp_path):
    wrong = hf_files.ToWrite("t", (4, 3), lambda: np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"t is float32 \(3, 4\), promised float32 \(4, 3\)"):
        hf_files.write_file(tmp_path / "x.safetensors", [wrong], "float32")


def copy_of(saved, folder):
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return json.loads((folder / hf_files.INDEX_FILE).read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"lm_head.weight": "gone.safetensors"}), r"not there.*gone\.safeten"),
        (lambda m: m.update({"lm_head.weight": "../x.safetensors"}), "outside its folder"),
        (lambda m: m.update({"lm_head.weight": "model.bin"}), "never opened.*model.bin"),
        (
            lambda m: m.update({"model.norm.weight": m["visual.patch_embed.proj.weight"]}),
            "says model.norm.weight is in",
        ),
        (lambda m: m.update({"invented": m["model.norm.weight"]}), "says invented is in"),
    ],
)
def test_a_wrong_index_is_told(saved, tmp_path, change, message):
    index = copy_of(saved, tmp_path)
    assert (
        index["weight_map"]["model.norm.weight"]
        != (index["weight_map"]["visual.patch_embed.proj.weight"])
    )
    change(index["weight_map"])
    (tmp_path / hf_files.INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        hf_weights.check_weights(tmp_path, saved[1])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_that_is_none(saved, tmp_path, text):
    copy_of(saved, tmp_path)
    (tmp_path / hf_files.INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        hf_weights.check_weights(tmp_path, saved[1])


def test_the_same_tensor_in_two_spellings(tmp_path):
    config = tiny_config()
    hf_weights.save_hf(tmp_path, config, random_params(config))
    file = tmp_path / hf_files.SINGLE_FILE
    stored = load_file(file)
    long = {"model.language_model.norm.weight": stored["model.norm.weight"]}
    save_file(stored | long, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight in model\.safetensors is also"):
        hf_weights.load_hf(tmp_path)


def test_a_text_only_checkpoint_is_called_that(tmp_path):
    config = tiny_config()
    hf_weights.save_hf(tmp_path, config, random_params(config))
    file = tmp_path / hf_files.SINGLE_FILE
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("visual.")}, file)
    with pytest.raises(ValueError) as error:
        hf_weights.load_hf(tmp_path)
    message = str(error.value)
    assert "a text-only checkpoint?" in message
    assert "missing: visual.blocks.{0-1}.attn.qkv.weight [192, 64]" in message
    assert len(message.splitlines()) < 25  # layers are folded


def test_a_quantized_checkpoint_is_refused(tmp_path):
    config = tiny_config()
    hf_weights.save_hf(tmp_path, config, random_params(config))
    file = tmp_path / hf_files.SINGLE_FILE
    stored = load_file(file)
    stored["model.layers.1.mlp.up_proj.weight"] = np.zeros((96, 64), np.int8)
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight in .* is stored as I8"):
        hf_weights.load_hf(tmp_path)


def test_a_tied_head_that_differs_is_told(tmp_path):
    config = tiny_config(tied=True)
    hf_weights.save_hf(tmp_path, config, random_params(config))
    file = tmp_path / hf_files.SINGLE_FILE
    stored = load_file(file)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        hf_weights.load_hf(tmp_path)


def test_fold_names():
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1, 2, 5)] + ["lm_head.weight"]
    assert hf_names.fold_names([*names, "visual.blocks.3.norm1.weight"]) == [
        ("model.layers.{0-2,5}.mlp.up_proj.weight", names[0]),
        ("lm_head.weight", "lm_head.weight"),
        ("visual.blocks.3.norm1.weight", "visual.blocks.3.norm1.weight"),
    ]
