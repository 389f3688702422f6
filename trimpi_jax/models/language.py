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
from trimpi_jax.ops.attention import causal_attention, shared_prompt_attention
from trimpi_jax.ops.kernels import flash_causal
from trimpi_jax.ops.rotary import mrope_angles, rotate, text_angles
from trimpi_jax.sharding import constrain, gather_weights, on_shards

KeyValue = tuple[jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) of whole rows -> values


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
        prompt_kv: KeyValue,
        prompt_lengths: jax.Array,
        cache: KeyValue,
        step: jax.Array,
    ) -> tuple[jax.Array, KeyValue]:
        """One token of G completions per prompt, [Q, G, D]; writes slot `step` of the cache."""
        q, k, v = self._project(x, cos, sin)
        zero = jnp.zeros((), jnp.int32)
        at = (zero, zero, jnp.asarray(step, jnp.int32), zero, zero)
        own_k, own_v = (
            jax.lax.dynamic_update_slice(old, new[:, :, None].astype(old.dtype), at)
            for old, new in zip(cache, (k, v), strict=True)
        )
        attended = shared_prompt_attention(q, *prompt_kv, prompt_lengths, own_k, own_v, step)
        return self._finish(x, attended), (own_k, own_v)

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
) -> tuple[jax.Array, list[Any]]:
    """All layers and the final norm over whole rows.

    Args:
      params: weights as declared by `declare_language`, unboxed.
      config: the language model.
      x: [B, T, D] embedded tokens.
      positions: int32 [B, 3, T].
      layer_loop, remat: see `layers.run_layers`.
      keep_kv: also return every layer's keys and values.
      attend: (q, k, v) of a whole row -> values.

    Returns:
      (hidden [B, T, D], per layer (k, v) [B, T, K, H] or None).
    """
    angles = mrope_angles(positions, config.head_width, config.rope_theta, config.mrope_section)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    layer = LanguageLayer(config)

    def body(x, weights):
        x, key_value = call(layer, weights, x, cos, sin, attend)
        return x, key_value if keep_kv else None

    x, kept = run_layers(body, x, params["layers"], layer_loop=layer_loop, remat=remat)
    return final_norm(params, config, x), kept


def decode_language(
    layers: list[Params],
    params: Params,
    config: TextConfig,
    x: jax.Array,
    positions: jax.Array,
    prompt_kv: list[KeyValue],
    prompt_lengths: jax.Array,
    cache: list[KeyValue],
    step: jax.Array,
) -> tuple[jax.Array, list[KeyValue]]:
    """One token of every completion through all layers, unrolled: a scan would copy the cache.

    Args:
      layers: per-layer weights, from `layers.unstack`.
      params: for the final norm.
      config: the language model.
      x: [Q, G, D] embedded tokens.
      positions: int32 [Q, G], the same on all three axes.
      prompt_kv: per layer (k, v) [Q, T, K, H].
      prompt_lengths: int32 [Q].
      cache: per layer (k, v) [Q, G, S, K, H].
      step: int scalar, the slot of this token.

    Returns:
      (hidden [Q, G, D], the cache with slot `step` written).
    """
    angles = text_angles(positions, config.head_width, config.rope_theta)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    layer, written = LanguageLayer(config), []
    for weights, shared, own in zip(layers, prompt_kv, cache, strict=True):
        x, own = call(
            layer, weights, x, cos, sin, shared, prompt_lengths, own, step, method="decode"
        )
        written.append(own)
    return final_norm(params, config, x), written


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
