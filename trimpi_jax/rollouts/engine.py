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
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.example import Example, decode_record, encode_record
from trimpi_jax.inputs.batching import choose_bucket, make_batch
from trimpi_jax.inputs.encode import (
    EncodedRow,
    PolicyPrefix,
    encode_behind_policy,
    encode_policy_prefix,
    encode_prompt,
    policy_key,
)
from trimpi_jax.io.agreement import gather, largest
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
from trimpi_jax.sharding import constrain, fetch_rows, place_batch, row_share
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
    take_rows: Callable[[jax.Array, jax.Array], jax.Array]
    # by policy key; None = the template does not put this policy first
    prefixes: dict[str, PolicyPrefix | None] = dataclasses.field(default_factory=dict)
    told: set[str] = dataclasses.field(default_factory=set)  # policy keys that all processes know
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
        jax.jit(_take_rows),
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
    valid: jax.Array


def encode_questions(
    engine: Engine, examples: Sequence[Example], *, aware: bool, share: bool = True
) -> Questions:
    """Encode prompts once; those that fit no bucket are left out and named.

    Of several processes all must call it, each with its share of the prompts; all get the policies
    of all.

    Args:
        engine: see `make_engine`.
        examples: the records of this process.
        aware: whether the policy-aware view is wanted, too.
        share: whether policies may stand apart (False = every prompt carries its own).
    """
    prefixes = [find_prefix(engine, example) for example in examples] if aware and share else []
    apart = [prefix for prefix in prefixes if prefix is not None]
    is_apart = False
    if aware and share:
        counts = np.sum(gather([len(prefixes), len(apart)], "policies apart"), axis=0)
        is_apart = 0 < counts[0] == counts[1]
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
        found.policies.extend(_gather_policies(engine, found.examples))
    return found


def _gather_policies(engine: Engine, examples: Sequence[Example]) -> list[PolicyPrefix]:
    """The policies of the prompts of all processes, in the same order on all.

    A document travels once a run: where a prompt of it comes first, the others may not know it.
    """
    used = {policy_key(example): example for example in examples}
    several = jax.process_count() > 1
    named = [
        (key, encode_record(one) if several and key not in engine.told else b"")
        for key, one in used.items()
    ]
    union = {}
    for key, document in itertools.chain.from_iterable(gather(named, "policies")):
        if key not in engine.prefixes:
            find_prefix(engine, decode_record(document))
        union[key] = engine.prefixes[key]
    engine.told.update(union)
    return list(union.values())


def make_free_view(engine: Engine, questions: Questions, num_rows: int) -> View:
    """The policy-free view, of a batch that has `num_rows` rows over all processes."""
    return plain_view(questions.free, engine.sizes, row_share(engine.mesh).part(num_rows), _agree)


def make_aware_view(engine: Engine, questions: Questions, num_rows: int, max_chunk: int) -> View:
    """The policy-aware view; `max_chunk` prompts may share a copy of a policy while decoding."""
    share = row_share(engine.mesh)
    if not questions.policies:
        return plain_view(questions.aware, engine.sizes, share.part(num_rows), _agree)
    number = {policy.key: i for i, policy in enumerate(questions.policies)}
    owners = [number[policy_key(example)] for example in questions.examples]
    return shared_view(
        questions.aware,
        questions.policies,
        owners,
        engine.sizes,
        share.part(num_rows),
        max_chunk=max_chunk,
        rows_multiple=len(share.blocks),
        everyone=share.of_leaders(gather(owners, "prompts of policies")),
        agree=_agree,
    )


def _agree(sizes: Sequence[int]) -> list[int]:
    return largest(sizes, "shape of prompts")


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
        free_rows = row_share(engine.mesh).global_rows(visual.shape[0])
        source[view.row_of] = free_rows[: len(view.row_of)]
        visual = engine.take_rows(visual, place_batch(source, engine.mesh))
    ids = np.where(view.batch.valid, prompt_ids(names, rows), 0).astype(np.uint32)
    sampler = engine.sampler(settings)
    prefix = _prefix_of(engine, weights, view)
    ids = place_batch(ids, engine.mesh)
    standing, last = sampler.prefill(weights.params, batch, visual, key, ids, prefix)
    return Asked(view, sampler, standing, last, batch.valid)


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


def fetch(engine: Engine, view: View, rollouts: Rollouts) -> Rollouts:
    """Wait for the rollouts of this process; on the host, in the order of its prompts."""
    found = fetch_rows(rollouts, engine.mesh)
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
        examples: the records of this process, at most its part of `num_rows`.
        settings: of the sampler.
        key: of (seed, step, view).
        aware: which view.
        num_rows: prompts of the batch's shape, over all processes.
        max_chunk: prompts that may share one copy of a policy while decoding.

    Returns:
        (the questions that fit, their rollouts [Q, G] on the host; none when nothing fits).
    """
    questions = encode_questions(engine, examples, aware=aware)
    if not any(gather(len(questions.examples), "anything to ask")):
        empty = np.zeros((0, settings.completions, settings.max_new_tokens), np.float32)
        return questions, Rollouts(empty.astype(np.int32), empty, empty[..., 0], empty[..., 0])
    view = free = make_free_view(engine, questions, num_rows)
    if aware:
        view = make_aware_view(engine, questions, num_rows, max_chunk)
    visual = encode_visual(engine, weights, free) if view is free or view.policies else None
    asked = read_prompts(engine, weights, view, visual, settings, key, questions.examples)
    return questions, fetch(engine, view, answer(weights, asked))


def prompt_lengths(questions: Questions, *, aware: bool) -> list[int]:
    """Tokens of every whole prompt of a view."""
    if not aware:
        return [len(row.tokens) for row in questions.free]
    before = {policy.key: len(policy.row.tokens) for policy in questions.policies}
    return [
        len(row.tokens) + before.get(policy_key(example), 0)
        for row, example in zip(questions.aware, questions.examples, strict=True)
    ]


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
    policy_of, before = place_batch((view.policy_of, lengths[view.policy_of]), engine.mesh)
    return Prefix(engine.join_policies(kv, policy_of), before)


def _take_rows(leaf: jax.Array, rows: jax.Array) -> jax.Array:
    return constrain(jnp.take(leaf, rows, axis=0), "batch", *(None,) * (leaf.ndim - 1))


def _join_policies(policies: list[list[KeyValue]], policy_of: jax.Array) -> list[KeyValue]:
    """Per layer (k, v) [Z, P, K, H] of the policies in the order of the chunks."""
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *policies)
    return jax.tree.map(
        lambda leaf: constrain(jnp.take(leaf, policy_of, axis=0), "batch", None, "kv_heads", None),
        joined,
    )
