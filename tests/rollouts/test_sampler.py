"""Sampling against the plain forward pass; what a sample may depend on; which tokens it may be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_model import load_tiny_processor, make_png, make_question, tiny_config, tiny_params
from trimpi_jax.models import vlm
from trimpi_jax.rollouts.groups import make_training_rows, make_view
from trimpi_jax.rollouts.sampler import (
    NEVER,
    SamplerSettings,
    allowed_tokens,
    choose_tokens,
    keep_top_p,
    make_sampler,
    prompt_ids,
)

STEPS = 6
# every tenth token or so ends a completion, so that some end early and some are cut off
CONFIG = dataclasses.replace(tiny_config(), eos_token_ids=tuple(range(300, 400)))
VOCABULARY = CONFIG.text.vocab_size
SAMPLED = SamplerSettings(completions=3, max_new_tokens=STEPS)
GREEDY = SamplerSettings(completions=1, max_new_tokens=STEPS, temperature=0.0)
QUESTIONS = [
    make_question(0),
    make_question(1, query="Which case, please?"),
    make_question(2, query="And this one?", images=(make_png(2, 56, 112),)),
]


@functools.cache
def params():
    return tiny_params(CONFIG)


@functools.cache
def sampler(settings):
    return make_sampler(CONFIG, settings, VOCABULARY)


def make_prompts(questions, *, tokens=80, windows=2, rows=None):
    view = make_view(
        questions,
        load_tiny_processor(),
        policy_in_prompt=False,
        token_buckets=(tokens,),
        windows=windows,
        num_rows=rows,
    )
    ids = prompt_ids([question.example_id for question in questions], rows or len(questions))
    return view, ids


def sample(settings, questions, seed=0, **shape):
    view, ids = make_prompts(questions, **shape)
    return jax.device_get(sampler(settings)(params(), view.batch, jax.random.key(seed), ids))


@functools.cache
def forward():
    return jax.jit(lambda weights, batch: vlm.apply(weights, CONFIG, batch))


@functools.cache
def samples():
    return sample(SAMPLED, QUESTIONS)


def test_greedy_is_the_argmax_of_the_whole_forward_pass_step_by_step():
    rollouts = sample(GREEDY, QUESTIONS)
    view, _ = make_prompts(QUESTIONS)
    tokens = np.zeros((3, 1, STEPS), np.int32)
    lengths = np.zeros((3, 1), np.int32)
    allowed = allowed_tokens(CONFIG, VOCABULARY)
    running = np.ones(3, bool)
    for step in range(STEPS):
        rows = make_training_rows(view, tokens, lengths, (80 + STEPS,))
        rows = rows.replace(
            **{name: getattr(view.batch, name) for name in ("patches", "patch_hw", "patch_segment")}
        )
        logits = np.asarray(forward()(params(), rows))
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
    view, _ = make_prompts(QUESTIONS)
    rows = make_training_rows(view, rollouts.tokens, rollouts.lengths, (80 + STEPS,))
    pictures = {
        name: np.repeat(getattr(view.batch, name), 3, axis=0)
        for name in ("patches", "patch_hw", "patch_segment")
    }
    logits = forward()(params(), rows.replace(**pictures))
    # the sampler's distribution has no image tokens; the training graph's has
    allowed = allowed_tokens(CONFIG, VOCABULARY)
    expected = jax.nn.log_softmax(jnp.where(allowed[None, None], logits, NEVER))[:, :-1]
    expected = np.take_along_axis(np.asarray(expected), rows.tokens[:, 1:, None], axis=-1)[..., 0]
    for at in range(9):
        count = rollouts.lengths[at // 3, at % 3]
        found = rollouts.logprobs[at // 3, at % 3, :count]
        np.testing.assert_allclose(found, expected[at][rows.loss_mask[at, 1:]], atol=1e-5)


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
    np.testing.assert_array_equal(padded.tokens[:3], expected.tokens)
    np.testing.assert_array_equal(more.tokens[:, :3], expected.tokens)
    np.testing.assert_allclose(padded.logprobs[:3], expected.logprobs, atol=1e-5)


def test_padding_rows_say_nothing():
    padded = sample(SAMPLED, QUESTIONS, tokens=112, windows=3, rows=5)
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
        VOCABULARY - 1,
    ]
    bias = np.zeros((1, 1, VOCABULARY), np.float32)
    bias[..., wanted] = 1e4
    plain = vlm.logits
    monkeypatch.setattr(vlm, "logits", lambda *args: plain(*args) + bias)
    view, ids = make_prompts(QUESTIONS[:2])
    biased = make_sampler(CONFIG, settings, unknown)
    rollouts = jax.device_get(biased(params(), view.batch, jax.random.key(0), ids))
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


def logits_of(*probabilities):
    return jnp.log(jnp.array([[probabilities]], jnp.float32))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [0]),
        (0.49, [0]),
        (0.51, [0, 2]),  # 0.5 is not enough, 0.5 + 0.3 is
        (0.79, [0, 2]),
        (0.85, [0, 2, 3]),
        (0.99, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, kept):
    logits = keep_top_p(logits_of(0.5, 0.05, 0.3, 0.15), top_p)[0, 0]
    assert np.flatnonzero(logits > NEVER).tolist() == kept


def draw(logits, settings, count=4000):
    """Frequencies and log-probs of many draws from one distribution."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(count))[None]
    many = jnp.broadcast_to(logits, (1, count, logits.shape[-1]))
    tokens, logprobs = choose_tokens(many, keys, jnp.int32(0), settings)
    return np.bincount(tokens[0], minlength=logits.shape[-1]) / count, tokens[0], logprobs[0]


