"""Single parts against transformers' modules, where a whole model hides a small error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.models import vision
from trimpi_jax.models.layers import RMSNorm, call
from trimpi_jax.ops.norms import rms_norm
from trimpi_jax.ops.rotary import rotate, vision_angles

torch = pytest.importorskip("torch")


def test_rms_norm_in_bfloat16_rounds_where_the_reference_does():
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((64, 96)), rng.standard_normal(96)
    norm = Qwen2_5_VLRMSNorm(96, eps=1e-6).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(scale))
        theirs = norm(torch.tensor(x, dtype=torch.bfloat16)).float().numpy()
    ours = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16), 1e-6)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs)
    wide = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    late = rms_norm(wide, jnp.asarray(scale, jnp.bfloat16).astype(jnp.float32), 1e-6)
    assert (np.asarray(late.astype(jnp.bfloat16), np.float32) != theirs).mean() > 0.05


def tower_norm_eps(pair):
    """The eps that the config gives to a norm of the tower, used on activations where it shows."""
    width = pair.config.vision.width
    x = np.random.default_rng(0).standard_normal((8, width)).astype(np.float32) * 1e-3
    scale = np.asarray(pair.params["vision"]["blocks"]["norm1"]["scale"])[0]
    module = RMSNorm(width, pair.config.vision.rms_eps)
    ours = np.asarray(call(module, {"scale": jnp.asarray(scale)}, jnp.asarray(x)))
    with torch.no_grad():
        theirs = pair.model.model.visual.blocks[0].norm1(torch.tensor(x)).numpy()
    return np.abs(ours - theirs).max()


def test_the_eps_of_the_tower(tied_pair):
    assert tower_norm_eps(tied_pair) < 1e-6


def test_an_eps_of_1e_5_in_the_tower_would_be_seen(tied_pair):
    """The mutation that no whole model shows: there the activations are too large."""
    config = tied_pair.config
    wrong = dataclasses.replace(config, vision=dataclasses.replace(config.vision, rms_eps=1e-5))
    assert tower_norm_eps(dataclasses.replace(tied_pair, config=wrong)) > 1e-2


def test_rotation_of_the_tower(tied_pair):
    """Rows, then columns, head width 80, far patches: as the released models have them."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    rng = np.random.default_rng(0)
    hw = rng.integers(0, 200, (50, 2))
    q = rng.standard_normal((50, 4, 80)).astype(np.float32)
    frequencies = 10000.0 ** -(np.arange(0, 40, 2) / 40)
    half = np.concatenate([hw[:, :1] * frequencies, hw[:, 1:] * frequencies], axis=1)
    angles = torch.tensor(np.concatenate([half, half], axis=1), dtype=torch.float32)
    theirs, _ = apply_rotary_pos_emb_vision(
        torch.tensor(q), torch.tensor(q), angles.cos(), angles.sin()
    )
    ours_angles = vision_angles(jnp.asarray(hw), 80, 10000.0)
    ours = rotate(jnp.asarray(q), jnp.cos(ours_angles), jnp.sin(ours_angles))
    # an angle of up to 200 rad in float32 has an error of 200 * 2^-24
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=0)


def test_merger(tied_pair):
    config, params = tied_pair.config.vision, tied_pair.params["vision"]["merger"]
    x = np.random.default_rng(0).standard_normal((1, 3, 64, config.width)).astype(np.float32)
    ours = call(vision.Merger(config), params, jnp.asarray(x))
    with torch.no_grad():
        theirs = tied_pair.model.model.visual.merger(torch.tensor(x.reshape(-1, config.width)))
    np.testing.assert_allclose(ours[0], theirs.numpy(), atol=5e-6, rtol=0)


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-6, 6, 4001, dtype=jnp.float32)
    theirs = torch.nn.GELU()(torch.tensor(np.asarray(x))).numpy()
    np.testing.assert_allclose(jax.nn.gelu(x, approximate=False), theirs, atol=1e-6, rtol=0)
    assert np.abs(np.asarray(jax.nn.gelu(x, approximate=True)) - theirs).max() > 1e-4
