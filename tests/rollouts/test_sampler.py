"""Sampling against the plain forward pass; what a sample may depend on; which tokens it may be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollouts.full_rows import completion_logprobs, full_rows
from tests.tiny_model import load_tiny_processor, make_png, make_question, tiny_config, tiny_params
from trimpi_jax.models import vlm
from trimpi_jax.rollouts.choosing import NEVER, SamplerSettings
from trimpi_jax.rollouts.engine import (
    answer,
    encode_questions,
    fetch,
    make_engine,
    make_free_view,
    read_prompts,
)
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.rollouts.sampler import (
    Running,
    allowed_tokens,
    fewer_rows,
    make_sampler,
    prompt_ids,
)
from trimpi_jax.sharding import make_mesh

STEPS = 6
# every tenth token or so ends a completion, so that some end early and some are cut off
CONFIG = dataclasses.replace(tiny_config(), eos_token_ids=tuple(range(300, 400)))
VOCABULARY = len(load_tiny_processor().tokenizer)  # fewer ids than the model has rows
SAMPLED = SamplerSettings(completions=3, max_new_tokens=STEPS)
GREEDY = SamplerSettings(completions=1, max_new_tokens=STEPS, temperature=0.0)
QUESTIONS = [
    make_question(0),
    make_question(1, query="Which case, please?"),
    make_question(2, query="And this one?", images=(make_png(2, 56, 112),)),
]


@functools.cache
def engine(tokens=80, windows=2):
    mesh = make_mesh(devices=jax.devices()[:1])
    sizes = PromptSizes((tokens,), (windows,))
    return make_engine(CONFIG, load_tiny_processor(), sizes, mesh, dtype="float32")


@functools.cache
def weights():
    return engine().load(tiny_params(CONFIG))


def view_of(questions, rows=None, **shape):
    asked = encode_questions(engine(**shape), questions, aware=False)
    return make_free_view(engine(**shape), asked, rows or len(questions))


def sample(settings, questions, seed=0, rows=None, **shape):
    view = view_of(questions, rows, **shape)
    key = jax.random.key(seed)
    asked = read_prompts(engine(**shape), weights(), view, None, settings, key, questions)
    return fetch(engine(), view, answer(weights(), asked))


@functools.cache
def forward():
    return jax.jit(lambda params, batch: vlm.apply(params, CONFIG, batch))


@functools.cache
def samples():
    return sample(SAMPLED, QUESTIONS)


def test_greedy_is_the_argmax_of_the_whole_forward_pass_step_by_step():
    rollouts = sample(GREEDY, QUESTIONS)
    prompts = view_of(QUESTIONS).batch
    tokens = np.zeros((3, 1, STEPS), np.int32)
    lengths = np.zeros((3, 1), np.int32)
    allowed = allowed_tokens(CONFIG, VOCABULARY)
    running = np.ones(3, bool)
    for step in range(STEPS):
        rows = full_rows(prompts, tokens, lengths, 80 + STEPS)
        logits = np.asarray(forward()(weights().params, rows))
        for q in np.flatnonzero(running):
            last = np.where(allowed, logits[q, rows.lengths[q] - 1], -np.inf)
            tokens[q, 0, step] = last.argmax()
            lengths[q, 0] += 1
            running[q] = last.argmax() not in CONFIG.eos_token_ids
    np.testing.assert_array_equal(rollouts.tokens, tokens)
    np.testing.assert_array_equal(rollouts.lengths, lengths)
    np.testing.assert_array_equal(rollouts.stopped[:, 0], ~running)


def test_logprobs_are_those_of_the_training_graph():
    rollouts = samples()
    rows = full_rows(view_of(QUESTIONS).batch, rollouts.tokens, rollouts.lengths, 80 + STEPS)
    logits = forward()(weights().params, rows)
    allowed = allowed_tokens(CONFIG, VOCABULARY)
    logits = jax.nn.log_softmax(jnp.where(allowed[None, None], logits, NEVER))
    expected = completion_logprobs(logits, rows, rollouts.lengths, STEPS)
    np.testing.assert_allclose(rollouts.logprobs, expected, atol=1e-5)


def test_a_completion_ends_with_its_first_stop_token_and_holds_nothing_after():
    rollouts = sample(dataclasses.replace(SAMPLED, completions=16), QUESTIONS)
    stops = np.isin(rollouts.tokens, CONFIG.eos_token_ids)
    assert rollouts.stopped.any()
    assert not rollouts.stopped.all()  # both kinds are there to be looked at
    for q, g in np.ndindex(rollouts.lengths.shape):
        length = rollouts.lengths[q, g]
        assert rollouts.stopped[q, g] == stops[q, g].any()
        assert length == (stops[q, g].argmax() + 1 if stops[q, g].any() else STEPS)
        assert not rollouts.tokens[q, g, length:].any()
        assert not rollouts.logprobs[q, g, length:].any()
        assert (rollouts.logprobs[q, g, :length] < 0).all()


def test_a_sample_depends_on_its_prompt_and_number_only():
    expected = samples()
    alone = sample(SAMPLED, QUESTIONS[1:2])
    reversed_order = sample(SAMPLED, QUESTIONS[::-1])
    padded = sample(SAMPLED, QUESTIONS, tokens=112, windows=3, rows=5)
    more = sample(dataclasses.replace(SAMPLED, completions=16), QUESTIONS)
    np.testing.assert_array_equal(alone.tokens, expected.tokens[1:2])
    np.testing.assert_array_equal(reversed_order.tokens[::-1], expected.tokens)
    np.testing.assert_array_equal(padded.tokens, expected.tokens)
    np.testing.assert_array_equal(more.tokens[:, :3], expected.tokens)
    np.testing.assert_allclose(padded.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("every", [1, 4])
def test_leaving_out_finished_rows_changes_nothing(every):
    settings = dataclasses.replace(SAMPLED, completions=16)
    plain = sample(settings, QUESTIONS, rows=4)
    compacted = sample(dataclasses.replace(settings, compact_every=every), QUESTIONS, rows=4)
    np.testing.assert_array_equal(compacted.tokens, plain.tokens)
    np.testing.assert_array_equal(compacted.lengths, plain.lengths)
    np.testing.assert_array_equal(compacted.stopped, plain.stopped)
    np.testing.assert_allclose(compacted.logprobs, plain.logprobs, atol=1e-5)


def test_programs_are_as_many_as_buckets():
    settings = dataclasses.replace(SAMPLED, completions=5)
    for _ in range(2):
        for seed in range(3):
            sample(settings, QUESTIONS, seed)
            sample(settings, QUESTIONS, seed, tokens=112, windows=3)
    for shape in ({}, {"tokens": 112, "windows": 3}):
        programs = engine(**shape).sampler(settings)
        for name in ("prefill", "begin", "decode"):
            assert getattr(programs, name)._cache_size() == 1, name
    # chunks of decode steps share the program of their shape
    compacting = dataclasses.replace(settings, completions=16, compact_every=1)
    for seed in range(3):
        sample(compacting, QUESTIONS[:1], seed)
    assert (
        engine().sampler(compacting).decode._cache_size() <= 9
    )  # 1 x 16, 8, 4, 2, 1 or 8, 4, 2 x 1


def test_padding_rows_say_nothing():
    view = view_of(QUESTIONS, rows=5)
    asked = read_prompts(engine(), weights(), view, None, SAMPLED, jax.random.key(0), QUESTIONS)
    padded = jax.device_get(answer(weights(), asked))
    assert not padded.lengths[3:].any()
    assert not padded.stopped[3:].any()
    assert not padded.tokens[3:].any()


def test_samples_differ_between_seeds_numbers_and_prompts():
    first, other = samples(), sample(SAMPLED, QUESTIONS, seed=1)
    assert (first.tokens != other.tokens).any()
    assert len({tuple(row) for row in first.tokens.reshape(9, STEPS)}) > 5
    twin = dataclasses.replace(QUESTIONS[1], example_id="another id")
    assert (sample(SAMPLED, [twin]).tokens != first.tokens[1:2]).any()


@pytest.mark.parametrize("settings", [GREEDY, dataclasses.replace(SAMPLED, completions=2)])
def test_visual_tokens_are_never_sampled_however_likely(monkeypatch, settings):
    unknown = 600  # ids from here on are no tokens of the (pretended) tokenizer
    wanted = [
        CONFIG.image_token_id,
        CONFIG.video_token_id,
        CONFIG.vision_start_token_id,
        CONFIG.vision_end_token_id,
        unknown,
        CONFIG.text.vocab_size - 1,
    ]
    bias = np.zeros((1, 1, CONFIG.text.vocab_size), np.float32)
    bias[..., wanted] = 1e4
    plain = vlm.logits
    monkeypatch.setattr(vlm, "logits", lambda *args: plain(*args) + bias)
    biased = make_sampler(CONFIG, settings, unknown)
    view = view_of(QUESTIONS[:2])
    asked = read_prompts(
        engine(), weights(), view, None, settings, jax.random.key(0), QUESTIONS[:2]
    )
    rollouts = fetch(engine(), view, answer(weights(), dataclasses.replace(asked, sampler=biased)))
    for q, g in np.ndindex(rollouts.lengths.shape):
        said = rollouts.tokens[q, g, : rollouts.lengths[q, g]]
        assert len(said)
        assert not set(wanted) & set(said.tolist())
        assert (said < unknown).all()


def test_prompt_ids_depend_on_the_id_only():
    ids = prompt_ids(["a", "b"], 4)
    assert ids.dtype == np.uint32
    assert ids[0] != ids[1]
    assert ids[2:].tolist() == [0, 0]
    assert prompt_ids(["b"], 1)[0] == ids[1]


def test_the_decode_copy_is_cast_and_its_predecessor_is_gone():
    params = jax.tree.map(jnp.asarray, tiny_params(CONFIG))
    half = make_engine(
        CONFIG, load_tiny_processor(), PromptSizes((80,), (2,)), engine().mesh, dtype="bfloat16"
    )
    first = half.load(params)
    matrix = first.decode["language"]["layers"][0]["q"]["kernel"]
    assert matrix.dtype == jnp.bfloat16
    assert first.decode["language"]["layers"][0]["input_norm"]["scale"].dtype == jnp.float32
    second = half.load(params, first)
    assert matrix.is_deleted()
    assert second.decode["language"]["layers"][0]["q"]["kernel"].dtype == jnp.bfloat16
    assert half.sync._cache_size() == 2  # without and with a predecessor
    assert not jax.tree.leaves(params)[0].is_deleted()


@pytest.mark.parametrize(
    ("running", "shape"),
    [
        ((16, 8, 128), (16, 8)),  # all run
        ((16, 4, 50), (16, 4)),  # half of the completions of each prompt
        ((8, 8, 60), (8, 8)),  # half of the prompts
        ((16, 5, 20), (32, 1)),  # a few everywhere: 32 rows instead of 128
        ((16, 5, 70), (16, 8)),  # too many for that
        ((1, 1, 1), (1, 1)),
    ],
)
def test_the_shape_that_is_left(running, shape):
    assert fewer_rows(16, 8, Running(*running), keep_rows=False) == shape


def test_prompts_that_share_a_policy_stay_where_they_are():
    assert fewer_rows(16, 8, Running(2, 3, 4), keep_rows=True) == (16, 4)
