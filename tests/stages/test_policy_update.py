"""One row for a prompt and its completions equals one row each: log-probs, loss and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.rollouts.full_rows import completion_logprobs, full_rows
from tests.tiny_model import load_tiny_processor, make_png, make_question, tiny_config, tiny_params
from trimpi_jax.inputs.encode import encode_prompt
from trimpi_jax.models import vlm
from trimpi_jax.objectives.grpo import dapo, denominator_of, grpo, policy_rollout_loss
from trimpi_jax.rollouts.choosing import NEVER
from trimpi_jax.rollouts.groups import PromptSizes, plain_view
from trimpi_jax.rollouts.sampler import allowed_tokens
from trimpi_jax.sharding import make_mesh, param_shardings, place_batch
from trimpi_jax.stages.policy_update import Distribution, make_scorer, make_update
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import init_train_state
from trimpi_jax.types import GroupBatch

CONFIG = tiny_config()
ALLOWED = allowed_tokens(CONFIG, CONFIG.text.vocab_size)
ROLLOUTS, STEPS, FREE = 4, 9, 2
# steepest descent without clipping: the change of the weights is the gradient
OPTIMIZER = optax.sgd(1.0)
QUESTIONS = [
    make_question(0),
    make_question(1, query="Which?", images=(make_png(1, 56, 112),)),
    make_question(2, query="And this?"),
    make_question(3, query="And that?"),
]


@functools.cache
def params():
    return tiny_params(CONFIG)


@functools.cache
def groups():
    """Four prompts, the last a filler; completions of all lengths from 1 to S."""
    rng = np.random.default_rng(0)
    rows = [
        encode_prompt(question, load_tiny_processor(), policy_in_prompt=False)
        for question in QUESTIONS[:3]
    ]
    prompts = plain_view(rows, PromptSizes((72,), (2,)), 4).batch
    lengths = rng.integers(1, STEPS + 1, (4, ROLLOUTS)).astype(np.int32)
    lengths[0] = [1, STEPS, 3, STEPS]
    lengths[3] = 0
    said = np.arange(STEPS) < lengths[..., None]
    tokens = rng.integers(100, 600, said.shape)
    return GroupBatch(
        prompts=prompts,
        completions=np.where(said, tokens, 0).astype(np.int32),
        lengths=lengths,
        rewards=rng.choice([0.0, 0.1, 1.0], lengths.shape).astype(np.float32),
        sampled_logprobs=np.where(said, -rng.random(said.shape), 0).astype(np.float32),
    )


def mask_of(batch):
    return (np.arange(STEPS) < batch.lengths[..., None]) & batch.prompts.valid[:, None, None]


@functools.partial(jax.jit, static_argnums=2)
def plain_logprobs(weights, rows, temperature):
    """log-softmax [B, T, V] of full rows, by the plain forward pass."""
    logits = vlm.apply(weights, CONFIG, rows) / temperature
    return jax.nn.log_softmax(jnp.where(ALLOWED[None, None], logits, NEVER))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_full_rows(temperature):
    batch = groups()
    distribution = Distribution(tuple(ALLOWED.tolist()), temperature)
    score = make_scorer(CONFIG, distribution, StepSettings("all", micro_batches=2))
    found = np.asarray(score(params(), batch.prompts, None, batch.completions))
    rows = full_rows(batch.prompts, batch.completions, batch.lengths, 72 + STEPS)
    table = plain_logprobs(params(), rows, temperature)
    expected = completion_logprobs(table, rows, batch.lengths, STEPS)
    np.testing.assert_allclose(np.where(mask_of(batch), found, 0), expected, atol=1e-5)


@functools.partial(jax.jit, static_argnums=4)
def plain_gradient(weights, rows, behavior, reference, objective):
    """Loss and gradient of the objective by full rows, log-probs gathered token by token."""
    batch = groups()
    mask = mask_of(batch)

    def loss_of(weights):
        table = plain_logprobs(weights, rows, 1.0)[:, :-1]
        chosen = jnp.take_along_axis(table, rows.tokens[:, 1:, None], axis=-1)[..., 0]
        at = np.minimum(
            (np.repeat(batch.prompts.lengths, ROLLOUTS) - 1)[:, None] + np.arange(STEPS),
            chosen.shape[1] - 1,
        )
        logprobs = jnp.take_along_axis(chosen, at, axis=1).reshape(mask.shape)
        return policy_rollout_loss(
            logprobs,
            behavior,
            reference,
            None,
            batch.rewards,
            mask,
            objective,
            denominator_of(mask, batch.prompts.valid, objective.loss_mean),
        )[0]

    return jax.value_and_grad(loss_of)(weights)


@functools.cache
def update_of(objective, step):
    distribution = Distribution(tuple(ALLOWED.tolist()), 1.0)
    return make_update(CONFIG, OPTIMIZER, objective, distribution, step, FREE)


def run_update(objective, behavior, reference, *, step=None, devices=1, visual=False):
    """(metrics, change of the weights) of one update."""
    step = step or StepSettings("all")
    update = update_of(objective, step)
    mesh = make_mesh(devices=jax.devices()[:devices])
    shardings = param_shardings(vlm.logical_axes(CONFIG), mesh, params())
    with jax.set_mesh(mesh):
        weights = jax.device_put(params(), shardings)
        images = groups().prompts
        seen = None
        if visual:
            seen = vlm.encode_images(
                weights, CONFIG, images.patches, images.patch_hw, images.patch_segment
            )
        state, metrics = update(
            init_train_state(weights, OPTIMIZER, step.trainable),
            place_batch(groups(), mesh),
            seen,
            None if behavior is None else place_batch(behavior, mesh),
            None if reference is None else place_batch(reference, mesh),
        )
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params())
    return jax.device_get(metrics), change


@functools.cache
def logprob_case():
    """Behavior and reference log-probs near those of the actor, so that some ratios are clipped."""
    batch = groups()
    rows = full_rows(batch.prompts, batch.completions, batch.lengths, 72 + STEPS)
    actor = completion_logprobs(plain_logprobs(params(), rows, 1.0), rows, batch.lengths, STEPS)
    rng = np.random.default_rng(1)
    noise = 0.3 * rng.standard_normal((2, *actor.shape)).astype(np.float32)
    return rows, actor + noise[0], actor + noise[1]


def assert_trees_close(found, expected, rtol=2e-4):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5 * scale), found, expected
    )


@pytest.mark.parametrize("objective", [grpo(), dapo()], ids=["grpo", "dapo"])
def test_the_update_is_the_gradient_of_full_rows(objective):
    rows, behavior, reference = logprob_case()
    anchor = reference if objective.kl_beta else None
    loss, gradient = plain_gradient(params(), rows, behavior, anchor, objective)
    metrics, change = run_update(objective, behavior, anchor)
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert_trees_close(change, jax.tree.map(lambda leaf: -np.asarray(leaf), gradient))
    assert metrics["train/clip_low_fraction"] + metrics["train/clip_high_fraction"] > 0


@functools.cache
def one_update():
    _, behavior, reference = logprob_case()
    return run_update(grpo(), behavior, reference)


@pytest.mark.parametrize(
    "options",
    [
        {"step": StepSettings("all", micro_batches=2, remat="full")},
        {"devices": 4},
    ],
    ids=["micro_batches", "four_devices"],
)
def test_how_it_is_computed_changes_nothing(options):
    if options.get("devices", 1) > jax.device_count():
        pytest.skip("needs four devices, real or fake")
    _, behavior, reference = logprob_case()
    metrics, change = run_update(grpo(), behavior, reference, **options)
    expected, expected_change = one_update()
    assert_trees_close(change, expected_change)
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_frozen_tower_takes_its_visual_tokens_from_outside():
    _, behavior, reference = logprob_case()
    step = StepSettings("all_but_vision")
    _, inside = run_update(grpo(), behavior, reference, step=step)
    _, outside = run_update(grpo(), behavior, reference, step=step, visual=True)
    assert_trees_close(outside, inside)
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(outside["vision"]))


def test_what_is_told_of_sampler_and_training_graph():
    batch = groups()
    metrics, _ = run_update(grpo(), None, logprob_case()[2])
    rows = logprob_case()[0]
    actor = completion_logprobs(plain_logprobs(params(), rows, 1.0), rows, batch.lengths, STEPS)
    mask, gap = mask_of(batch), actor - batch.sampled_logprobs
    free, aware = mask.copy(), mask.copy()
    free[:, FREE:], aware[:, :FREE] = False, False
    assert metrics["rollouts/logprob_gap_max"] == pytest.approx(np.abs(gap[free]).max(), rel=1e-4)
    assert metrics["rollouts/logprob_gap_mean"] == pytest.approx(np.abs(gap[free]).mean(), rel=1e-4)
    assert metrics["rollouts/aware_log_ratio_mean"] == pytest.approx(gap[aware].mean(), rel=1e-4)
    # behavior None is the actor itself: no ratio is anything but 1
    assert metrics["train/clip_low_fraction"] == metrics["train/clip_high_fraction"] == 0


def test_the_filler_moves_nothing():
    _, behavior, reference = logprob_case()
    _, expected = one_update()
    wild = dataclasses.replace(
        groups(), completions=groups().completions.copy(), rewards=groups().rewards.copy()
    )
    wild.completions[3], wild.rewards[3] = 111, [5.0, -5.0, 0.0, 1.0]
    plain = groups()
    try:
        globals()["groups"] = lambda: wild
        _, found = run_update(grpo(), behavior, reference)
    finally:
        globals()["groups"] = lambda: plain
    assert_trees_close(found, expected)
