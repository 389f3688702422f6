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

NEVER = -1e30  # a logit that no sample can have; finite, so that 0 * NEVER stays a number
BLOCK = 128  # entries of a vocabulary that are added up together


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
    at = inverse_cdf(weights, uniform)
    logprob = _chosen(scaled, at) - peak[..., 0] - jnp.log(jnp.sum(weights, axis=-1))
    return (at if names is None else _chosen(names, at)), logprob


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first entry whose cumulated weight exceeds `uniform` times the total.

    By blocks: sums of blocks, then the entries of one block, since a cumulated sum over a whole
    vocabulary costs more than all else in a step of a small model.

    Args:
        weights: float32 [..., V], not negative, not all 0.
        uniform: float32 [...] in [0, 1).

    Returns:
        int32 [...]; its weight is never 0.
    """
    size = weights.shape[-1]
    blocks = -(-size // BLOCK)
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * BLOCK - size)]
    cut = jnp.pad(weights, padding).reshape(*weights.shape[:-1], blocks, BLOCK)
    up_to = jnp.cumsum(jnp.sum(cut, axis=-1), axis=-1)
    target = (uniform * up_to[..., -1])[..., None]
    block = jnp.minimum(jnp.sum(up_to <= target, axis=-1), blocks - 1)
    inside = jnp.take_along_axis(cut, block[..., None, None], axis=-2)[..., 0, :]
    before = jnp.where(block > 0, _chosen(up_to, jnp.maximum(block - 1, 0)), 0.0)[..., None]
    at = jnp.sum(before + jnp.cumsum(inside, axis=-1) <= target, axis=-1)
    # the two ways of adding up may differ in the last bit: never past the last positive weight
    places = jnp.arange(BLOCK).reshape((1,) * (inside.ndim - 1) + (BLOCK,))
    last = jnp.max(jnp.where(inside > 0, places, 0), axis=-1)
    return (block * BLOCK + jnp.minimum(at, last)).astype(jnp.int32)


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
