"""From logits to the next token: temperature, then top-k, then top-p inside it, then one draw.

    p = softmax(top_p(top_k(z / temperature)));   token = first v with p_1 + ... + p_v > u

One uniform number `u` a token, so a sample is a function of its key and of the distribution only.

Source: inverse-CDF sampling; top-p, arXiv:1904.09751.
Next: trimpi_jax/rollouts/sampler.py
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -1e30  # a logit that no sample can have; finite, so that 0 * NEVER stays a number
CUMULATIVE_BLOCK = 128  # entries summed by one matrix product; a long cumsum is slow everywhere


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Static settings: each combination is one set of compiled programs per bucket.

    temperature 0 is greedy (and then top_k is 0, top_p 1 and there is one completion).
    """

    completions: int  # G
    max_new_tokens: int  # S
    temperature: float = 1.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    dtype: str = "float32"
    compact_every: int = 0  # decode steps between compactions of finished rows; 0 = never

    def __post_init__(self):
        problems = []
        if self.completions < 1 or self.max_new_tokens < 1:
            problems.append("completions and max_new_tokens must be >= 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            problems.append("temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k or self.completions != 1):
            problems.append(
                "greedy decoding (temperature 0) takes top_p 1, top_k 0 and one completion"
            )
        if self.compact_every < 0:
            problems.append("compact_every must be >= 0")
        if problems:
            raise ValueError(f"sampler: {'; '.join(problems)}; got {self}")


def choose_tokens(
    logits: jax.Array, uniform: jax.Array, settings: SamplerSettings
) -> tuple[jax.Array, jax.Array]:
    """Next tokens and their log-probabilities under the distribution sampled from.

    Args:
        logits: float32 [..., V].
        uniform: float32 [...] in [0, 1); not looked at when greedy.
        settings: temperature, top_k and top_p.

    Returns:
        (int32 [...], float32 [...] nats).
    """
    if settings.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, _chosen(logits, token) - jax.nn.logsumexp(logits, axis=-1)
    scaled = logits / settings.temperature
    names = None  # ids of the entries, where they are not their own index
    if 0 < settings.top_k < logits.shape[-1]:
        scaled, names = jax.lax.top_k(scaled, settings.top_k)
    if settings.top_p < 1:
        scaled = keep_top_p(scaled, settings.top_p)
    peak = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - peak)
    below = cumulative(weights)
    total = below[..., -1:]
    # the first entry whose cumulated weight exceeds u * total
    at = jnp.sum(below <= uniform[..., None] * total, axis=-1).astype(jnp.int32)
    at = jnp.minimum(at, scaled.shape[-1] - 1)
    logprob = _chosen(scaled, at) - peak[..., 0] - jnp.log(jnp.sum(weights, axis=-1))
    return (at if names is None else _chosen(names, at)), logprob


def cumulative(values: jax.Array) -> jax.Array:
    """Cumulated sums along the last axis, by blocks: sums inside as one matrix product."""
    size = values.shape[-1]
    blocks = -(-size // CUMULATIVE_BLOCK)
    if blocks == 1:
        return jnp.cumsum(values, axis=-1)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, blocks * CUMULATIVE_BLOCK - size)]
    cut = jnp.pad(values, padding).reshape(*values.shape[:-1], blocks, CUMULATIVE_BLOCK)
    triangle = np.triu(np.ones((CUMULATIVE_BLOCK, CUMULATIVE_BLOCK), np.float32))
    inside = jnp.einsum("...v,vw->...w", cut, triangle, precision="highest")
    before = jnp.cumsum(inside[..., -1], axis=-1) - inside[..., -1]
    return (inside + before[..., None]).reshape(*values.shape[:-1], -1)[..., :size]


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits outside the smallest set of most likely tokens with mass >= top_p become NEVER."""
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logits >= smallest, logits, NEVER)


def uniforms(key: jax.Array, ids: jax.Array, completions: int, steps: int) -> jax.Array:
    """float32 [Q, G, S] in [0, 1): a function of the key, the prompt's id, sample number and step.

    Neither the batch that a prompt shares nor S changes a number.

    Args:
        key: of (seed, step, view).
        ids: uint32 [Q], see `prompt_ids`.
        completions: G.
        steps: S.
    """

    def draw(number, sample, step):
        folded = jax.random.fold_in(jax.random.fold_in(key, number), sample)
        return jax.random.uniform(jax.random.fold_in(folded, step))

    along_steps = jax.vmap(draw, (None, None, 0))
    along_samples = jax.vmap(along_steps, (None, 0, None))
    along_prompts = jax.vmap(along_samples, (0, None, None))
    return along_prompts(ids, jnp.arange(completions), jnp.arange(steps))


def _chosen(values: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, at[..., None], axis=-1)[..., 0]
