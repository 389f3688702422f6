"""Sample completions: one jitted prefill, one `lax.while_loop` decode with a KV cache.

In: a Batch of Q prompts. Out: Rollouts [Q, G]. The prompt's keys and values are computed once and
shared by its G completions. A sample depends only on (seed, step, prompt id, view, sample number):
its key is folded in from these down to the decode step, so neither the batch it shares nor the
bucket nor the number of devices changes it (up to float noise in the logits).

Source: inverse-CDF sampling from one uniform number a token; top-p, arXiv:1904.09751.
Next: trimpi_jax/rollouts/groups.py
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.types import Batch, Rollouts

NEVER = -1e30  # a logit that no sample can have; finite, so that 0 * NEVER stays a number


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Static settings: each combination is one compiled program per bucket.

    temperature 0 is greedy (and then top_p must be 1).
    """

    completions: int  # G
    max_new_tokens: int  # S
    temperature: float = 1.0
    top_p: float = 1.0
    dtype: str = "float32"

    def __post_init__(self):
        problems = []
        if self.completions < 1 or self.max_new_tokens < 1:
            problems.append("completions and max_new_tokens must be >= 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            problems.append("temperature >= 0 and 0 < top_p <= 1")
        if self.temperature == 0 and (self.top_p != 1 or self.completions != 1):
            problems.append("greedy decoding (temperature 0) takes top_p 1 and one completion")
        if problems:
            raise ValueError(f"sampler: {'; '.join(problems)}; got {self}")


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


def make_sampler(
    config: VLMConfig, settings: SamplerSettings, vocabulary: int
) -> Callable[[Any, Batch, jax.Array, np.ndarray], Rollouts]:
    """A jitted `sample(params, prompts, key, prompt_ids) -> Rollouts`; make it once.

    Args:
        config: of the model.
        settings: see `SamplerSettings`.
        vocabulary: number of ids that the tokenizer knows.
    """
    allowed = allowed_tokens(config, vocabulary)[None, None]
    stop_ids = np.asarray(config.eos_token_ids, np.int32)[None, None]
    num_samples, num_steps = settings.completions, settings.max_new_tokens

    def sample(params: Any, prompts: Batch, key: jax.Array, ids: jax.Array) -> Rollouts:
        visual = vlm.encode_images(
            params,
            config,
            prompts.patches,
            prompts.patch_hw,
            prompts.patch_segment,
            dtype=settings.dtype,
        )
        last, prompt_kv = vlm.prefill(
            params,
            config,
            prompts.tokens,
            prompts.positions,
            prompts.lengths,
            visual,
            prompts.visual_index,
            dtype=settings.dtype,
        )
        keys = sample_keys(key, ids, num_samples)  # [Q, G]
        rows = prompts.tokens.shape[0]
        layers = vlm.unstack_layers(params)
        shape = (rows, num_samples, num_steps, config.text.kv_heads, config.text.head_width)
        zeros = jnp.zeros(shape, settings.dtype)
        cache = [(zeros, zeros) for _ in range(config.text.depth)]
        hidden = jnp.broadcast_to(last[:, None], (rows, num_samples, last.shape[-1]))
        finished = jnp.broadcast_to(~prompts.valid[:, None], (rows, num_samples))
        after_prompt = (prompts.lengths + prompts.rope_delta)[:, None]
        start = (
            jnp.zeros((), jnp.int32),
            hidden,
            cache,
            finished,
            jnp.zeros((rows, num_samples, num_steps), jnp.int32),
            jnp.zeros((rows, num_samples, num_steps), jnp.float32),
            jnp.zeros((rows, num_samples), jnp.int32),
        )

        def running(carry):
            step, _, _, done, *_ = carry
            return (step < num_steps) & ~jnp.all(done)

        def advance(carry):
            step, hidden, cache, done, tokens, logprobs, lengths = carry
            logits = jnp.where(allowed, vlm.logits(params, config, hidden), NEVER)
            token, logprob = choose_tokens(logits, keys, step, settings)
            token = jnp.where(done, 0, token)
            logprob = jnp.where(done, 0.0, logprob)
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=2)
            logprobs = jax.lax.dynamic_update_index_in_dim(logprobs, logprob, step, axis=2)
            lengths = lengths + (~done).astype(jnp.int32)
            done = done | jnp.any(token[..., None] == stop_ids, axis=-1)
            hidden, cache = vlm.decode_step(
                layers,
                params,
                config,
                token,
                jnp.broadcast_to(after_prompt + step, token.shape),
                prompt_kv,
                prompts.lengths,
                cache,
                step,
            )
            return step + 1, hidden, cache, done, tokens, logprobs, lengths

        _, _, _, done, tokens, logprobs, lengths = jax.lax.while_loop(running, advance, start)
        return Rollouts(tokens, logprobs, lengths, done & prompts.valid[:, None])

    return jax.jit(sample)


def sample_keys(key: jax.Array, ids: jax.Array, count: int) -> jax.Array:
    """Keys [Q, G]: folded in are the prompt's id, then the sample's number."""
    per_prompt = jax.vmap(lambda number: jax.random.fold_in(key, number))(ids)
    return jax.vmap(
        lambda one: jax.vmap(lambda number: jax.random.fold_in(one, number))(jnp.arange(count))
    )(per_prompt)


def choose_tokens(
    logits: jax.Array, keys: jax.Array, step: jax.Array, settings: SamplerSettings
) -> tuple[jax.Array, jax.Array]:
    """Next tokens and their log-probabilities under the distribution sampled from.

    Args:
        logits: float32 [Q, G, V].
        keys: [Q, G].
        step: int scalar, folded into the keys.
        settings: temperature and top_p.

    Returns:
        (int32 [Q, G], float32 [Q, G] nats).
    """
    if settings.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        scaled = logits
    else:
        scaled = logits / settings.temperature
        if settings.top_p < 1:
            scaled = keep_top_p(scaled, settings.top_p)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step))))(
            keys
        )
        below = jnp.cumsum(jax.nn.softmax(scaled, axis=-1), axis=-1)
        # the first token whose cumulated probability exceeds u * total; total is 1 up to rounding
        token = jnp.sum(below <= uniform[..., None] * below[..., -1:], axis=-1).astype(jnp.int32)
        token = jnp.minimum(token, scaled.shape[-1] - 1)
    chosen = jnp.take_along_axis(scaled, token[..., None], axis=-1)[..., 0]
    return token, chosen - jax.nn.logsumexp(scaled, axis=-1)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits outside the smallest set of most likely tokens with mass >= top_p become NEVER."""
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, NEVER)