def test_frequencies_are_the_probabilities():
    # 4000 draws: 5 standard deviations of 0.5 are 0.04
    shares, tokens, logprobs = draw(logits_of(0.5, 0.0, 0.3, 0.2), SAMPLED)
    np.testing.assert_allclose(shares, [0.5, 0, 0.3, 0.2], atol=0.04)
    assert shares[1] == 0
    expected = np.log(np.array([0.5, 1, 0.3, 0.2]))[tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_temperature_and_top_p_change_the_distribution_and_its_logprobs():
    # temperature 1/2 squares: 0.25, 0.09, 0.04 of 0.38
    half = dataclasses.replace(SAMPLED, temperature=0.5)
    shares, tokens, logprobs = draw(logits_of(0.5, 0.3, 0.2), half)
    squared = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(shares, squared, atol=0.04)
    np.testing.assert_allclose(logprobs, np.log(squared)[tokens], atol=1e-5)
    # top_p 0.7 leaves 0.5 and 0.3, renormalised to 5/8 and 3/8
    nucleus = dataclasses.replace(SAMPLED, top_p=0.7)
    shares, tokens, logprobs = draw(logits_of(0.5, 0.3, 0.2), nucleus)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0], atol=0.04)
    np.testing.assert_allclose(logprobs, np.log([0.625, 0.375, 1])[tokens], atol=1e-5)


def test_another_step_is_another_draw():
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(200))[None]
    flat = jnp.zeros((1, 200, 50))
    first, second, again = (
        choose_tokens(flat, keys, jnp.int32(step), SAMPLED)[0] for step in (0, 1, 0)
    )
    assert (first == again).all()
    assert (first == second).mean() < 0.2  # 1 in 50 by chance


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0, "top_p": 0.9, "completions": 1}, "greedy decoding"),
        ({"temperature": 0.0}, "greedy decoding"),  # three equal completions are no samples
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"completions": 0}, "must be >= 1"),
        ({"max_new_tokens": 0}, "must be >= 1"),
    ],
)
def test_settings_without_meaning_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SAMPLED, **changes)
