"""The rollout engine: questions in one view in, completions out, everything shared that can be.

    weights = engine.load(params, old)                        one cast per weight version
    questions = encode_questions(engine, examples, aware=True)  -> make_free_view, make_aware_view
    asked = read_prompts(engine, weights, view, ...)          prefill
    rollouts = fetch(view, answer(weights, asked))            decode

Per weight version every image goes through the vision tower once and every policy document through
the language model once for both views of a batch, and a policy for all batches of a step. RL, the
evaluators and the generator of chains of thought use the same engine.

Source: paper section 4; prefix sharing is exact (tests/rollouts/test_engine.py).
Next: trimpi_jax/grading/grader.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.example import Example
from trimpi_jax.inputs.batching import choose_bucket, make_batch
from trimpi_jax.inputs.encode import (
    EncodedRow,
    PolicyPrefix,
    encode_behind_policy,
    encode_policy_prefix,
    encode_prompt,
    policy_key,
)
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.language import KeyValue
from trimpi_jax.models.processor import Processor
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.groups import PromptSizes, View, fits, plain_view, shared_view
from trimpi_jax.rollouts.sampler import (
    Prefix,
    Sampler,
    Standing,
    decode,
    make_image_encoder,
    make_prefix_reader,
    make_sampler,
    make_weight_sync,
    prompt_ids,
)
from trimpi_jax.sharding import constrain, place_batch
from trimpi_jax.types import Rollouts


@dataclasses.dataclass
class Weights:
    """One version of the actor, and what has been computed from it so far."""

    params: Any
    decode: Any  # from `make_weight_sync`
    policies: dict[str, list[KeyValue]] = dataclasses.field(default_factory=dict)  # by policy key


@dataclasses.dataclass(frozen=True)
class Engine:
    """Jitted programs and host-side knowledge that outlive a weight version."""

    config: VLMConfig
    processor: Processor
    sizes: PromptSizes
    mesh: jax.sharding.Mesh
    encode: Callable[..., jax.Array]
    sync: Callable[[Any, Any], Any]
    read_policy: Callable[..., list[KeyValue]]
    join_policies: Callable[..., list[KeyValue]]
    # by policy key; None = the template does not put this policy first
    prefixes: dict[str, PolicyPrefix | None] = dataclasses.field(default_factory=dict)
    samplers: dict[SamplerSettings, Sampler] = dataclasses.field(default_factory=dict)

    def load(self, params: Any, old: Weights | None = None) -> Weights:
        """A new version of the weights; the decode copy of `old` is donated."""
        return Weights(params, self.sync(params, old.decode if old else None))

    def sampler(self, settings: SamplerSettings) -> Sampler:
        """The programs of these settings, made once."""
        if settings not in self.samplers:
            vocabulary = len(self.processor.tokenizer)
            self.samplers[settings] = make_sampler(self.config, settings, vocabulary)
        return self.samplers[settings]


def make_engine(
    config: VLMConfig,
    processor: Processor,
    sizes: PromptSizes,
    mesh: jax.sharding.Mesh,
    *,
    dtype: str,
) -> Engine:
    """An engine; make it once per run.

    Args:
        config: of the model.
        processor: of the model.
        sizes: shapes that prompts may take.
        mesh: prompts are spread over its batch axes.
        dtype: of the activations and of the decode weights.
    """
    return Engine(
        config,
        processor,
        sizes,
        mesh,
        make_image_encoder(config, dtype),
        make_weight_sync(config, dtype),
        make_prefix_reader(config, dtype),
        jax.jit(_join_policies),
    )


class Questions(NamedTuple):
    """Encoded prompts that fit, in both views as far as asked for."""

    examples: list[Example]
    free: list[EncodedRow]
    aware: list[EncodedRow]  # behind the policy, or whole prompts where it cannot stand apart
    policies: list[PolicyPrefix]  # empty = whole prompts
    dropped: list[str]  # ids of Examples that fit no bucket


@dataclasses.dataclass(frozen=True)
class Asked:
    """A view whose prompts have been read; the arrays may still be on their way."""

    view: View
    sampler: Sampler
    standing: Standing
    last: jax.Array
    valid: np.ndarray


def encode_questions(
    engine: Engine, examples: Sequence[Example], *, aware: bool, share: bool = True
) -> Questions:
    """Encode prompts once; those that fit no bucket are left out and named.

    Args:
        engine: see `make_engine`.
        examples: the records.
        aware: whether the policy-aware view is wanted, too.
        share: whether policies may stand apart (False = every prompt carries its own).
    """
    prefixes = [find_prefix(engine, example) for example in examples] if aware and share else []
    apart = [prefix for prefix in prefixes if prefix is not None]
    is_apart = bool(prefixes) and len(apart) == len(prefixes)
    found = Questions([], [], [], [], [])
    for number, example in enumerate(examples):
        row = encode_prompt(example, engine.processor, policy_in_prompt=False)
        rows = [row]
        if aware and is_apart:
            rows.append(encode_behind_policy(example, engine.processor, apart[number], row))
        elif aware:
            rows.append(encode_prompt(example, engine.processor, policy_in_prompt=True))
        prefix_fits = not is_apart or fits(apart[number].row, engine.sizes, images=False)
        if not prefix_fits or not all(fits(one, engine.sizes) for one in rows):
            found.dropped.append(example.example_id)
            continue
        found.examples.append(example)
        found.free.append(row)
        found.aware.extend(rows[1:])
    if is_apart:
        used = {policy_key(example) for example in found.examples}
        found.policies.extend({p.key: p for p in apart if p.key in used}.values())
    return found


def make_free_view(engine: Engine, questions: Questions, num_rows: int) -> View:
    """The policy-free view."""
    return plain_view(questions.free, engine.sizes, num_rows)


def make_aware_view(engine: Engine, questions: Questions, num_rows: int, max_chunk: int) -> View:
    """The policy-aware view; `max_chunk` prompts may share a copy of a policy while decoding."""
    if not questions.policies:
        return plain_view(questions.aware, engine.sizes, num_rows)
    number = {policy.key: i for i, policy in enumerate(questions.policies)}
    return shared_view(
        questions.aware,
        questions.policies,
        [number[policy_key(example)] for example in questions.examples],
        engine.sizes,
        num_rows,
        max_chunk=max_chunk,
        rows_multiple=batch_degree(engine.mesh),
    )


def find_prefix(engine: Engine, example: Example) -> PolicyPrefix | None:
    """The Example's policy as a prefix, encoded once per run; None where it cannot stand apart."""
    key = policy_key(example)
    if key not in engine.prefixes:
        engine.prefixes[key] = encode_policy_prefix(example, engine.processor)
    return engine.prefixes[key]


