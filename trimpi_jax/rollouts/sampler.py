"""Sample completions: a jitted prefill, then a jitted `lax.while_loop` decode with a KV cache.

    images   -> encode_images   once per weight version, for both views and for scoring
    policy   -> read_prefix     once per policy and weight version, shared by its prompts
    prompts  -> prefill         once per prompt, shared by its G completions
    tokens   -> decode          until all rows are done; finished rows are left out now and then

Decoding reads a copy of the weights in the compute dtype, a list of layers, made by one jitted cast
whose old copy is donated. Nothing comes to the host token by token.

A sample depends only on (seed, step, prompt id, view, sample number): not on the batch it shares,
the bucket, the number of devices, or compaction (up to float noise in the logits).

Next: trimpi_jax/rollouts/prefix.py
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.language import DecodeContext, KeyValue
from trimpi_jax.ops.branches import Shared, share
from trimpi_jax.rollouts.choosing import NEVER, SamplerSettings, choose_tokens, uniforms
from trimpi_jax.sharding import constrain, gather_weights
from trimpi_jax.types import Batch, Rollouts

OWN_AXES = ("batch", None, "kv_heads", None, None)  # [Q, G, K, S, H]
STANDING_AXES = ("batch", "kv_heads", None, None)  # [Q or Z, K, T, H]


@flax.struct.dataclass
class Prefix:
    """Policies before the prompts: policy z stands before prompts z * Q / Z and following."""

    kv: list[KeyValue]  # per layer (k, v) [Z, P, K, H]
    lengths: jax.Array  # int32 [Z]


@flax.struct.dataclass
class Standing:
    """What does not change while a batch is decoded."""

    context: DecodeContext
    uniforms: jax.Array  # float32 [Q, G, S]
    after_prompt: jax.Array  # int32 [Q], position of the first token of a completion
    row: jax.Array  # int32 [Q, G], where the completion stood before any compaction


@flax.struct.dataclass
class Decoding:
    """What changes with every token; donated from one call to the next."""

    step: jax.Array  # int32 scalar, tokens chosen so far
    hidden: jax.Array  # [Q, G, D], the state that predicts the next token
    cache: list[Shared]  # per layer [Q, G, K, S, H]
    done: jax.Array  # bool [Q, G]
    tokens: jax.Array  # int32 [Q, G, S]
    logprobs: jax.Array  # float32 [Q, G, S]
    lengths: jax.Array  # int32 [Q, G]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The jitted programs of one combination of settings; make it once, with `make_sampler`."""

    settings: SamplerSettings
    prefill: Callable[..., tuple[Standing, jax.Array]]
    begin: Callable[[jax.Array, jax.Array], Decoding]
    decode: Callable[[Any, Standing, Decoding, int], Decoding]
    count_running: Callable[[Decoding], tuple[jax.Array, jax.Array, jax.Array]]
    compact: Callable[..., tuple[Standing, Decoding]]
    collect: Callable[[Rollouts, Standing, Decoding], Rollouts]


def prompt_ids(example_ids: Sequence[str], num_rows: int) -> np.ndarray:
    """uint32 [num_rows]: a number per prompt that depends on its id only; 0 for padding rows."""
    ids = np.zeros((num_rows,), np.uint32)
    ids[: len(example_ids)] = [zlib.crc32(name.encode()) for name in example_ids]
    return ids


def allowed_tokens(config: VLMConfig, vocabulary: int) -> np.ndarray:
    """bool [V]: False for image and video tokens and for ids the tokenizer does not know."""
    allowed = np.zeros((config.text.vocab_size,), bool)
    allowed[:vocabulary] = True
    allowed[
        [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]
    ] = False
    return allowed


def make_image_encoder(config: VLMConfig, dtype: str) -> Callable[[Any, Batch], jax.Array]:
    """A jitted `encode(params, batch) -> visual [Q, M, D]`."""

    def encode(params, patches, patch_hw, patch_segment):
        return vlm.encode_images(params, config, patches, patch_hw, patch_segment, dtype=dtype)

    jitted = jax.jit(encode)
    # only the images are handed over: another bucket of tokens is no new program
    return lambda params, batch: jitted(params, batch.patches, batch.patch_hw, batch.patch_segment)


