"""An RL step as a whole, after sampling: PolicyRollout, dynamic sampling, resume, early stop.

The sampler is replaced by what it might have said; everything after it is the real step.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny_model import load_tiny_processor, make_question, tiny_config, tiny_params
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.models import vlm
from trimpi_jax.models.processor import encode_completion
from trimpi_jax.objectives.grpo import ObjectiveSettings, dapo, grpo
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh, param_shardings
from trimpi_jax.stages import rl
from trimpi_jax.stages.rl import RLStep
from trimpi_jax.stages.rl_settings import RLSettings, check_objective
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import init_train_state, split_params
from trimpi_jax.types import Rollouts

CONFIG = tiny_config()
PROMPTS, LENGTH = 4, 24
WRONG = ["<think>no</think>\\boxed{Case 1}", "<think>I see</think>\\boxed{Case 2}"]
RIGHT = ["<think>red</think>\\boxed{Case 3}", "<think>red cube</think>\\boxed{Case 3}"]
# plain steepest descent: a difference of gradients shows in the weights as large as it is
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))
SETTINGS = RLSettings(
    group_size=2,
    prompts=PROMPTS,
    update_prompts=PROMPTS,
    sample_prompts=PROMPTS,
    policy_rollout=True,
    max_new_tokens=LENGTH,
    temperature=1.0,
    top_p=1.0,
    completion_buckets=(LENGTH,),
    seed=0,
)
DYNAMIC = dataclasses.replace(SETTINGS, max_attempts=3, stop_after_dry_steps=2)


def questions(first=0, count=PROMPTS):
    return [
        make_question(i, query=f"Question {i}: which case?") for i in range(first, first + count)
    ]


class Script:
    """What the sampler says: texts by (question id, is aware), else WRONG and RIGHT."""

    def __init__(self, said=None):
        self.said = said or {}
        self.views = []  # (is aware, prompts as text) of every view that was read

    def texts(self, name, aware, count):
        if (name, aware) in self.said:
            return self.said[name, aware]
        return RIGHT if aware else (WRONG * count)[:count]

    def read_prompts(self, engine, weights, view, visual, settings, key, examples):
        decode = engine.processor.tokenizer.decode
        before = [decode(policy.row.tokens) for policy in view.policies]
        self.views.append((bool(before), before + [decode(row.tokens) for row in view.rows], key))
        return types.SimpleNamespace(
            last=jnp.zeros(()),
            examples=examples,
            aware=bool(view.policies),
            count=settings.completions,
        )

    def answer(self, weights, asked):
        shape = (len(asked.examples), asked.count, LENGTH)
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
        for q, example in enumerate(asked.examples):
            texts = self.texts(example.example_id, asked.aware, asked.count)
            for i, text in enumerate(texts):
                said = encode_completion(load_tiny_processor(), text)
                tokens[q, i, : len(said)], lengths[q, i] = said, len(said)
        logprobs = np.where(np.arange(LENGTH) < lengths[..., None], -0.01, 0).astype(np.float32)
        return Rollouts(tokens, logprobs, lengths, np.ones_like(lengths, bool))


@functools.cache
def jitted(settings, objective, micro_batches, devices):
    """One real step function per kind; its jitted halves are what takes time."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    sizes = PromptSizes((64, 192), (1,))
    engine = make_engine(CONFIG, load_tiny_processor(), sizes, mesh, dtype="float32")
    reference, _ = split_params(tiny_params(CONFIG), "all")
    return RLStep(
        engine,
        reference if objective.kl_beta else None,
        OPTIMIZER,
        settings,
        objective,
        RewardWeights(),
        StepSettings("all", micro_batches=micro_batches),
        fetch_more=lambda: [],
    )