def encode_visual(engine: Engine, weights: Weights, free: View) -> jax.Array:
    """Visual tokens [Q, M, D] of the prompts' images: once per weight version, for all views."""
    return engine.encode(weights.params, place_batch(free.batch, engine.mesh))


def read_prompts(
    engine: Engine,
    weights: Weights,
    view: View,
    visual: jax.Array | None,
    settings: SamplerSettings,
    key: jax.Array,
    examples: Sequence[Example],
) -> Asked:
    """Dispatch the prefill of a view.

    Args:
        engine: see `make_engine`.
        weights: see `Engine.load`.
        view: of the examples.
        visual: [Q, M, D] from `encode_visual` of the policy-free view; None = encode the view's
            own images.
        settings: of the sampler.
        key: of (seed, step, view).
        examples: the Q records; their ids decide the samples.
    """
    batch = place_batch(view.batch, engine.mesh)
    rows = view.batch.tokens.shape[0]
    names = [""] * rows
    for place, example in zip(view.row_of, examples, strict=True):
        names[place] = example.example_id
    if visual is None:
        visual = engine.encode(weights.params, batch)
    elif view.policies:
        source = np.zeros((rows,), np.int32)
        source[view.row_of] = np.arange(len(view.row_of))
        visual = jnp.take(visual, source, axis=0)
    ids = np.where(view.batch.valid, prompt_ids(names, rows), 0).astype(np.uint32)
    sampler = engine.sampler(settings)
    prefix = _prefix_of(engine, weights, view)
    standing, last = sampler.prefill(weights.params, batch, visual, key, ids, prefix)
    return Asked(view, sampler, standing, last, np.asarray(view.batch.valid))