def make_weight_sync(config: VLMConfig, dtype: str) -> Callable[[Any, Any], Any]:
    """A jitted `sync(params, old) -> weights` for decoding; `old` (or None) is donated.

    The copy is whole over "fsdp": every token reads all of it, and gathering it for each token
    would cost more than the token.
    """
    axes = vlm.decode_axes(config)

    def sync(params, old):
        del old  # its memory is what the new copy is written into
        return gather_weights(vlm.decode_weights(params, dtype), axes)

    return jax.jit(sync, donate_argnums=1, keep_unused=True)


def make_prefix_reader(config: VLMConfig, dtype: str) -> Callable[[Any, Batch], list[KeyValue]]:
    """A jitted `read(params, policies) -> kv`: policy documents [Z, P] as keys and values."""

    def read(params: Any, policies: Batch) -> list[KeyValue]:
        visual = vlm.encode_images(
            params, config, policies.patches, policies.patch_hw, policies.patch_segment, dtype=dtype
        )
        _, kv = vlm.prefill(
            params,
            config,
            policies.tokens,
            policies.positions,
            policies.lengths,
            visual,
            policies.visual_index,
            dtype=dtype,
        )
        return kv

    return jax.jit(read)


def make_sampler(config: VLMConfig, settings: SamplerSettings, vocabulary: int) -> Sampler:
    """The jitted programs that `sample` drives.

    Args:
        config: of the model.
        settings: see `SamplerSettings`.
        vocabulary: number of ids that the tokenizer knows.
    """
    allowed = allowed_tokens(config, vocabulary)[None, None]
    stop_ids = np.asarray(config.eos_token_ids, np.int32)[None, None]
    count, num_steps = settings.completions, settings.max_new_tokens

    def prefill(params, prompts: Batch, visual, key, ids, prefix: Prefix | None):
        last, kv = vlm.prefill(
            params,
            config,
            prompts.tokens,
            prompts.positions,
            prompts.lengths,
            visual,
            prompts.visual_index,
            dtype=settings.dtype,
            prefix=None if prefix is None else prefix.kv,
            prefix_lengths=None if prefix is None else prefix.lengths,
        )
        rows = prompts.tokens.shape[0]
        standing = Standing(
            context=DecodeContext(
                trunk=_laid([share(one) for one in kv]),
                trunk_lengths=prompts.lengths,
                prefix=None if prefix is None else _laid([share(one) for one in prefix.kv]),
                prefix_lengths=None if prefix is None else prefix.lengths,
            ),
            uniforms=constrain(uniforms(key, ids, count, num_steps), "batch"),
            after_prompt=prompts.lengths + prompts.rope_delta,
            row=constrain(
                jnp.arange(rows * count, dtype=jnp.int32).reshape(rows, count), "batch", None
            ),
        )
        return standing, constrain(last, "batch", None)

    def begin(last, valid):
        rows = last.shape[0]
        shape = (rows, count, config.text.kv_heads, num_steps, config.text.head_width)

        def of_rows(leaf):  # zeros lie nowhere by themselves: every device would make them all
            return constrain(leaf, "batch", *(None,) * (leaf.ndim - 1))

        def empty():
            return constrain(jnp.zeros(shape, settings.dtype), *OWN_AXES)

        return Decoding(
            step=jnp.zeros((), jnp.int32),
            hidden=of_rows(jnp.broadcast_to(last[:, None], (rows, count, last.shape[-1]))),
            cache=[Shared(empty(), empty()) for _ in range(config.text.depth)],
            done=of_rows(jnp.broadcast_to(~valid[:, None], (rows, count))),
            tokens=of_rows(jnp.zeros((rows, count, num_steps), jnp.int32)),
            logprobs=of_rows(jnp.zeros((rows, count, num_steps), jnp.float32)),
            lengths=of_rows(jnp.zeros((rows, count), jnp.int32)),
        )

    def decode(weights, standing: Standing, start: Decoding, until):
        def running(now: Decoding):
            return (now.step < until) & ~jnp.all(now.done)

        def advance(now: Decoding) -> Decoding:
            logits = jnp.where(allowed, vlm.logits(weights, config, now.hidden), NEVER)
            uniform = jax.lax.dynamic_index_in_dim(
                standing.uniforms, now.step, axis=2, keepdims=False
            )
            token, logprob = choose_tokens(logits, uniform, settings)
            token = jnp.where(now.done, 0, token)
            logprob = jnp.where(now.done, 0.0, logprob)
            stopped = jnp.any(token[..., None] == stop_ids, axis=-1)
            hidden, cache = vlm.decode_step(
                weights,
                config,
                token,
                jnp.broadcast_to(standing.after_prompt[:, None] + now.step, token.shape),
                standing.context,
                now.cache,
                now.step,
            )
            return Decoding(
                step=now.step + 1,
                hidden=hidden,
                cache=cache,
                done=now.done | stopped,
                tokens=_put(now.tokens, token, now.step),
                logprobs=_put(now.logprobs, logprob, now.step),
                lengths=now.lengths + (~now.done).astype(jnp.int32),
            )

        return jax.lax.while_loop(running, advance, start)

    return Sampler(
        settings=settings,
        prefill=jax.jit(prefill),
        begin=jax.jit(begin),
        decode=jax.jit(decode, donate_argnums=2),
        count_running=jax.jit(_count_running),
        compact=jax.jit(_compact, static_argnums=(2, 3, 4)),
        collect=jax.jit(_collect, donate_argnums=0),
    )


