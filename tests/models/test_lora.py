"""Adapters: zero at first, equal to their merge, alone in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.models import lora, vlm
from trimpi_jax.models.language import DecodeContext
from trimpi_jax.ops.branches import Shared

APPLY = jax.jit(vlm.apply, static_argnums=1)


@pytest.fixture(scope="module")
def scaled(config):
    return dataclasses.replace(config, text=dataclasses.replace(config.text, lora_scale=0.5))


@pytest.fixture(scope="module")
def adapted(params, scaled):
    add = jax.jit(lora.add_lora, static_argnums=(1, 3))
    return add(params, scaled, jax.random.key(0), 3)


@pytest.fixture(scope="module")
def trained(adapted):
    """Adapters with B away from zero, as after some steps."""

    rng = np.random.default_rng(0)

    def move(path, leaf):
        if not lora.is_lora_leaf(path):
            return leaf
        return leaf + 0.05 * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(move, adapted)


def test_new_adapters_change_nothing(adapted, scaled, batch, logits):
    np.testing.assert_array_equal(APPLY(adapted, scaled, batch), logits)


def test_merged_is_unmerged(trained, scaled, config, batch, logits):
    ours = np.asarray(APPLY(trained, scaled, batch))
    assert np.abs(ours - logits).max() > 1e-2
    merged = lora.merge_lora(trained, scaled.text.lora_scale)
    assert jax.tree.structure(merged) == jax.tree.structure(vlm.param_shapes(config))
    np.testing.assert_allclose(APPLY(merged, config, batch), ours, atol=1e-5, rtol=0)


def test_scale_by_hand(trained, scaled):
    leaves = trained["language"]["layers"]["o"]  # [L N H D], A [L N H R], B [L R D]
    merged = lora.merge_lora(trained, 0.5)["language"]["layers"]["o"]["kernel"]
    update = np.einsum("lnhr,lrd->lnhd", leaves["lora_a"], leaves["lora_b"])
    np.testing.assert_allclose(merged, leaves["kernel"] + 0.5 * update, atol=1e-6)


def test_merging_plain_weights_is_identity(params):
    jax.tree.map(np.testing.assert_array_equal, lora.merge_lora(params, 2.0), params)


def test_decoding_uses_the_adapters(trained, scaled):
    weights = vlm.decode_weights(trained, jnp.float32)
    assert "lora_a" in weights["language"]["layers"][0]["q"]
    heads, width = scaled.text.kv_heads, scaled.text.head_width
    empty, prompt = jnp.zeros((1, 1, heads, 2, width)), jnp.zeros((1, heads, 1, width))

    @jax.jit
    def step(params):
        hidden, _ = vlm.decode_step(
            vlm.decode_weights(params, jnp.float32),
            scaled,
            jnp.array([[5]]),
            jnp.array([[0]]),
            DecodeContext([Shared(prompt, prompt)] * 2, jnp.array([0])),
            [Shared(empty, empty)] * 2,
            jnp.asarray(0),
        )
        return hidden

    merged = lora.merge_lora(trained, 0.5)
    np.testing.assert_allclose(step(trained), step(merged), atol=1e-5)


def test_axes_follow(adapted, scaled):
    axes = lora.lora_axes(vlm.logical_axes(scaled), scaled)
    is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    same = jax.tree.map(lambda a, p: len(a) == p.ndim, axes, adapted, is_leaf=is_names)
    assert all(jax.tree.leaves(same))
    assert axes["language"]["layers"]["o"]["lora_a"] == (
        "layers",
        "heads",
        "head_width",
        "lora_rank",
    )


def test_masks(params, adapted):
    def chosen(mask):
        flat = jax.tree_util.tree_leaves_with_path(mask)
        return {jax.tree_util.keystr(path) for path, on in flat if on}

    adapters = chosen(lora.trainable_mask(adapted, "lora"))
    assert len(adapters) == 14 and all("lora_" in path for path in adapters)
    everything = chosen(lora.trainable_mask(params, "all"))
    language = chosen(lora.trainable_mask(params, "all_but_vision"))
    assert len(everything) == len(jax.tree.leaves(params))
    assert everything - language == {path for path in everything if "vision" in path}


@pytest.mark.parametrize(
    ("mode", "has_lora", "message"),
    [("lora", False, "without LoRA"), ("all", True, "with LoRA"), ("some", False, "must be one")],
)
def test_masks_without_effect_are_refused(params, adapted, mode, has_lora, message):
    with pytest.raises(ValueError, match=message):
        lora.trainable_mask(adapted if has_lora else params, mode)


def test_bad_calls(params, adapted, config):
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(params, config, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="already"):
        lora.add_lora(adapted, config, jax.random.key(0), 2)
