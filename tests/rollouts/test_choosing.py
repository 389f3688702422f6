"""Which token comes of which logits and which uniform number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimpi_jax.rollouts.choosing import (
    NEVER,
    SamplerSettings,
    choose_tokens,
    inverse_cdf,
    keep_top_p,
    uniforms,
)

SAMPLED = SamplerSettings(completions=3, max_new_tokens=6)


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


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_blocks_find_what_the_whole_cumulated_sum_finds(size):
    rng = np.random.default_rng(size)
    weights = rng.random((400, size)).astype(np.float32) * (rng.random((400, size)) < 0.3)
    weights[:, size // 2] += 0.1  # never all 0
    uniform = np.append(rng.random(398), [0.0, 1 - 2.0**-24]).astype(np.float32)
    found = np.asarray(inverse_cdf(jnp.asarray(weights), jnp.asarray(uniform)))
    up_to = weights.astype(np.float64).cumsum(axis=-1)
    expected = (up_to <= uniform[:, None] * up_to[:, -1:]).sum(axis=-1)
    assert (found == expected).mean() > 0.99  # a tie in the last bit may go either way
    assert (weights[np.arange(400), found] > 0).all()


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.49, 0), (0.51, 2), (0.79, 2), (0.81, 3), (0.999, 3)]
)
def test_the_uniform_number_decides(uniform, token):
    logits = logits_of(0.5, 0.0, 0.3, 0.2)
    found, logprob = choose_tokens(logits, jnp.full((1, 1), uniform), SAMPLED)
    assert found[0, 0] == token
    assert logprob[0, 0] == pytest.approx(np.log([0.5, 1, 0.3, 0.2][token]), abs=1e-5)


def draw(logits, settings, count=4000):
    """Frequencies, tokens and log-probs of many draws from one distribution."""
    numbers = jax.random.uniform(jax.random.key(0), (1, count))
    many = jnp.broadcast_to(logits, (1, count, logits.shape[-1]))
    tokens, logprobs = choose_tokens(many, numbers, settings)
    return np.bincount(tokens[0], minlength=logits.shape[-1]) / count, tokens[0], logprobs[0]


def test_frequencies_are_the_probabilities():
    # 4000 draws: 5 standard deviations of 0.5 are 0.04
    shares, tokens, logprobs = draw(logits_of(0.5, 0.0, 0.3, 0.2), SAMPLED)
    np.testing.assert_allclose(shares, [0.5, 0, 0.3, 0.2], atol=0.04)
    assert shares[1] == 0
    expected = np.log(np.array([0.5, 1, 0.3, 0.2]))[tokens]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_temperature_top_k_and_top_p_change_the_distribution_and_its_logprobs():
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
    # top_k 2 of 0.2, 0.5, 0.3 leaves the second and the third
    top = dataclasses.replace(SAMPLED, top_k=2)
    shares, tokens, logprobs = draw(logits_of(0.2, 0.5, 0.3), top)
    np.testing.assert_allclose(shares, [0, 0.625, 0.375], atol=0.04)
    np.testing.assert_allclose(logprobs, np.log([1, 0.625, 0.375])[tokens], atol=1e-5)
    # top_k first: of 0.4, 0.3, 0.2, 0.1 three stay as 4/9, 3/9, 2/9, and top_p 0.75 leaves two
    both = dataclasses.replace(SAMPLED, top_k=3, top_p=0.75)
    shares, _, _ = draw(logits_of(0.1, 0.2, 0.3, 0.4), both)
    np.testing.assert_allclose(shares, [0, 0, 3 / 7, 4 / 7], atol=0.04)


def test_greedy_takes_the_most_likely():
    greedy = SamplerSettings(1, 1, temperature=0.0)
    token, logprob = choose_tokens(logits_of(0.2, 0.5, 0.3), jnp.zeros((1, 1)), greedy)
    assert token.tolist() == [[1]]
    assert logprob[0, 0] == pytest.approx(np.log(0.5), abs=1e-6)


def test_a_uniform_number_depends_on_prompt_sample_and_step_only():
    key, ids = jax.random.key(0), jnp.array([7, 9], jnp.uint32)
    numbers = np.asarray(uniforms(key, ids, 3, 5))
    assert len(np.unique(numbers)) == numbers.size
    np.testing.assert_array_equal(uniforms(key, ids[::-1], 3, 5)[::-1], numbers)
    np.testing.assert_array_equal(uniforms(key, ids, 2, 5), numbers[:, :2])
    np.testing.assert_array_equal(uniforms(key, ids, 3, 2), numbers[..., :2])
    assert (np.asarray(uniforms(jax.random.key(1), ids, 3, 5)) != numbers).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0, "top_p": 0.9, "completions": 1}, "greedy decoding"),
        ({"temperature": 0.0, "top_k": 2, "completions": 1}, "greedy decoding"),
        ({"temperature": 0.0}, "greedy decoding"),  # three equal completions are no samples
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"completions": 0}, "must be >= 1"),
        ({"max_new_tokens": 0}, "must be >= 1"),
        ({"compact_every": -1}, "compact_every must be >= 0"),
    ],
)
def test_settings_without_meaning_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SAMPLED, **changes)