def make_step(
    monkeypatch, settings=SETTINGS, objective=None, micro_batches=1, devices=1, said=None
):
    """A fresh step (no kept groups) with a script in place of the sampler."""
    script = Script(said)
    monkeypatch.setattr(rl, "read_prompts", script.read_prompts)
    monkeypatch.setattr(rl, "answer", script.answer)
    monkeypatch.setattr(rl, "fetch", lambda engine, view, rollouts: rollouts)
    plain = dataclasses.replace(settings, max_attempts=1, stop_after_dry_steps=0, max_rollouts=0)
    made = jitted(plain, objective or grpo(), micro_batches, devices)
    step = RLStep.__new__(RLStep)
    step.__dict__.update(made.__dict__)
    step.settings, step.kept, step.dry_steps, step.said = settings, [], 0, []
    step.say, step.script = step.said.append, script
    return step


def make_state(mesh):
    params = tiny_params(CONFIG)
    shardings = param_shardings(vlm.logical_axes(CONFIG), mesh, params)
    return init_train_state(jax.device_put(params, shardings), OPTIMIZER, "all")


def take(step, asked=None, count=1):
    """(parameters on the host, metrics of the last step) after `count` steps."""
    with jax.set_mesh(step.engine.mesh):
        state = make_state(step.engine.mesh)
        for number in range(count):
            state, metrics = step(state, number, asked or questions())
        return jax.device_get(state.params), jax.device_get(metrics)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def assert_close(found, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)


# ---- PolicyRollout


@pytest.fixture
def one_step(monkeypatch):
    return take(make_step(monkeypatch))


def test_plain_grpo_learns_nothing_where_no_free_rollout_is_right(monkeypatch):
    step = make_step(monkeypatch, dataclasses.replace(SETTINGS, policy_rollout=False))
    params, metrics = take(step)
    assert [aware for aware, *_ in step.script.views] == [False]
    assert step.last_rollouts[3]["view"] == "policy_free"  # all four of the group
    assert metrics["rollouts/accuracy_free"] == 0
    assert metrics["rollouts/zero_variance_share"] == 1
    assert metrics["train/grad_norm"] < 1e-6  # reference = actor: no KL either
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, tiny_params(CONFIG))
    assert max(jax.tree.leaves(change)) < 1e-7


def test_the_joint_group_has_a_gradient(one_step):
    params, metrics = one_step
    assert metrics["rollouts/accuracy_free"] == 0
    assert metrics["rollouts/accuracy_aware"] == 1
    assert metrics["rollouts/accuracy_gap"] == 1
    assert metrics["rollouts/rescued_share"] == 1
    assert metrics["rollouts/zero_variance_share"] == 0
    # all are well formed: rewards 0.1 and 1.0
    assert metrics["rollouts/reward_mean"] == pytest.approx(0.55)
    assert metrics["train/grad_norm"] > 1e-2
    assert not equal(params, tiny_params(CONFIG))