def answer(weights: Weights, asked: Asked) -> Rollouts:
    """Dispatch the decoding; rows of the view's batch. See `fetch`."""
    return decode(
        asked.sampler,
        weights.decode,
        asked.standing,
        asked.last,
        asked.valid,
        keep_rows=bool(asked.view.policies),
    )


def fetch(view: View, rollouts: Rollouts) -> Rollouts:
    """Wait for the rollouts; on the host, in the order of the prompts: [Q, G, ...]."""
    found = jax.device_get(rollouts)
    return Rollouts(*(getattr(found, name)[view.row_of] for name in ROLLOUT_FIELDS))


ROLLOUT_FIELDS = tuple(field.name for field in dataclasses.fields(Rollouts))


def ask(
    engine: Engine,
    weights: Weights,
    examples: Sequence[Example],
    settings: SamplerSettings,
    key: jax.Array,
    *,
    aware: bool,
    num_rows: int,
    max_chunk: int = 1,
) -> tuple[Questions, Rollouts]:
    """Questions in one view, encoded, answered and fetched.

    Args:
        engine: see `make_engine`.
        weights: see `Engine.load`.
        examples: at most `num_rows` records.
        settings: of the sampler.
        key: of (seed, step, view).
        aware: which view.
        num_rows: prompts of the batch's shape.
        max_chunk: prompts that may share one copy of a policy while decoding.

    Returns:
        (the questions that fit, their rollouts [Q, G] on the host; none when nothing fits).
    """
    questions = encode_questions(engine, examples, aware=aware)
    if not questions.examples:
        empty = np.zeros((0, settings.completions, settings.max_new_tokens), np.float32)
        return questions, Rollouts(empty.astype(np.int32), empty, empty[..., 0], empty[..., 0])
    view = free = make_free_view(engine, questions, num_rows)
    if aware:
        view = make_aware_view(engine, questions, num_rows, max_chunk)
    visual = encode_visual(engine, weights, free) if view is free or view.policies else None
    asked = read_prompts(engine, weights, view, visual, settings, key, questions.examples)
    return questions, fetch(view, answer(weights, asked))


def prompt_lengths(questions: Questions, *, aware: bool) -> list[int]:
    """Tokens of every whole prompt of a view."""
    if not aware:
        return [len(row.tokens) for row in questions.free]
    before = {policy.key: len(policy.row.tokens) for policy in questions.policies}
    return [
        len(row.tokens) + before.get(policy_key(example), 0)
        for row, example in zip(questions.aware, questions.examples, strict=True)
    ]


def batch_degree(mesh: jax.sharding.Mesh) -> int:
    """Devices over which the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _prefix_of(engine: Engine, weights: Weights, view: View) -> Prefix | None:
    """The view's policies as keys and values, one copy per chunk of its batch."""
    if not view.policies:
        return None
    size = max(
        choose_bucket(len(policy.row.tokens), engine.sizes.token_buckets)
        for policy in view.policies
    )
    for policy in view.policies:
        name = f"{policy.key}/{size}"
        if name not in weights.policies:
            windows = len(policy.row.images.patches)
            windows = windows and 2 ** (windows - 1).bit_length()  # few programs
            batch = make_batch([policy.row], num_rows=1, num_tokens=size, num_windows=windows)
            weights.policies[name] = engine.read_policy(weights.params, batch)
    kv = [weights.policies[f"{policy.key}/{size}"] for policy in view.policies]
    kv += [kv[-1]] * (2 ** (len(kv) - 1).bit_length() - len(kv))  # few programs: a power of two
    lengths = np.asarray([len(policy.row.tokens) for policy in view.policies], np.int32)
    return Prefix(
        engine.join_policies(kv, jnp.asarray(view.policy_of)), jnp.asarray(lengths[view.policy_of])
    )


def _join_policies(policies: list[list[KeyValue]], policy_of: jax.Array) -> list[KeyValue]:
    """Per layer (k, v) [Z, P, K, H] of the policies in the order of the chunks."""
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *policies)
    return jax.tree.map(
        lambda leaf: constrain(jnp.take(leaf, policy_of, axis=0), "batch", None, "kv_heads", None),
        joined,
    )
