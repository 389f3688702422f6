"""The vision tower of Qwen2.5-VL: uint8 patches in, visual tokens of the language model out.

    patches [B W P 588] -> embed -> window block, ... , full block, ... -> merge 2x2 -> [B M D]

A window block attends inside each window of P slots (a dense P x P attention with W on the batch
axis); a full block attends over all W * P slots of the row, inside the same image. Windows are laid
out by `packing.py`, so no index is computed here.

Source: Qwen2.5-VL (arXiv:2502.13923), section 2.1; transformers' `Qwen2_5_VisionTransformer...`.
Next: trimpi_jax/models/language.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from trimpi_jax.models.config import VisionConfig
from trimpi_jax.models.layers import (
    Linear,
    Params,
    RMSNorm,
    call,
    declare,
    declare_stack,
    run_layers,
    save_memory,
    unstack,
    weight,
)
from trimpi_jax.ops.attention import segment_attention
from trimpi_jax.ops.kernels import flash_segments
from trimpi_jax.ops.rotary import rotate, vision_angles
from trimpi_jax.sharding import constrain, on_shards

# CLIP's pixel statistics (openai/CLIP, clip.py), used by every Qwen2.5-VL release; RGB, of 0..1
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbed(nn.Module):
    """A patch to a vector: a Conv3d whose stride is its kernel, that is, a matrix.

    A still image is shown to the reference as two equal frames, so the kernel's frames are summed
    and one frame is multiplied: sum_t x W_t = x sum_t W_t.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        kernel = weight(
            self,
            "kernel",
            nn.initializers.normal(c.init_std),
            ("channel", c.channels),
            ("frame", c.temporal_patch_size),
            ("pixel", c.patch_size**2),
            ("vision_embed", c.width),
        ).sum(axis=1)
        kernel = kernel.reshape(-1, c.width)  # [C, patch^2, D] -> [C patch^2, D]
        return jnp.einsum("bwpi,id->bwpd", pixels, kernel.astype(pixels.dtype))


class VisionBlock(nn.Module):
    """x + proj(attention(norm(x))), then x + mlp(norm(x)); attention inside segments."""

    config: VisionConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        segment: jax.Array,
        full: bool,
        attention: str = "xla",
    ) -> jax.Array:
        c = self.config
        embed, mlp = ("vision_embed", c.width), ("vision_mlp", c.mlp_width)
        heads, head = ("vision_heads", c.heads), ("head_width", c.head_width)

        def map_(name, inputs, outputs):
            return Linear((*inputs,), (*outputs,), use_bias=True, init_std=c.init_std, name=name)

        y = RMSNorm(c.width, c.rms_eps, name="norm1")(x)
        qkv = map_("qkv", [embed], [("qkv", 3), heads, head])(y)
        # the reference rotates vision heads in float32, whatever the dtype of the model
        q, k = (
            rotate(qkv[..., i, :, :].astype(jnp.float32), cos, sin).astype(x.dtype) for i in (0, 1)
        )
        v = qkv[..., 2, :, :]
        b, w, p = segment.shape
        group = (b, w * p) if full else (b * w, p)  # one image row, or one window, per attention
        q, k, v = checkpoint_name((q, k, v), "qkv")
        q, k, v = (a.reshape(*group, c.heads, c.head_width) for a in (q, k, v))
        attended = attend_in_segments(q, k, v, segment.reshape(group), full, attention)
        attended = checkpoint_name(attended, "attended")
        attended = attended.reshape(b, w, p, c.heads, c.head_width)
        x = constrain(x + map_("proj", [heads, head], [embed])(attended), "batch")

        y = RMSNorm(c.width, c.rms_eps, name="norm2")(x)
        gate, up = map_("gate", [embed], [mlp])(y), map_("up", [embed], [mlp])(y)
        y = constrain(jax.nn.silu(gate) * up, "batch", None, None, "vision_mlp")
        return constrain(x + map_("down", [mlp], [embed])(y), "batch")


def attend_in_segments(q, k, v, segment: jax.Array, full: bool, attention: str) -> jax.Array:
    """`ops.attention.segment_attention`, or a kernel for whole images on TPU.

    A window is one 64 x 64 matrix, which no kernel does faster; cuDNN has no segments.
    """
    if not full or not attention.startswith("splash"):
        return segment_attention(q, k, v, segment)
    heads = ("batch", None, "vision_heads", None)
    return on_shards(
        lambda q, k, v, marks: flash_segments(q, k, v, marks, attention),
        (q, k, v, segment),
        (heads, heads, heads, ("batch", None)),
    )


