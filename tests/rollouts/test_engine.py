"""Shared policies and images against whole prompts: the same completions, the same log-probs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.tiny_model import load_tiny_processor, make_png, make_question, tiny_config, tiny_params
from trimpi_jax.inputs.encode import encode_policy_prefix, encode_prompt, policy_key
from trimpi_jax.models import vlm
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import (
    answer,
    encode_questions,
    encode_visual,
    fetch,
    make_aware_view,
    make_engine,
    make_free_view,
    read_prompts,
)
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh, param_shardings

CONFIG = dataclasses.replace(tiny_config(), eos_token_ids=tuple(range(300, 400)))
SETTINGS = SamplerSettings(completions=4, max_new_tokens=6)
SIZES = PromptSizes((64, 208), (3,))
OTHER_POLICY = "The policy of L1-Tavete.\n# Condition 1: any <image>?\n- True: respond with Case 1"
QUESTIONS = [
    make_question(0),
    make_question(1, policy_text=OTHER_POLICY, policy_images=(make_png(9),)),
    make_question(2, query="And this one?", images=(make_png(2, 56, 112),)),
    make_question(3),
    make_question(4, query="Which?"),
]


@functools.cache
def engine(devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return make_engine(CONFIG, load_tiny_processor(), SIZES, mesh, dtype="float32")


@functools.cache
def weights(devices=1):
    params = tiny_params(CONFIG)
    if devices > 1:
        mesh = engine(devices).mesh
        shardings = param_shardings(vlm.logical_axes(CONFIG), mesh, params)
        params = jax.device_put(params, shardings)
    return engine(devices).load(params)


def ask_aware(
    questions, *, share, max_chunk=1, reuse_images=True, rows=None, devices=1, settings=SETTINGS
):
    """(rollouts, view) of the policy-aware view."""
    here, loaded = engine(devices), weights(devices)
    rows = rows or len(questions)
    with jax.set_mesh(here.mesh):
        asked = encode_questions(here, questions, aware=True, share=share)
        free = make_free_view(here, asked, rows)
        view = make_aware_view(here, asked, rows, max_chunk)
        visual = encode_visual(here, loaded, free) if reuse_images and view.policies else None
        key = jax.random.key(0)
        started = read_prompts(here, loaded, view, visual, settings, key, questions)
        return fetch(here, view, answer(loaded, started)), view


@functools.cache
def whole():
    return ask_aware(QUESTIONS, share=False)[0]


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("max_chunk", [1, 4])
def test_a_shared_policy_gives_what_whole_prompts_give(max_chunk):
    found, view = ask_aware(QUESTIONS, share=True, max_chunk=max_chunk)
    assert len(view.policies) == 2  # each once, though four questions ask for the first
    assert view.batch.tokens.shape[1] == 64  # only what follows the policy
    assert_same(found, whole())


def test_one_policy_is_kept_once_for_all():
    same = [QUESTIONS[0], *QUESTIONS[2:]]
    found, view = ask_aware(same, share=True, max_chunk=4)
    assert len(view.policy_of) == 1
    expected = whole()
    places = [0, 2, 3, 4]
    np.testing.assert_array_equal(found.tokens, expected.tokens[places])


def test_leaving_out_finished_rows_keeps_prompts_behind_their_policies():
    one = dataclasses.replace(SETTINGS, completions=1)
    expected, view = ask_aware(QUESTIONS, share=True, settings=one)
    assert view.policy_of.tolist() == [0, 0, 0, 0, 1]
    lengths = expected.lengths[:, 0]
    # while the prompt of the other policy goes on, one that lies before it is done
    assert lengths[[0, 2, 3, 4]].min() < lengths[1]
    compacting = dataclasses.replace(one, completions=2, compact_every=1)
    found, _ = ask_aware(QUESTIONS, share=True, settings=compacting)
    np.testing.assert_array_equal(found.tokens[:, :1], expected.tokens)


def test_padding_changes_nothing():
    found, view = ask_aware(QUESTIONS, share=True, max_chunk=2, rows=8)
    assert len(view.batch.tokens) >= 8
    assert_same(found, whole())


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices, real or fake")
def test_four_devices_give_what_one_gives():
    found, _ = ask_aware(QUESTIONS, share=True, max_chunk=2, rows=8, devices=4)
    assert_same(found, whole())


def test_the_policy_is_read_once_per_weight_version():
    here = engine()
    loaded = here.load(weights().params)
    count = []
    spied = dataclasses.replace(
        here, read_policy=lambda *args: count.append(1) or here.read_policy(*args)
    )
    for _ in range(3):
        asked = encode_questions(spied, QUESTIONS, aware=True)
        view = make_aware_view(spied, asked, len(QUESTIONS), 1)
        visual = encode_visual(spied, loaded, make_free_view(spied, asked, len(QUESTIONS)))
        read_prompts(spied, loaded, view, visual, SETTINGS, jax.random.key(0), QUESTIONS)
    assert len(count) == 2  # two policies, three batches


def test_prefix_and_rest_are_the_whole_prompt():
    processor = load_tiny_processor()
    for question in QUESTIONS:
        prefix = encode_policy_prefix(question, processor)
        prompt = encode_prompt(question, processor, policy_in_prompt=True)
        asked = encode_questions(engine(), [question], aware=True)
        rest = asked.aware[0]
        np.testing.assert_array_equal(
            np.concatenate([prefix.row.tokens, rest.tokens]), prompt.tokens
        )
        np.testing.assert_array_equal(
            np.concatenate([prefix.row.positions, rest.positions], axis=1), prompt.positions
        )
        length = len(rest.tokens) + rest.rope_delta
        assert length == len(prompt.tokens) + prompt.rope_delta
        assert prefix.key == policy_key(question)


def test_a_template_that_does_not_begin_with_the_policy_shares_nothing():
    processor = load_tiny_processor()
    tokenizer = type(processor.tokenizer).from_pretrained(processor.tokenizer.name_or_path)
    late = "{% for m in messages[::-1] %}" + (
        "<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer.chat_template = late
    changed = dataclasses.replace(processor, tokenizer=tokenizer)
    assert encode_policy_prefix(QUESTIONS[0], changed) is None
    here = make_engine(CONFIG, changed, SIZES, engine().mesh, dtype="float32")
    asked = encode_questions(here, QUESTIONS[:1], aware=True)
    assert not asked.policies
    assert QUESTIONS[0].policy_text in tokenizer.decode(asked.aware[0].tokens)  # the whole prompt


def test_what_fits_no_bucket_is_named():
    long = make_question(9, query="word " * 300)
    asked = encode_questions(engine(), [QUESTIONS[0], long], aware=True)
    assert asked.dropped == ["q9"]
    assert [example.example_id for example in asked.examples] == ["q0"]
    wide = make_question(8, policy_text="word " * 400)
    assert encode_questions(engine(), [wide], aware=True).dropped == ["q8"]
    assert not encode_questions(engine(), [wide], aware=False).dropped
