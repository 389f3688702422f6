"""The language model of Qwen2.5-VL: a decoder with grouped queries, M-RoPE and SwiGLU.

In: embedded tokens and their positions. Out: hidden states. Training and prefill run whole rows;
decoding runs one token of every completion against a prompt that is kept once per group.

Source: Qwen2.5 (arXiv:2412.15115); transformers' `Qwen2_5_VLTextModel`.
Next: trimpi_jax/models/vlm.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from trimpi_jax.models.config import TextConfig
from trimpi_jax.models.layers import (
    Linear,
    Params,
    RMSNorm,
    call,
    declare,
    declare_stack,
    run_layers,
    weight,
)
from trimpi_jax.ops.attention import causal_attention
from trimpi_jax.ops.branches import Shared, decode_attention
from trimpi_jax.ops.kernels import flash_causal
from trimpi_jax.ops.rotary import mrope_angles, rotate, text_angles
from trimpi_jax.sharding import constrain, gather_weights, on_shards

KeyValue = tuple[jax.Array, jax.Array]
Attend = Callable[..., jax.Array]  # (q, k, v) of whole rows -> values


@flax.struct.dataclass
class DecodeContext:
    """What stands before the completions, kept once: per layer, heads before tokens."""

    trunk: list[Shared]  # [Q, K, T, H], the prompts
    trunk_lengths: jax.Array  # int32 [Q]
    prefix: list[Shared] | None = None  # [Z, K, P, H], policies that Q / Z prompts share
    prefix_lengths: jax.Array | None = None  # int32 [Z]


def linear_maps(config: TextConfig) -> dict[str, Linear]:
    """Every linear map of a layer, by name: the one place of their shapes and logical axes."""
    embed, mlp = ("embed", config.width), ("mlp", config.mlp_width)
    head = ("head_width", config.head_width)
    heads, kv_heads = ("heads", config.heads), ("kv_heads", config.kv_heads)
    std, scale = config.init_std, config.lora_scale
    return {
        "q": Linear((embed,), (heads, head), True, std, scale),
        "k": Linear((embed,), (kv_heads, head), True, std, scale),
        "v": Linear((embed,), (kv_heads, head), True, std, scale),
        "o": Linear((heads, head), (embed,), False, std, scale),
        "gate": Linear((embed,), (mlp,), False, std, scale),
        "up": Linear((embed,), (mlp,), False, std, scale),
        "down": Linear((mlp,), (embed,), False, std, scale),
    }


class LanguageLayer(nn.Module):
    """x + o(attention(q, k, v of norm(x))), then x + down(silu(gate) * up of norm(x))."""

    config: TextConfig

    def setup(self):
        maps = linear_maps(self.config)
        self.q, self.k, self.v, self.o = maps["q"], maps["k"], maps["v"], maps["o"]
        self.gate, self.up, self.down = maps["gate"], maps["up"], maps["down"]
        self.input_norm = RMSNorm(self.config.width, self.config.rms_eps)
        self.post_norm = RMSNorm(self.config.width, self.config.rms_eps)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend = causal_attention
    ) -> tuple[jax.Array, KeyValue]:
        """Whole rows [B, T, D]; also returns the keys and values, [B, T, K, H] each."""
        q, k, v = checkpoint_name(self._project(x, cos, sin), "qkv")
        attended = checkpoint_name(attend(q, k, v), "attended")
        return self._finish(x, attended), (k, v)

    def decode(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        own: Shared,
        step: jax.Array,
        context: DecodeContext,
        trunk: Shared,
        prefix: Shared | None,
    ) -> tuple[jax.Array, Shared]:
        """One token of G completions per prompt, [Q, G, D]; writes slot `step` of the cache."""
        q, k, v = self._project(x, cos, sin)
        zero = jnp.zeros((), jnp.int32)
        at = (zero, zero, zero, jnp.asarray(step, jnp.int32), zero)
        own = Shared(
            *(
                jax.lax.dynamic_update_slice(old, new[:, :, :, None].astype(old.dtype), at)
                for old, new in ((own.k, k), (own.v, v))
            )
        )
        attended = decode_attention(
            q, own, step, trunk, context.trunk_lengths, prefix, context.prefix_lengths
        )
        return self._finish(x, attended), own

    def _project(self, x, cos, sin):
        y = self.input_norm(x)
        # the reference rotates in the dtype of the model, with cos and sin computed in float32
        q, k, v = rotate(self.q(y), cos, sin), rotate(self.k(y), cos, sin), self.v(y)
        q = constrain(q, "batch", None, "heads")
        return q, constrain(k, "batch", None, "kv_heads"), constrain(v, "batch", None, "kv_heads")

    def _finish(self, x, attended):
        x = constrain(x + self.o(attended), "batch")
        y = self.post_norm(x)
        y = constrain(jax.nn.silu(self.gate(y)) * self.up(y), "batch", None, "mlp")
        return constrain(x + self.down(y), "batch")


def causal_kernel(attention: str, segments: jax.Array | None = None) -> Attend:
    """`causal_attention`, or the kernel of that name on every device's part of q, k and v.

    `segments` int32 [B, T]: rows packed of several, each token sees its own segment only.
    """
    if attention == "xla":
        return functools.partial(causal_attention, segment=segments)
    rows, shared = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    marks = [] if segments is None else [segments]

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, *marks: jax.Array) -> jax.Array:
        return flash_causal(q, k, v, attention, *marks)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        axes = (rows, shared, shared, *[("batch", None)] * len(marks))
        return on_shards(kernel, (q, k, v, *marks), axes)

    return attend


class TokenTable(nn.Module):
    """The embedding matrix [V, D]: rows in, and, when tied, logits out."""

    config: TextConfig

    def setup(self):
        c = self.config
        axes = ("vocab", c.vocab_size), ("embed", c.width)
        self.embedding = weight(self, "embedding", nn.initializers.normal(c.init_std), *axes)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[...] ids -> [..., D]."""
        table = gather_weights(self.embedding.astype(dtype), ("vocab", "embed"))
        return jnp.take(table, tokens, axis=0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], the tied head."""
        table = self.embedding.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def output_head(config: TextConfig) -> Linear:
    """The untied head, D -> V."""
    return Linear(
        (("embed", config.width),), (("vocab", config.vocab_size),), False, config.init_std
    )


def declare_language(config: TextConfig, key: jax.Array) -> Params:
    """Initial weights, boxed with logical axes; layers stacked on axis "layers"."""
    table_key, layer_key, head_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 2, config.width))
    angles = jnp.zeros((1, 2, config.head_width // 2))
    params = {
        "embed": declare(TokenTable(config), table_key, jnp.zeros((1,), jnp.int32), jnp.float32),
        "layers": declare_stack(LanguageLayer(config), layer_key, config.depth, x, angles, angles),
        "final_norm": declare(RMSNorm(config.width, config.rms_eps), table_key, x),
    }
    if not config.tied:
        params["head"] = declare(output_head(config), head_key, x)
    return params


def embed_tokens(
    params: Params, config: TextConfig, tokens: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """[...] ids -> [..., D]."""
    return call(TokenTable(config), params["embed"], tokens, dtype)


def run_language(
    params: Params,
    config: TextConfig,
    x: jax.Array,
    positions: jax.Array,
    *,
    layer_loop: str,
    remat: str,
    keep_kv: bool = False,
    attend: Attend = causal_attention,
    per_layer: Any = None,
) -> tuple[jax.Array, list[Any]]:
    """All layers and the final norm over whole rows.

    Args:
      params: weights as declared by `declare_language`, unboxed.
      config: the language model.
      x: [B, T, D] embedded tokens.
      positions: int32 [B, 3, T].
      layer_loop, remat: see `layers.run_layers`.
      keep_kv: also return every layer's keys and values.
      attend: (q, k, v) of a whole row -> values; with `per_layer`, (q, k, v, that layer's part).
      per_layer: a tree whose leaves lead with L, handed out layer by layer to `attend`.

    Returns:
      (hidden [B, T, D], per layer (k, v) [B, T, K, H] or None).
    """
    angles = mrope_angles(positions, config.head_width, config.rope_theta, config.mrope_section)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    layer = LanguageLayer(config)

    def body(x, layer_inputs):
        weights, extra = layer_inputs
        see = attend if per_layer is None else functools.partial(_with_last, attend, extra)
        x, key_value = call(layer, weights, x, cos, sin, see)
        return x, key_value if keep_kv else None

    stacked = (params["layers"], per_layer)
    x, kept = run_layers(body, x, stacked, layer_loop=layer_loop, remat=remat)
    return final_norm(params, config, x), kept


def decode_language(
    layers: list[Params],
    params: Params,
    config: TextConfig,
    x: jax.Array,
    positions: jax.Array,
    context: DecodeContext,
    cache: list[Shared],
    step: jax.Array,
) -> tuple[jax.Array, list[Shared]]:
    """One token of every completion through all layers, unrolled: a scan would copy the cache.

    Args:
      layers: per-layer weights, from `layers.unstack`.
      params: for the final norm.
      config: the language model.
      x: [Q, G, D] embedded tokens.
      positions: int32 [Q, G], the same on all three axes.
      context: prompts, and the policies before them.
      cache: per layer [Q, G, K, S, H].
      step: int scalar, the slot of this token.

    Returns:
      (hidden [Q, G, D], the cache with slot `step` written).
    """
    angles = text_angles(positions, config.head_width, config.rope_theta)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    layer, written = LanguageLayer(config), []
    prefixes = context.prefix or [None] * len(layers)
    for weights, own, trunk, prefix in zip(layers, cache, context.trunk, prefixes, strict=True):
        x, own = call(
            layer, weights, x, cos, sin, own, step, context, trunk, prefix, method="decode"
        )
        written.append(own)
    return final_norm(params, config, x), written


def _with_last(attend, extra, q, k, v):
    return attend(q, k, v, extra)


def final_norm(params: Params, config: TextConfig, x: jax.Array) -> jax.Array:
    """The norm before the head."""
    return call(RMSNorm(config.width, config.rms_eps), params["final_norm"], x)


def head_logits(params: Params, config: TextConfig, hidden: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., V], by the tied table or the head."""
    if config.tied:
        logits = call(TokenTable(config), params["embed"], hidden, method="logits")
    else:
        head = output_head(config)
        logits = call(head, params["head"], hidden, out_dtype=jnp.dtype(jnp.float32))
    return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "vocab")