class Merger(nn.Module):
    """Four patches of a 2x2 cell to one visual token: norm, concatenate, two-layer MLP."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        cell = c.width * c.merge_size**2
        y = RMSNorm(c.width, c.rms_eps, name="norm")(x)
        y = y.reshape(x.shape[0], -1, cell)  # [B, W, P, D] -> [B, M, merge^2 D]
        wide = (("vision_cell", cell),), (("vision_mlp", cell),)
        y = Linear(*wide, use_bias=True, init_std=c.init_std, name="fc1")(y)
        y = jax.nn.gelu(y, approximate=False)  # the exact erf form; tanh fails parity
        out = (("vision_mlp", cell),), (("embed", c.out_width),)
        return Linear(*out, use_bias=True, init_std=c.init_std, name="fc2")(y)


def declare_vision(config: VisionConfig, key: jax.Array) -> Params:
    """Initial weights of the tower, boxed with logical axes; blocks stacked on axis "layers"."""
    embed_key, block_key, merger_key = jax.random.split(key, 3)
    p = config.merge_size**2
    pixels = jnp.zeros((1, 1, p, config.channels * config.patch_size**2))
    x = jnp.zeros((1, 1, p, config.width))
    angles = jnp.zeros((1, 1, p, config.head_width // 2))
    segment = jnp.ones((1, 1, p), jnp.int32)
    return {
        "patch_embed": declare(PatchEmbed(config), embed_key, pixels),
        "blocks": declare_stack(
            VisionBlock(config), block_key, config.depth, x, angles, angles, segment, False
        ),
        "merger": declare(Merger(config), merger_key, x),
    }


def normalise_pixels(patches: jax.Array, config: VisionConfig) -> jax.Array:
    """(x / 255 - mean) / std per channel, float32.

    Args:
      patches: uint8 [..., C * patch * patch], channel slowest.
    """
    per_channel = config.patch_size**2
    mean = np.repeat(np.asarray(PIXEL_MEAN, np.float32), per_channel)
    std = np.repeat(np.asarray(PIXEL_STD, np.float32), per_channel)
    scaled = patches.astype(jnp.float32) * np.float32(1 / 255)
    return (scaled - jnp.broadcast_to(mean, patches.shape)) / jnp.broadcast_to(std, patches.shape)


def encode_patches(
    params: Params,
    config: VisionConfig,
    patches: jax.Array,
    patch_hw: jax.Array,
    patch_segment: jax.Array,
    *,
    dtype: jnp.dtype,
    layer_loop: str,
    remat: str,
    attention: str,
) -> jax.Array:
    """Visual tokens of every row.

    Args:
      params: weights as declared by `declare_vision`, unboxed.
      config: the tower.
      patches: uint8 [B, W, P, C * patch * patch].
      patch_hw: int32 [B, W, P, 2].
      patch_segment: int32 [B, W, P], 0 = empty slot.
      dtype: of the activations.
      layer_loop, remat: see `layers.run_layers`.
      attention: one of `ops.kernels.IMPLEMENTATIONS`.

    Returns:
      [B, M, D], M = W * P / merge_size^2, in slot order; slots of empty patches hold junk that no
      token refers to.
    """
    pixels = normalise_pixels(patches, config).astype(dtype)
    x = constrain(call(PatchEmbed(config), params["patch_embed"], pixels), "batch")
    angles = vision_angles(patch_hw, config.head_width, config.rope_theta)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    block = VisionBlock(config)

    def body(full):
        return lambda x, layer: (
            call(block, layer, x, cos, sin, patch_segment, full, attention),
            None,
        )

    period = group_size(config)
    if layer_loop == "scan" and period:
        # [depth, ...] -> [depth / period, period, ...]: one window block and one full block compile
        groups = jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), params["blocks"])

        def group(x, layers):
            windows = jax.tree.map(lambda a: a[: period - 1], layers)
            full = jax.tree.map(lambda a: a[period - 1 :], layers)
            if period > 1:
                x, _ = run_layers(body(False), x, windows, layer_loop=layer_loop, remat=remat)
            x, _ = run_layers(body(True), x, full, layer_loop=layer_loop, remat=remat)
            return x, None

        x, _ = jax.lax.scan(group, x, groups)
    else:
        x = _run_irregular(body, x, params["blocks"], config, remat=remat)
    return call(Merger(config), params["merger"], x)


def group_size(config: VisionConfig) -> int:
    """Blocks per group when every p-th block is full, as in all releases (p = 8); else 0."""
    full = config.full_attention_blocks
    period = full[0] + 1 if full else 0
    regular = period and full == tuple(range(period - 1, config.depth, period))
    return period if regular and config.depth % period == 0 else 0


def _run_irregular(body, x, blocks, config, *, remat):
    """Any pattern of window and full blocks, one compiled copy per block."""
    window, full = body(False), body(True)
    window, full = save_memory(window, remat), save_memory(full, remat)
    for number, layer in enumerate(unstack(blocks)):
        x, _ = (full if number in config.full_attention_blocks else window)(x, layer)
    return x