def test_behavior_is_that_of_the_policy_free_prompt(one_step):
    _, metrics = one_step
    # ratios are 1 for aware completions, too, though the sampler claimed -0.01 a token for them
    assert metrics["train/clip_low_fraction"] == metrics["train/clip_high_fraction"] == 0
    assert metrics["train/kl"] == pytest.approx(0, abs=1e-6)
    # advantages -1, -1, 1, 1 at ratio 1 add up to a loss of 0
    assert metrics["train/loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["rollouts/aware_log_ratio_mean"] < -1


def test_every_step_tells_what_users_ask_for(one_step):
    _, metrics = one_step
    told = """rollouts/accuracy_free rollouts/accuracy_aware rollouts/accuracy_gap
        rollouts/zero_variance_share rollouts/rescued_share rollouts/aware_log_ratio_mean
        rollouts/logprob_gap_mean rollouts/logprob_gap_max train/clip_low_fraction
        train/clip_high_fraction train/kl train/entropy rollouts/completion_tokens
        rollouts/cut_off_share rollouts/format_failures rollouts/failed_grades train/grad_norm
        time/prefill_s time/decode_s time/grade_s time/score_s time/update_s time/step_s
        rollouts/tokens_per_s rollouts/padding_waste rollouts/attempts rollouts/groups"""
    assert not set(told.split()) - set(metrics)
    assert 0 < metrics["rollouts/padding_waste"] < 1


def test_no_gradient_flows_through_the_policy_aware_prompt(monkeypatch, one_step):
    other = [
        dataclasses.replace(question, policy_text="Another policy. Say what you like.")
        for question in questions()
    ]
    expected, metrics = one_step
    found, other_metrics = take(make_step(monkeypatch), other)
    assert equal(found, expected)  # bit by bit
    assert other_metrics["train/grad_norm"] == metrics["train/grad_norm"]
    # the policy-free prompt does matter: another query gives another update
    asked = [dataclasses.replace(question, query="Now what?") for question in questions()]
    assert not equal(take(make_step(monkeypatch), asked)[0], expected)


def test_a_few_updates_move_what_the_policy_taught_into_the_policy_free_actor(monkeypatch):
    step = make_step(monkeypatch)
    params, _ = take(step, count=4)
    free = [record["completion"] for record in step.last_rollouts[:4]]
    assert free == WRONG + RIGHT

    def score(weights):
        step.loaded = step.engine.load(weights)
        asking = [((0, i, 0), question) for i, question in enumerate(questions())]
        groups = step._draw(9, asking, rl._Clock()).groups
        batch = step._group_batch(groups)
        found = np.asarray(step._score(weights, batch, None))
        said = np.arange(found.shape[-1]) < batch.lengths[..., None]
        return np.where(said, found, 0).sum(axis=-1).mean(axis=0)

    change = score(params) - score(tiny_params(CONFIG))
    assert (change[2:] > 0.1).all(), change  # the right ones became likelier
    assert (change[:2] < change[2:].min()).all(), change


def test_the_sampled_views_are_policy_free_and_policy_aware(monkeypatch):
    step = make_step(monkeypatch)
    take(step)
    (_, free, free_key), (aware, with_policy, aware_key) = step.script.views
    assert aware
    text = "\n".join(with_policy)
    for question in questions():
        assert question.policy_text in text
        assert question.query in "\n".join(free)
        assert question.query in text
    assert "# Condition" not in "\n".join(free)
    keys = [jax.random.key_data(key).tolist() for key in (free_key, aware_key)]
    assert keys[0] != keys[1]  # the views never share their randomness


# ---- how it is computed


@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"devices": 4}], ids=str)
def test_micro_batches_and_devices_change_nothing(monkeypatch, one_step, options):
    if options.get("devices", 1) > jax.device_count():
        pytest.skip("needs four devices, real or fake")
    found, metrics = take(make_step(monkeypatch, **options))
    expected, other = one_step
    assert_close(found, expected)
    for name in ("train/grad_norm", "train/entropy", "rollouts/reward_mean"):
        assert_close(metrics[name], other[name])


def test_sampling_a_few_prompts_at_a_time_changes_nothing(monkeypatch, one_step):
    step = make_step(monkeypatch, dataclasses.replace(SETTINGS, sample_prompts=3))
    found, metrics = take(step)
    assert len(step.script.views) == 4  # three prompts and one, in two views
    expected, other = one_step
    assert equal(found, expected)
    assert metrics["rollouts/reward_mean"] == other["rollouts/reward_mean"]


def test_two_updates_a_step_score_the_behavior_first(monkeypatch):
    settings = dataclasses.replace(SETTINGS, update_prompts=PROMPTS // 2)
    step = make_step(monkeypatch, settings)
    _, metrics = take(step)
    # the second update is off-policy: its ratios have moved, its KL is no longer 0
    assert metrics["train/kl"] > 1e-5
    assert metrics["rollouts/groups"] == PROMPTS


def test_the_reference_is_not_the_donated_state(monkeypatch):
    step = make_step(monkeypatch)
    take(step, count=2)
    trained, _ = split_params(tiny_params(CONFIG), "all")
    assert equal(jax.device_get(step.reference), trained)


# ---- dynamic sampling

FLAT = {  # groups without a spread: every rollout is wrong, in both views
    **{(f"q{i}", False): WRONG for i in range(40)},
    **{(f"q{i}", True): WRONG for i in range(40)},
}


def said_with_spread(*numbers):
    return FLAT | {(f"q{i}", True): RIGHT for i in numbers}


def feed(step, batches):
    """Hands out the batches, one an attempt; returns the list of those not fetched yet."""
    left = list(batches)
    step.fetch_more = lambda: left.pop(0)
    return left


def test_groups_without_spread_are_replaced_and_the_surplus_is_kept(monkeypatch):
    # of q0..q3 only q1 has a spread; of q4..q7 all have: one and four, one more than needed
    step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(1, 4, 5, 6, 7))
    left = feed(step, [questions(4), questions(8)])
    _, metrics = take(step)
    assert len(left) == 1
    assert metrics["rollouts/attempts"] == 2
    assert metrics["rollouts/groups"] == PROMPTS
    assert metrics["rollouts/zero_variance_share"] == pytest.approx(3 / 8)
    assert [group.example.example_id for group in step.kept] == ["q7"]
    assert step.kept[0].behavior_logprobs is not None  # by the actor that sampled it
    assert step.dry_steps == 0


