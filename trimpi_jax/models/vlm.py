"""The whole model as pure functions: weights and arrays in, arrays out.

    patches -> encode_images -> visual tokens
                                     |  visual_index: which token of the row is which visual token
    tokens  -> embedding  ------> hidden_states -> logits | token_logprobs
                             |--> branch_hidden_states: a prompt and its R completions in one row
                             '--> prefill -> decode_step, decode_step, ...

Weights are float32; `dtype` is what they are cast to when used. Norm statistics, softmax, rotary
angles, logits and log-probabilities are float32 always. Nothing here is jitted: the caller does it.

Next: trimpi_jax/models/lora.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.language import (
    DecodeContext,
    KeyValue,
    causal_kernel,
    declare_language,
    decode_language,
    embed_tokens,
    head_logits,
    run_language,
)
from trimpi_jax.models.layers import Params, is_box, unstack
from trimpi_jax.models.vision import declare_vision, encode_patches
from trimpi_jax.ops.attention import MASKED
from trimpi_jax.ops.branches import Shared, branch_attention
from trimpi_jax.ops.logprobs import chunked_logprobs
from trimpi_jax.sharding import batch_degree, constrain
from trimpi_jax.types import Batch


def init_params(config: VLMConfig, key: jax.Array) -> Params:
    """Random weights: float32, a plain nested dict, layers stacked on a leading axis.

    Normal with the config's `init_std`, zero biases, unit norm scales. Under `jax.jit` only the
    weights are computed.
    """
    return jax.tree.map(lambda box: box.value, _declare(config, key), is_leaf=is_box)


def logical_axes(config: VLMConfig) -> Params:
    """The tree of `init_params` with the logical axis names of each weight as leaves."""
    boxed = jax.eval_shape(lambda: _declare(config, jax.random.key(0)))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def param_shapes(config: VLMConfig) -> Params:
    """The tree of `init_params` with shapes and dtypes as leaves; computes nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def encode_images(
    params: Params,
    config: VLMConfig,
    patches: jax.Array,
    patch_hw: jax.Array,
    patch_segment: jax.Array,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Visual tokens of every row, in slot order.

    Args:
      params: the weights.
      config: the model.
      patches: uint8 [B, W, P, C * patch * patch].
      patch_hw: int32 [B, W, P, 2].
      patch_segment: int32 [B, W, P], 0 = empty slot.
      dtype: of the activations.
      remat: what the backward pass keeps, see `layers.REMAT`.

    Returns:
      [B, M, D], M = W * P / merge_size^2. W = 0 skips the tower and gives M = 0.
    """
    if patches.shape[1] == 0:
        return jnp.zeros((patches.shape[0], 0, config.text.width), dtype)
    return encode_patches(
        params["vision"],
        config.vision,
        patches,
        patch_hw,
        patch_segment,
        dtype=jnp.dtype(dtype),
        layer_loop=config.layer_loop,
        remat=remat,
        attention=config.attention,
    )


def hidden_states(
    params: Params,
    config: VLMConfig,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    visual: jax.Array,
    visual_index: jax.Array,
    *,
    segments: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """Hidden states after the final norm, ready for the head.

    Args:
      params: the weights.
      config: the model.
      tokens: int32 [B, T], right-padded.
      positions: int32 [B, 3, T].
      lengths: int32 [B]; padding comes back as zeros.
      visual: [B, M, D] from `encode_images`.
      visual_index: int32 [B, T], slot in `visual`, -1 = a text token.
      segments: int32 [B, T] of packed rows, see `Batch`; None = a row is one example.
      dtype: of the activations.
      remat: what the backward pass keeps, see `layers.REMAT`.

    Returns:
      [B, T, D].
    """
    x = _embed(params, config, tokens, visual, visual_index, jnp.dtype(dtype))
    hidden, _ = run_language(
        params["language"],
        config.text,
        x,
        positions,
        layer_loop=config.layer_loop,
        remat=remat,
        attend=causal_kernel(config.attention, segments),
    )
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.where(real[..., None], hidden, jnp.zeros((), hidden.dtype))


def logits(params: Params, config: VLMConfig, hidden: jax.Array) -> jax.Array:
    """z = hidden W, float32 [..., V] from [..., D]."""
    return head_logits(params["language"], config.text, hidden)


def apply(
    params: Params, config: VLMConfig, batch: Batch, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Logits of a batch, float32 [B, T, V]; for small models and tests, see `token_logprobs`."""
    visual = encode_images(
        params, config, batch.patches, batch.patch_hw, batch.patch_segment, dtype=dtype
    )
    hidden = hidden_states(
        params,
        config,
        batch.tokens,
        batch.positions,
        batch.lengths,
        visual,
        batch.visual_index,
        dtype=dtype,
    )
    return logits(params, config, hidden)


def branch_hidden_states(
    params: Params,
    config: VLMConfig,
    prompts: Batch,
    visual: jax.Array,
    completions: jax.Array,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> jax.Array:
    """States that predict every token of R completions of each prompt, the prompt computed once.

        row       p p p p | a a a | b b b      T + R (S - 1) tokens; equals R rows of T + S - 1
        returns           a0 a1 a2 a3, b0 ...  a0 is predicted by the last p

    Args:
      params: the weights.
      config: the model.
      prompts: Q rows; its patches are not looked at.
      visual: [Q, M, D] of the prompts, from `encode_images`.
      completions: int32 [Q, R, S], right-padded.
      dtype: of the activations.
      remat: keep only layer inputs for the backward pass.

    Returns:
      [Q, R, S, D] after the final norm, ready for the head; junk where there is no token.
    """
    rows, branches, size = completions.shape
    length = prompts.tokens.shape[1]
    x = _embed(params, config, prompts.tokens, visual, prompts.visual_index, jnp.dtype(dtype))
    said = embed_tokens(params["language"], config.text, completions[:, :, :-1], x.dtype)
    # [Q R S-1 D] -> [Q (R S-1) D], behind the prompt
    x = constrain(
        jnp.concatenate([x, said.reshape(rows, branches * (size - 1), x.shape[-1])], axis=1),
        "batch",
    )
    after = (prompts.lengths + prompts.rope_delta)[:, None] + jnp.arange(size - 1)[None]
    after = jnp.broadcast_to(after[:, None, None], (rows, 3, branches, size - 1))
    after = after.reshape(rows, 3, branches * (size - 1))
    positions = jnp.concatenate([prompts.positions, after], axis=2)

    def attend(q, k, v):
        trunk = [leaf[:, :length] for leaf in (q, k, v)]
        own = [
            leaf[:, length:].reshape(rows, branches, size - 1, *leaf.shape[2:])
            for leaf in (q, k, v)
        ]
        on_trunk = causal_kernel(config.attention)(trunk[0], trunk[1], trunk[2])
        on_own = branch_attention(own[0], own[1], own[2], trunk[1], trunk[2], prompts.lengths)
        on_own = on_own.reshape(rows, branches * (size - 1), *q.shape[2:])
        return jnp.concatenate([on_trunk, on_own], axis=1)

    hidden, _ = run_language(
        params["language"],
        config.text,
        x,
        positions,
        layer_loop=config.layer_loop,
        remat=remat,
        attend=attend,
    )
    last = jnp.maximum(prompts.lengths - 1, 0)[:, None, None]
    first = jnp.take_along_axis(hidden[:, :length], last, axis=1)[:, None]
    first = jnp.broadcast_to(first, (rows, branches, 1, hidden.shape[-1]))
    others = hidden[:, length:].reshape(rows, branches, size - 1, hidden.shape[-1])
    return jnp.concatenate([first, others], axis=2)


def token_logprobs(
    params: Params,
    config: VLMConfig,
    hidden: jax.Array,
    targets: jax.Array,
    chunk: int,
    *,
    needed: jax.Array | None = None,
    allowed: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the entropy of the distribution, per token, in nats.

    Args:
      params: the weights.
      config: the model.
      hidden: [..., D].
      targets: int32 [...].
      chunk: tokens a device whose logits exist at a time; `chunk * V * 4` bytes.
      needed: bool [...], where the numbers are wanted; elsewhere they are 0. None = everywhere.
      allowed: bool [V]; other tokens have probability 0. None = all.
      temperature: the logits are divided by it.

    Returns:
      (logprobs float32 [...], entropy float32 [...]).
    """

    def head(h):
        z = logits(params, config, h) / temperature
        return z if allowed is None else jnp.where(allowed[None], z, MASKED)

    return chunked_logprobs(head, hidden, targets, chunk * batch_degree(), needed)


def prefill(
    params: Params,
    config: VLMConfig,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    visual: jax.Array,
    visual_index: jax.Array,
    *,
    dtype: Any = jnp.float32,
    prefix: list[KeyValue] | None = None,
    prefix_lengths: jax.Array | None = None,
) -> tuple[jax.Array, list[KeyValue]]:
    """Reads the prompts once.

    Args:
      As for `hidden_states`, one row per prompt.
      prefix: per layer (k, v) [Z, P, K, H] of what stands before the rows, each for Q / Z
        neighbouring rows; the rows' positions go on from there.
      prefix_lengths: int32 [Z].

    Returns:
      (last_hidden [B, D] of the last real token, per layer (k, v) [B, T, K, H]).
    """
    x = _embed(params, config, tokens, visual, visual_index, jnp.dtype(dtype))

    def behind_prefix(q, k, v, kv):
        def grouped(leaf):  # [(Z c) T ...] -> [Z c T ...]
            return leaf.reshape(kv[0].shape[0], -1, *leaf.shape[1:])

        assert prefix_lengths is not None
        seen = branch_attention(grouped(q), grouped(k), grouped(v), kv[0], kv[1], prefix_lengths)
        return seen.reshape(q.shape)

    hidden, prompt_kv = run_language(
        params["language"],
        config.text,
        x,
        positions,
        layer_loop=config.layer_loop,
        remat="none",
        keep_kv=True,
        attend=causal_kernel(config.attention) if prefix is None else behind_prefix,
        per_layer=None if prefix is None else jax.tree.map(lambda *kv: jnp.stack(kv), *prefix),
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0], prompt_kv


def decode_step(
    weights: Params,
    config: VLMConfig,
    tokens: jax.Array,
    positions: jax.Array,
    context: DecodeContext,
    cache: list[Shared],
    step: jax.Array,
) -> tuple[jax.Array, list[Shared]]:
    """One token further in each of G completions of Q prompts; the prompt is kept once.

    Args:
      weights: from `decode_weights`.
      config: the model.
      tokens: int32 [Q, G], the tokens just sampled.
      positions: int32 [Q, G], lengths + rope_delta + step, the same on all three axes.
      context: the prompts' keys and values, from `prefill` through `branches.share`.
      cache: per layer [Q, G, K, S, H]; its dtype is that of the activations.
      step: int scalar in [0, S), the slot these tokens take.

    Returns:
      (hidden [Q, G, D] ready for `logits`, the cache).
    """
    language = weights["language"]
    x = embed_tokens(language, config.text, tokens, cache[0].k.dtype)
    return decode_language(
        language["layers"], language, config.text, x, positions, context, cache, step
    )


def decode_weights(params: Params, dtype: Any) -> Params:
    """The language model for decoding: layers as a list, matrices in `dtype`, norms as they are.

    A scan over stacked layers would copy the cache every step; casting inside the loop would read
    float32 weights every step. Make it once per version of the weights; `logits` takes it as well.
    """

    def cast(path, leaf):
        return leaf if path[-1].key == "scale" else leaf.astype(dtype)

    language = jax.tree_util.tree_map_with_path(cast, params["language"])
    return {"language": {**language, "layers": unstack(language["layers"])}}


def decode_axes(config: VLMConfig) -> Params:
    """The tree of `decode_weights` with the logical axis names of each weight as leaves."""
    language = logical_axes(config)["language"]
    layer = jax.tree.map(
        lambda names: names[1:], language["layers"], is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    return {"language": {**language, "layers": [layer] * config.text.depth}}


def _declare(config: VLMConfig, key: jax.Array) -> Params:
    vision_key, language_key = jax.random.split(key)
    return {
        "vision": declare_vision(config.vision, vision_key),
        "language": declare_language(config.text, language_key),
    }


def _embed(params, config, tokens, visual, visual_index, dtype):
    """Token embeddings, with each visual token in the place of its placeholder."""
    x = embed_tokens(params["language"], config.text, tokens, dtype)
    if visual.shape[1]:
        slot = jnp.maximum(visual_index, 0)[..., None]
        placed = jnp.take_along_axis(visual.astype(dtype), slot, axis=1)
        x = jnp.where((visual_index >= 0)[..., None], placed, x)
    return constrain(x, "batch")
