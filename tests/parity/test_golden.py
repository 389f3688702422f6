"""Parity without torch: a shipped model and the numbers transformers computed with it.

Made by tests/parity/make_golden.py.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity.rows import make_batch, make_row
from trimpi_jax.models import hf_weights, vlm

GOLDEN = Path(__file__).parent / "golden" / "qwen2_5_vl.npz"
ROWS = ("two_images", "aligned", "text_only")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_text(str(golden["config"]))
    prefix = "weights/"
    weights = {
        name.removeprefix(prefix): value
        for name, value in golden.items()
        if name.startswith(prefix)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config, params = hf_weights.load_hf(folder)
    rows = [make_row(name) for name in ROWS]
    return config, params, make_batch(rows, config)


def test_logits(golden, loaded):
    config, params, batch = loaded
    ours = np.asarray(jax.jit(vlm.apply, static_argnums=1)(params, config, batch))
    for name, mine in zip(ROWS, ours, strict=True):
        theirs = golden[f"{name}/logits"]
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=1e-5, rtol=0, err_msg=name)


def test_vision_tower(golden, loaded):
    config, params, batch = loaded
    encode = jax.jit(vlm.encode_images, static_argnums=1)
    ours = np.asarray(encode(params, config, batch.patches, batch.patch_hw, batch.patch_segment))
    for i, name in enumerate(ROWS[:2]):
        slots = batch.visual_index[i]
        mine = ours[i][slots[slots >= 0]]
        np.testing.assert_allclose(mine, golden[f"{name}/visual"], atol=1e-5, rtol=0)


def test_positions(golden, loaded):
    batch = loaded[2]
    for i, name in enumerate(ROWS[:2]):
        theirs = golden[f"{name}/positions"]
        np.testing.assert_array_equal(batch.positions[i, :, : theirs.shape[1]], theirs)
        assert batch.rope_delta[i] == golden[f"{name}/delta"].item()