def decode(
    sampler: Sampler,
    weights: Any,
    standing: Standing,
    last: jax.Array,
    valid: jax.Array,
    *,
    keep_rows: bool = False,
) -> Rollouts:
    """Completions of Q prompts, [Q, G] each, as device arrays.

    Args:
        sampler: from `make_sampler`.
        weights: the actor's, from `make_weight_sync`.
        standing, last: from `sampler.prefill`.
        valid: bool [Q], False = a row of padding, which says nothing.
        keep_rows: whether compaction must leave the prompts where they are (policies are shared
            by neighbours).
    """
    settings, until = sampler.settings, 0
    decoding = sampler.begin(last, valid)
    if not settings.compact_every:
        decoding = sampler.decode(weights, standing, decoding, settings.max_new_tokens)
        stopped = decoding.done & valid[:, None]
        return Rollouts(decoding.tokens, decoding.logprobs, decoding.lengths, stopped)
    rows, count = decoding.done.shape
    keep_rows = keep_rows or _is_sharded(decoding.done)  # a group stays on its device, too
    found = Rollouts(
        jnp.zeros_like(decoding.tokens),
        jnp.zeros_like(decoding.logprobs),
        jnp.zeros_like(decoding.lengths),
        jnp.zeros_like(decoding.done),
    )
    while until < settings.max_new_tokens:
        until = min(until + settings.compact_every, settings.max_new_tokens)
        decoding = sampler.decode(weights, standing, decoding, until)
        running = Running(*(int(n) for n in jax.device_get(sampler.count_running(decoding))))
        if not running.completions:
            break
        shape = fewer_rows(rows, count, running, keep_rows=keep_rows)
        if until < settings.max_new_tokens and shape != (rows, count):
            found = sampler.collect(found, standing, decoding)
            standing, decoding = sampler.compact(standing, decoding, *shape, keep_rows)
            rows, count = shape
    found = sampler.collect(found, standing, decoding)
    return dataclasses.replace(found, stopped=found.stopped & valid[:, None])


