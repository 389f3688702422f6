"""PolicyRollout as a whole: only policy-aware rollouts are right, and the policy-free actor learns.

The samplers are replaced by what they might have said; everything after them is the real step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny_model import load_tiny_processor, make_question, tiny_config, tiny_params
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.models import vlm
from trimpi_jax.models.processor import encode_completion
from trimpi_jax.objectives.grpo import GRPOSettings
from trimpi_jax.rollouts.groups import make_training_rows, make_view
from trimpi_jax.sharding import make_mesh, param_shardings
from trimpi_jax.stages.rl import RLSettings, RLStep
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import init_train_state
from trimpi_jax.types import Rollouts

CONFIG = tiny_config()
PROMPTS, LENGTH = 8, 24
QUESTIONS = [make_question(i, query=f"Question {i}: which case?") for i in range(PROMPTS)]
WRONG = ["<think>no</think>\\boxed{Case 1}", "<think>I see</think>\\boxed{Case 2}"]
RIGHT = ["<think>red</think>\\boxed{Case 3}", "<think>red cube</think>\\boxed{Case 3}"]
# plain steepest descent: a difference of gradients shows in the weights as large as it is
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))
SETTINGS = RLSettings(
    group_size=2,
    prompts=PROMPTS,
    update_prompts=PROMPTS,
    policy_rollout=True,
    max_new_tokens=LENGTH,
    temperature=1.0,
    top_p=1.0,
    prompt_buckets=(64, 192),
    row_buckets=(80,),
    windows=1,
    seed=0,
)


def rollouts_of(texts) -> Rollouts:
    """Every prompt is answered by the same texts; what the sampler claims of them is nonsense."""
    tokens = np.zeros((PROMPTS, len(texts), LENGTH), np.int32)
    lengths = np.zeros((PROMPTS, len(texts)), np.int32)
    for i, text in enumerate(texts):
        said = encode_completion(load_tiny_processor(), text)
        tokens[:, i, : len(said)], lengths[:, i] = said, len(said)
    logprobs = np.where(np.arange(LENGTH) < lengths[..., None], -0.01, 0).astype(np.float32)
    return Rollouts(tokens, logprobs, lengths, np.ones_like(lengths, bool))


@functools.cache
def make_step(policy_rollout=True, micro_batches=1, devices=1):
    step = RLStep(
        CONFIG,
        load_tiny_processor(),
        tiny_params(CONFIG),
        OPTIMIZER,
        dataclasses.replace(SETTINGS, policy_rollout=policy_rollout),
        GRPOSettings(kl_beta=0.01),
        RewardWeights(),
        StepSettings("all", micro_batches=micro_batches),
        make_mesh(devices=jax.devices()[:devices]),
    )
    free = WRONG if policy_rollout else WRONG + WRONG
    step.sample_free = lambda *args: rollouts_of(free)
    step.sample_aware = lambda *args: rollouts_of(RIGHT)
    return step


def make_state(mesh):
    params = tiny_params(CONFIG)
    shardings = param_shardings(vlm.logical_axes(CONFIG), mesh, params)
    return init_train_state(jax.device_put(params, shardings), OPTIMIZER, "all")


def take(step, questions=QUESTIONS, count=1):
    """(parameters on the host, metrics of the last step) after `count` steps."""
    with jax.set_mesh(step.mesh):
        state = make_state(step.mesh)
        for number in range(count):
            state, metrics = step(state, number, questions)
        return jax.device_get(state.params), metrics


@functools.cache
def one_step():
    return take(make_step())


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_plain_grpo_learns_nothing_where_no_free_rollout_is_right():
    params, metrics = take(make_step(policy_rollout=False))
    assert metrics["rollouts/accuracy_free"] == 0
    assert metrics["rollouts/zero_variance_share"] == 1
    assert metrics["train/grad_norm"] < 1e-6  # reference = actor: no KL either
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, tiny_params(CONFIG))
    assert max(jax.tree.leaves(change)) < 1e-7


def test_the_joint_group_has_a_gradient():
    params, metrics = one_step()
    assert metrics["rollouts/accuracy_free"] == 0
    assert metrics["rollouts/accuracy_aware"] == 1
    assert metrics["rollouts/accuracy_gap"] == 1
    assert metrics["rollouts/rescued_share"] == 1
    assert metrics["rollouts/zero_variance_share"] == 0
    # all are well formed: rewards 0.1 and 1.0
    assert metrics["rollouts/reward_mean"] == pytest.approx(0.55)
    assert metrics["train/grad_norm"] > 1e-2
    assert not equal(params, tiny_params(CONFIG))


def test_behavior_logprobs_are_recomputed_under_the_policy_free_prompt():
    _, metrics = one_step()
    # ratios are 1 for aware completions, too, though the sampler claimed -0.01 a token for them
    assert metrics["train/clip_low_fraction"] == 0
    assert metrics["train/clip_high_fraction"] == 0
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    # advantages -1, -1, 1, 1 at ratio 1 add up to a loss of 0
    assert metrics["train/loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["rollouts/aware_log_ratio_mean"] < -1


def test_no_gradient_flows_through_the_policy_aware_prompt():
    other = [
        dataclasses.replace(question, policy_text="Another policy. Say what you like.")
        for question in QUESTIONS
    ]
    expected, metrics = one_step()
    found, other_metrics = take(make_step(), other)
    assert equal(found, expected)  # bit by bit
    assert other_metrics["train/grad_norm"] == metrics["train/grad_norm"]
    # the policy-free prompt does matter: another query gives another update
    asked = [dataclasses.replace(question, query="Now what?") for question in QUESTIONS]
    assert not equal(take(make_step(), asked)[0], expected)


def completion_logprobs(params, texts):
    """Mean log-prob of whole completions after the policy-free prompt: one number per text."""
    view = make_view(
        QUESTIONS,
        load_tiny_processor(),
        policy_in_prompt=False,
        token_buckets=SETTINGS.prompt_buckets,
        windows=1,
    )
    said = rollouts_of(texts)
    rows = make_training_rows(view, said.tokens, said.lengths, SETTINGS.row_buckets)
    names = ("patches", "patch_hw", "patch_segment")
    images = {name: getattr(view.batch, name) for name in names}
    logprobs = np.asarray(make_step().score(params, rows, images))
    sums = np.where(rows.loss_mask[:, 1:], logprobs, 0).sum(axis=1)
    return sums.reshape(PROMPTS, -1).mean(axis=0)


def test_a_few_updates_move_what_the_policy_taught_into_the_policy_free_actor():
    before = completion_logprobs(tiny_params(CONFIG), WRONG + RIGHT)
    params, _ = take(make_step(), count=4)
    change = completion_logprobs(params, WRONG + RIGHT) - before
    assert (change[2:] > 0.1).all(), change  # the right ones became likelier
    assert (change[:2] < change[2:].min()).all(), change


def test_micro_batches_give_the_same_update():
    expected, metrics = one_step()
    found, other = take(make_step(micro_batches=2))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)
    for name in ("train/grad_norm", "train/entropy"):
        close(other[name], metrics[name])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices, real or fake")
def test_eight_devices_give_the_same_update():
    expected, metrics = one_step()
    found, other = take(make_step(devices=8))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)
    for name in ("train/grad_norm", "train/entropy", "rollouts/reward_mean"):
        close(other[name], metrics[name])


def test_a_prompt_that_fits_no_bucket_gives_its_place_to_one_that_does():
    long = make_question(99, query="word " * 200)
    params, metrics = take(make_step(), [*QUESTIONS[:-1], long])
    assert metrics["inputs/dropped_too_long"] == 1
    assert equal(params, take(make_step(), [*QUESTIONS[:-1], QUESTIONS[0]])[0])
    with pytest.raises(ValueError, match=r"none of the prompts \['q99'"):
        take(make_step(), [long] * PROMPTS)


def test_rollouts_are_told_with_their_view():
    step = make_step()
    take(step)
    views = [record["view"] for record in step.last_rollouts]
    assert views == ["policy_free", "policy_free", "policy_aware", "policy_aware"] * PROMPTS
    texts = [record["completion"] for record in step.last_rollouts[:4]]
    assert texts == WRONG + RIGHT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_prompts": 3}, r"rl.prompts 8 is not a multiple of rl.update_prompts 3"),
        ({"group_size": 0}, "group_size must be >= 1"),
        ({"group_size": 1, "policy_rollout": False}, ">= 2 without"),
    ],
)
def test_sizes_without_meaning_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_the_sampled_views_are_policy_free_and_policy_aware():
    """What the samplers are given: the aware one the policy, the free one never."""
    step = make_step()
    processor = load_tiny_processor()
    seen = {}

    def spy(name, plain):
        def sample(params, batch, key, ids):
            tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
            seen[name] = [
                processor.tokenizer.decode(row[:n]) for row, n in zip(tokens, lengths, strict=True)
            ]
            seen[f"{name} key"] = jax.random.key_data(key).tolist()
            return plain(params, batch, key, ids)

        return sample

    plain = step.sample_free, step.sample_aware
    step.sample_free, step.sample_aware = spy("free", plain[0]), spy("aware", plain[1])
    try:
        take(step)
    finally:
        step.sample_free, step.sample_aware = plain
    for i, question in enumerate(QUESTIONS):
        assert question.policy_text in seen["aware"][i]
        assert "# Condition" not in seen["free"][i]
        assert question.query in seen["free"][i]
    assert seen["free key"] != seen["aware key"]  # the views never share their randomness


def test_the_reference_is_not_the_donated_state():
    step = make_step()
    take(step, count=2)
    assert equal(jax.device_get(step.reference), tiny_params(CONFIG))
    assert jnp.isfinite(jax.tree.leaves(step.reference)[0]).all()