def test_the_surplus_is_trained_on_first_and_off_policy(monkeypatch):
    step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(*range(40)))
    feed(step, [questions(4), questions(8), questions(12)])
    with jax.set_mesh(step.engine.mesh):
        state = make_state(step.engine.mesh)
        step.script.said = said_with_spread(1, *range(4, 40))
        state, _ = step(state, 0, questions(0))
        assert [group.example.example_id for group in step.kept] == ["q7"]
        before = len(step.script.views)
        state, metrics = step(state, 1, questions(20))
    assert metrics["rollouts/attempts"] == 1
    assert len(step.script.views) == before + 2  # one batch, two views
    assert len(step.kept) == 1  # four fresh ones, one of them now waits
    assert step.kept[0].example.example_id == "q23"


def test_running_out_trains_on_what_there_is_says_so_and_ends_the_stage(monkeypatch):
    step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(1))
    feed(step, [questions(4), questions(8), questions(12), questions(16), questions(20)])
    with jax.set_mesh(step.engine.mesh):
        state = make_state(step.engine.mesh)
        state, metrics = step(state, 0, questions(0))
        assert metrics["rollouts/groups"] == 1
        assert metrics["rollouts/attempts"] == 3
        assert metrics["train/grad_norm"] > 0
        assert "1 of 4 groups have a spread of rewards after 3 attempts" in step.said[0]
        assert not step.is_finished
        before = jax.device_get(state.params)
        step.script.said = FLAT
        state, metrics = step(state, 1, questions(24))
    assert metrics["rollouts/groups"] == 0  # nothing to train on: nothing is trained
    assert "train/loss" not in metrics
    assert equal(jax.device_get(state.params), before)
    assert "2 such steps in a row" in step.said[1]
    assert step.is_finished


def test_a_limit_of_rollouts_is_met_to_the_rollout_and_ends_the_stage(monkeypatch):
    """Six prompts of four rollouts are left; a step wants four groups and finds no spread."""
    settings = dataclasses.replace(DYNAMIC, max_rollouts=24)
    step = make_step(monkeypatch, settings, said=FLAT)
    left = feed(step, [questions(4), questions(8)])
    _, metrics = take(step)
    # the first four, two of the second four, and no third attempt
    assert metrics["rollouts/sampled_total"] == 24 and metrics["rollouts/attempts"] == 2
    assert len(left) == 1 and step.is_finished and step.dry_steps == 0
    other = make_step(monkeypatch, settings)
    assert not other.is_finished
    other.restore_place(step.save_place())
    assert other.is_finished


def test_one_group_alone_gives_the_update_of_its_own_denominator(monkeypatch):
    step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(1))
    feed(step, [[], []])
    found, _ = take(step)
    # the same group four times over is the same mean
    same = [dataclasses.replace(questions()[1], example_id="q1") for _ in range(PROMPTS)]
    expected, _ = take(make_step(monkeypatch), same)
    assert_close(found, expected)


def test_a_prompt_counts_once_a_step(monkeypatch):
    step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(1))
    feed(step, [questions(0), questions(0)])
    _, metrics = take(step)
    assert metrics["rollouts/groups"] == 1
    assert len(step.script.views) == 2  # the second and third batch held nothing new


