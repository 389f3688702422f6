"""Probe tasks: tiny problems that only one part of the algorithm can solve.

Four tokens exist, a completion is one of them, and the real engine samples, scores and updates.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from data_pipelines.example import encode_png
from tests.rollouts.full_rows import full_rows
from tests.tiny_model import load_tiny_processor, make_question, tiny_config, tiny_params
from trimpi_jax.grading import rewards
from trimpi_jax.grading.answers import Grade, RewardWeights
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models.processor import decode_completion
from trimpi_jax.objectives.grpo import ObjectiveSettings
from trimpi_jax.rollouts import sampler
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes, plain_view
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages import rl
from trimpi_jax.stages.rl import RLStep
from trimpi_jax.stages.rl_settings import RLSettings
from trimpi_jax.stages.supervised import StepSettings, make_supervised_step
from trimpi_jax.stages.train_state import init_train_state

CONFIG = tiny_config()
TOKENS = (400, 401, 402, 403)
PROMPTS = 8
OPTIMIZER = optax.adam(3e-3)
STEP = StepSettings("all")
SIZES = PromptSizes((64, 192), (1,))
SETTINGS = RLSettings(
    group_size=4,
    prompts=PROMPTS,
    update_prompts=PROMPTS,
    sample_prompts=PROMPTS,
    policy_rollout=False,
    max_new_tokens=1,
    temperature=1.0,
    top_p=1.0,
    completion_buckets=(1,),
    seed=0,
)


@functools.cache
def said(token):
    return decode_completion(load_tiny_processor(), [token])


def flat_png(level):
    return encode_png(np.full((56, 56, 3), level, np.uint8))


def questions(right, images=None):
    """Eight prompts whose answer is the token `right[i % len(right)]`."""
    images = images or [flat_png(128)]
    return [
        make_question(i, answer=said(right[i % len(right)]), images=(images[i % len(images)],))
        for i in range(PROMPTS)
    ]


@pytest.fixture(autouse=True)
def four_tokens(monkeypatch):
    allowed = np.zeros((CONFIG.text.vocab_size,), bool)
    allowed[list(TOKENS)] = True
    monkeypatch.setattr(sampler, "allowed_tokens", lambda *args: allowed)
    monkeypatch.setattr(rl, "allowed_tokens", lambda *args: allowed)

    def grade(texts, examples, stopped, *, needs_think=True):
        pairs = zip(texts, examples, strict=True)
        return [Grade(float(text == one.answer), 0.0, text, "ok") for text, one in pairs]

    monkeypatch.setattr(rewards, "grade_completions", grade)


def train(asked, steps, params=None, **changes):
    """(accuracy of free rollouts by step, of aware ones) of the real RL step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    engine = make_engine(CONFIG, load_tiny_processor(), SIZES, mesh, dtype="float32")
    step = RLStep(
        engine,
        None,
        OPTIMIZER,
        dataclasses.replace(SETTINGS, **changes),
        ObjectiveSettings(kl_beta=0.0),
        RewardWeights(1.0, 0.0),
        STEP,
    )
    params = tiny_params(CONFIG) if params is None else params
    state = init_train_state(jax.tree.map(np.array, params), OPTIMIZER, "all")
    free, aware = [], []
    for number in range(steps):
        state, metrics = step(state, number, asked)
        free.append(metrics["rollouts/accuracy_free"])
        aware.append(metrics.get("rollouts/accuracy_aware"))
    return free, aware


def test_one_right_token_is_found():
    free, _ = train(questions([TOKENS[2]]), steps=25)
    assert free[0] < 0.9
    assert min(free[-3:]) > 0.9, free


def test_the_right_token_depends_on_the_image():
    images = [flat_png(20), flat_png(235)]
    free, _ = train(questions([TOKENS[0], TOKENS[3]], images), steps=60)
    assert max(free[0], 0.5) < 0.8  # without a look at the image at most half can be right
    assert np.mean(free[-5:]) > 0.9, free


@functools.cache
def taught():
    """A base that says token 0 when it is asked, and token 1 when the policy is in its prompt."""
    processor, asked = load_tiny_processor(), questions([TOKENS[1]])
    prompts = [
        plain_view([encode_prompt(one, processor, policy_in_prompt=aware) for one in asked],
                   PromptSizes((192,), (1,)), PROMPTS).batch
        for aware in (False, True)
    ]  # fmt: skip
    lengths = np.ones((PROMPTS, 1), np.int32)
    batches = [
        full_rows(prompt, np.full((PROMPTS, 1, 1), token, np.int32), lengths, 193)
        for prompt, token in zip(prompts, TOKENS, strict=False)
    ]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    optimizer = optax.adam(1e-2)
    step = make_supervised_step(CONFIG, optimizer, STEP)
    state = init_train_state(tiny_params(CONFIG), optimizer, "all")
    for _ in range(40):
        for _ in range(10):
            state, metrics = step(state, batch)
        if metrics["train/loss"] < 5e-4:
            break
    assert metrics["train/loss"] < 5e-4
    return jax.device_get(state.params)


def test_only_policy_aware_rollouts_are_ever_right_and_policy_rollout_learns_from_them():
    asked, base = questions([TOKENS[1]]), taught()
    plain, _ = train(asked, steps=12, params=base)
    assert max(plain) == 0, plain  # never right, so never a signal
    free, aware = train(asked, steps=40, params=base, policy_rollout=True)
    assert free[0] == 0
    assert aware[0] > 0.9
    assert np.mean(free[-3:]) > 0.9, free