def _laid(layers: list[Shared]) -> list[Shared]:
    """Keys and values [Q or Z, K, T, H] where their rows and heads lie."""
    return jax.tree.map(lambda leaf: constrain(leaf, *STANDING_AXES), layers)


class Running(NamedTuple):
    """Completions that are not done yet."""

    prompts: int  # with at least one
    most: int  # of one prompt
    completions: int  # in all


def _count_running(decoding: Decoding) -> tuple[jax.Array, jax.Array, jax.Array]:
    running = jnp.sum(~decoding.done, axis=1)
    return jnp.sum(running > 0), jnp.max(running), jnp.sum(running)


def fewer_rows(rows: int, count: int, running: Running, *, keep_rows: bool) -> tuple[int, int]:
    """The smallest of few shapes [prompts, completions] that still holds what is running.

    Prompts and completions are halved; or, where few completions of many prompts are left, each
    becomes a prompt of its own, with a copy of the prompt's keys and values.
    """
    halved = rows if keep_rows else _halved(rows, running.prompts), _halved(count, running.most)
    alone = 2 ** (running.completions - 1).bit_length()
    if keep_rows or 2 * alone > halved[0] * halved[1]:  # a copy of prompts must be worth it
        return halved
    return alone, 1


def _halved(size: int, needed: int) -> int:
    """`size` halved while the half still holds `needed`: few shapes, few programs."""
    while size % 2 == 0 and size // 2 >= max(needed, 1):
        size //= 2
    return size


def _is_sharded(leaf: jax.Array) -> bool:
    return len(leaf.sharding.device_set) > 1


def _compact(
    standing: Standing, decoding: Decoding, rows: int, count: int, keep_rows: bool
) -> tuple[Standing, Decoding]:
    """What still runs, in the given shape; see `fewer_rows`."""
    completions = decoding.done.shape[1]
    by_prompt: Any = slice(None)
    if keep_rows:  # policies stand before neighbours, and no prompt changes its device
        order = jnp.argsort(decoding.done, axis=1, stable=True)[:, :count]
    elif count == 1 and completions > 1:  # every completion becomes a prompt of its own
        flat = jnp.argsort(decoding.done.reshape(-1), stable=True)[:rows]
        by_prompt, order = flat // completions, (flat % completions)[:, None]
    else:
        by_prompt = jnp.argsort(jnp.all(decoding.done, axis=1), stable=True)[:rows]
        order = jnp.argsort(decoding.done[by_prompt], axis=1, stable=True)[:, :count]

    def of_prompts(leaf):
        return leaf[by_prompt]

    def of_completions(leaf):
        index = order.reshape(*order.shape, *[1] * (leaf.ndim - 2))
        return jnp.take_along_axis(of_prompts(leaf), index, axis=1)

    context = standing.context
    trunk = jax.tree.map(of_prompts, context.trunk)
    lengths = of_prompts(context.trunk_lengths)
    standing = Standing(
        context=dataclasses.replace(context, trunk=trunk, trunk_lengths=lengths),
        uniforms=of_completions(standing.uniforms),
        after_prompt=of_prompts(standing.after_prompt),
        row=of_completions(standing.row),
    )
    step, rest = decoding.step, dataclasses.replace(decoding, step=None)
    return standing, dataclasses.replace(jax.tree.map(of_completions, rest), step=step)


def _collect(found: Rollouts, standing: Standing, decoding: Decoding) -> Rollouts:
    """Write what has been decoded so far to the rows where it belongs."""

    def put(into, leaf):
        flat = into.reshape(-1, *into.shape[2:])  # [Q G ...] -> [(Q G) ...]
        at = standing.row.reshape(-1)
        return flat.at[at].set(leaf.reshape(-1, *leaf.shape[2:])).reshape(into.shape)

    return Rollouts(
        put(found.tokens, decoding.tokens),
        put(found.logprobs, decoding.logprobs),
        put(found.lengths, decoding.lengths),
        put(found.stopped, decoding.done),
    )


def _put(into: jax.Array, values: jax.Array, step: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(into, values, step, axis=2)