def test_a_killed_run_takes_the_identical_next_step(monkeypatch):
    def fresh():
        step = make_step(monkeypatch, DYNAMIC, said=said_with_spread(1, *range(4, 40)))
        feed(step, [questions(4), questions(8)])
        return step

    whole = fresh()
    with jax.set_mesh(whole.engine.mesh):
        state = make_state(whole.engine.mesh)
        state, _ = whole(state, 0, questions(0))
        saved, place = jax.device_get(state), whole.save_place()
        assert place["groups"]
        state, metrics = whole(state, 1, questions(20))
        expected = jax.device_get(state.params)

        resumed = fresh()
        resumed.restore_place(place)
        again, other = resumed(jax.device_put(saved), 1, questions(20))
    assert equal(jax.device_get(again.params), expected)
    for name in ("train/loss", "train/grad_norm", "rollouts/reward_mean", "rollouts/groups"):
        assert float(other[name]) == float(metrics[name])


def test_dapo_scores_no_reference(monkeypatch):
    step = make_step(monkeypatch, DYNAMIC, dapo(), said=said_with_spread(*range(4)))
    assert step.reference is None
    _, metrics = take(step)
    assert "train/kl" not in metrics
    assert metrics["train/grad_norm"] > 1e-2


def test_an_overlong_answer_is_punished_in_tokens(monkeypatch):
    texts = ["<think>" + "red " * words + "</think>\\boxed{Case 3}" for words in range(12)]
    processor = load_tiny_processor()
    long = [text for text in texts if len(encode_completion(processor, text)) == 22] * 2
    said = {(f"q{i}", True): long for i in range(4)}
    settings = dataclasses.replace(SETTINGS, overlong_tokens=10)
    step = make_step(monkeypatch, settings, said=said)
    _, metrics = take(step)
    # (22 - 14) / 10 of a point for each right one, none for the short wrong ones
    assert metrics["rollouts/reward_mean"] == pytest.approx((0.1 + 1.0 - 0.8) / 2)


# ---- bad input


def test_a_prompt_that_fits_no_bucket_leaves_its_place_empty(monkeypatch):
    long = make_question(99, query="word " * 200)
    step = make_step(monkeypatch)
    _, metrics = take(step, [*questions()[:-1], long])
    assert metrics["inputs/dropped_too_long"] == 1
    assert metrics["rollouts/groups"] == PROMPTS - 1
    with pytest.raises(ValueError, match=r"none of the prompts \['q99'"):
        take(make_step(monkeypatch), [long] * PROMPTS)


def test_a_grader_that_fails_too_often_ends_the_run(monkeypatch):
    asked = [
        dataclasses.replace(question, meta={"answer_form": {"form": "telepathy"}})
        for question in questions()
    ]
    with pytest.raises(RuntimeError, match="16 of 16 completions could not be graded"):
        take(make_step(monkeypatch), asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_prompts": 3}, r"rl.prompts 4 is not a multiple of rl.update_prompts 3"),
        ({"sample_prompts": 5}, "rl.sample_prompts 5 is not between 1 and rl.prompts 4"),
        ({"group_size": 0}, "group_size must be >= 1"),
        ({"group_size": 1, "policy_rollout": False}, ">= 2 without"),
        ({"temperature": 0.0}, "equal rollouts teach nothing"),
        ({"completion_buckets": (8, 16)}, "must be max_new_tokens 24"),
        ({"max_attempts": 0}, "max_attempts >= 1"),
        ({"max_rollouts": 6}, r"rl.max_rollouts 6 is not a multiple of a group's 4 rollouts"),
        ({"stop_after_dry_steps": 2}, "no effect without dynamic sampling"),
        ({"overlong_tokens": 24}, "overlong_tokens < max_new_tokens"),
        ({"max_failed_grades": 2.0}, "is a share"),
        ({"policy_chunk": 0}, "policy_chunk must be >= 1"),
        ({"policy_chunk": 2, "policy_rollout": False}, "no effect without policy rollouts"),
    ],
)
def test_settings_without_meaning_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_importance_weights_need_the_plain_distribution(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    objective = ObjectiveSettings(importance_cap=2.0)
    with pytest.raises(ValueError, match="needs temperature 1, top_p 1 and top_k 0"):
        check_objective(objective, settings)
    check_objective(objective, SETTINGS)
