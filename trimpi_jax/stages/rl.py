"""The RL stage: GRPO with or without PolicyRollout.

One step, in the order in which its numbers are born:

    views       every prompt without and with the policy            rollouts/groups.py
    rollouts    G completions of each (2G free ones without PoRo)    rollouts/sampler.py
    rewards     text -> [Q, 2G]                                      grading/answers.py
    log-probs   behavior actor and reference, policy-free prompt     below, jitted
    updates     joint-group advantage, clipped surrogate, KL         objectives/grpo.py, jitted

Deviations from the paper: 1. the reward weights are 0.9 accuracy + 0.1 format (not stated there).
2. A run without PolicyRollout draws 2G free rollouts, so both cost the same number of rollouts.

Source: paper section 4.
Next: trimpi_jax/evaluators/questions.py
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.example import Example
from trimpi_jax.grading.answers import Grade, RewardWeights, grade_completion, reward
from trimpi_jax.inputs.batching import padding_waste
from trimpi_jax.models import vlm
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.layers import cast_weights
from trimpi_jax.models.processor import Processor, decode_completion
from trimpi_jax.objectives.grpo import GRPOSettings, grpo_loss
from trimpi_jax.rollouts.groups import View, fits, make_training_rows, make_view
from trimpi_jax.rollouts.sampler import SamplerSettings, make_sampler, prompt_ids
from trimpi_jax.sharding import place_batch
from trimpi_jax.stages.supervised import StepSettings, row_logprobs
from trimpi_jax.stages.train_state import (
    Flat,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    join_params,
    split_micro_batches,
    split_params,
)
from trimpi_jax.types import Batch

SAMPLING = 1  # folded into the root key: what the randomness is for
FREE, AWARE = 0, 1  # folded in next: the view


@dataclasses.dataclass(frozen=True)
class RLSettings:
    """Sizes of a step. `group_size` is G: a prompt's joint group has 2G rollouts."""

    group_size: int
    prompts: int
    update_prompts: int
    policy_rollout: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    prompt_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    windows: int
    seed: int

    def __post_init__(self):
        if self.prompts % self.update_prompts:
            raise ValueError(
                f"rl.prompts {self.prompts} is not a multiple of rl.update_prompts"
                f" {self.update_prompts}: an update takes whole groups"
            )
        if self.group_size < 1 or (self.group_size == 1 and not self.policy_rollout):
            # a joint group of 2 is the smallest that has a spread
            raise ValueError("rl.group_size must be >= 1 with policy rollouts, >= 2 without")


class RLStep:
    """The step function of the loop: `step(state, number, examples) -> (state, metrics)`."""

    def __init__(
        self,
        config: VLMConfig,
        processor: Processor,
        reference: Any,
        optimizer: optax.GradientTransformation,
        settings: RLSettings,
        objective: GRPOSettings,
        weights: RewardWeights,
        step: StepSettings,
        mesh: jax.sharding.Mesh,
    ):
        self.processor, self.settings, self.weights = processor, settings, weights
        self.reference, self.mesh = reference, mesh
        free = settings.group_size * (1 if settings.policy_rollout else 2)
        self.sample_free = _sampler(config, processor, settings, free, step.dtype)
        self.sample_aware = _sampler(config, processor, settings, settings.group_size, step.dtype)
        self.score = make_scorer(config, step)
        self.update = make_update(config, optimizer, objective, step)
        self.last_rollouts: list[dict[str, Any]] = []  # for a look at the text

    def __call__(
        self, state: TrainState, number: int, examples: Sequence[Example]
    ) -> tuple[TrainState, dict[str, Any]]:
        clock = _Clock()
        examples, dropped = self._fitting(examples)
        free = self._view(examples, policy_in_prompt=False)
        tokens, lengths, stopped, sampled = self._rollouts(state.params, number, examples, free)
        clock.lap("rollout")
        texts, grades = self._grade(examples, tokens, lengths, stopped)
        rewards = np.asarray(
            [[reward(grade, self.weights) for grade in row] for row in grades], np.float32
        )
        clock.lap("grade")
        rows = make_training_rows(free, tokens, lengths, self.settings.row_buckets)
        images = _images_of(free.batch)
        behavior = self.score(state.params, self._place(rows), self._place(images))
        reference = self.score(self.reference, self._place(rows), self._place(images))
        behavior, reference = jax.device_get((behavior, reference))
        clock.lap("score")
        state, metrics = self._updates(state, rows, images, rewards, behavior, reference)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        clock.lap("update")
        self.last_rollouts = _as_records(examples, texts, grades, self._free_count(tokens))
        metrics |= self._rollout_metrics(grades, rewards, lengths, stopped)
        metrics |= _logprob_metrics(rows, behavior, sampled, lengths, self._free_count(tokens))
        metrics["rollouts/padding_waste"] = padding_waste(rows)
        metrics["inputs/dropped_too_long"] = dropped
        return state, metrics | clock.laps

    def _fitting(self, examples: Sequence[Example]) -> tuple[list[Example], int]:
        """(prompts that fit their buckets, how many did not).

        The shape of a step is static, so the places of the others are taken by the first that fit.
        """
        kept = [
            example
            for example in examples
            if fits(
                example,
                self.processor,
                with_policy=self.settings.policy_rollout,
                token_buckets=self.settings.prompt_buckets,
                windows=self.settings.windows,
            )
        ]
        if not kept:
            raise ValueError(
                f"none of the prompts {[example.example_id for example in examples[:4]]} ... fits"
                f" {max(self.settings.prompt_buckets)} tokens and {self.settings.windows} windows;"
                " add a larger bucket to --config.prompt_buckets"
            )
        filled = list(itertools.islice(itertools.cycle(kept), len(examples)))
        return filled, len(examples) - len(kept)

    def _rollouts(self, params, number, examples, free: View):
        """(tokens [Q, R, S], lengths [Q, R], stopped [Q, R], logprobs [Q, R, S]) on the host."""
        key = jax.random.fold_in(jax.random.key(self.settings.seed), SAMPLING)
        key = jax.random.fold_in(key, number)
        ids = prompt_ids([example.example_id for example in examples], len(examples))
        drawn = [
            self.sample_free(params, self._place(free.batch), jax.random.fold_in(key, FREE), ids)
        ]
        if self.settings.policy_rollout:
            aware = self._view(examples, policy_in_prompt=True)
            drawn.append(
                self.sample_aware(
                    params, self._place(aware.batch), jax.random.fold_in(key, AWARE), ids
                )
            )
        drawn = jax.device_get(drawn)
        return tuple(
            np.concatenate([getattr(part, name) for part in drawn], axis=1)
            for name in ("tokens", "lengths", "stopped", "logprobs")
        )

    def _view(self, examples, *, policy_in_prompt: bool) -> View:
        return make_view(
            examples,
            self.processor,
            policy_in_prompt=policy_in_prompt,
            token_buckets=self.settings.prompt_buckets,
            windows=self.settings.windows,
        )

    def _place(self, batch: Any) -> Any:
        return place_batch(batch, self.mesh)

    def _free_count(self, tokens: np.ndarray) -> int:
        return self.settings.group_size if self.settings.policy_rollout else tokens.shape[1]

    def _grade(self, examples, tokens, lengths, stopped) -> tuple[list, list[list[Grade]]]:
        texts, grades = [], []
        for q, example in enumerate(examples):
            said = [
                decode_completion(self.processor, tokens[q, i, : lengths[q, i]])
                for i in range(tokens.shape[1])
            ]
            texts.append(said)
            grades.append(
                [
                    grade_completion(text, example.answer, stopped=bool(stopped[q, i]))
                    for i, text in enumerate(said)
                ]
            )
        return texts, grades

    def _updates(self, state, rows, images, rewards, behavior, reference):
        """One optimizer update per `update_prompts` prompts; metrics are their means."""
        num_prompts, rollouts = rewards.shape
        size = self.settings.update_prompts
        totals: collections.Counter = collections.Counter()
        for start in range(0, num_prompts, size):
            groups = slice(start, start + size)
            flat = slice(start * rollouts, (start + size) * rollouts)
            part = jax.tree.map(lambda leaf, flat=flat: leaf[flat], rows)
            pictures = {name: leaf[groups] for name, leaf in images.items()}
            state, metrics = self.update(
                state,
                self._place(part),
                self._place(pictures),
                self._place(rewards[groups]),
                self._place(behavior[flat]),
                self._place(reference[flat]),
            )
            for name, value in metrics.items():
                totals[name] += value / (num_prompts // size)
        return state, dict(totals)

    def _rollout_metrics(self, grades, rewards, lengths, stopped) -> dict[str, Any]:
        accuracy = np.asarray([[grade.accuracy for grade in row] for row in grades])
        free = self._free_count(accuracy)
        spread = rewards.std(axis=1) > 1e-6
        free_spread = rewards[:, :free].std(axis=1) > 1e-6
        reasons = collections.Counter(grade.reason for row in grades for grade in row)
        metrics = {
            "rollouts/reward_mean": float(rewards.mean()),
            "rollouts/accuracy_free": float(accuracy[:, :free].mean()),
            "rollouts/zero_variance_share": float(1 - spread.mean()),
            "rollouts/completion_tokens": float(lengths.mean()),
            "rollouts/cut_off_share": float(1 - stopped.mean()),
            "rollouts/format_share": reasons["ok"] / lengths.size,
            "rollouts/format_failures": {k: v for k, v in reasons.items() if k != "ok"},
        }
        if self.settings.policy_rollout:
            aware = float(accuracy[:, free:].mean())
            metrics["rollouts/accuracy_aware"] = aware
            metrics["rollouts/accuracy_gap"] = aware - metrics["rollouts/accuracy_free"]
            metrics["rollouts/rescued_share"] = float((spread & ~free_spread).mean())
        return metrics


def make_scorer(
    config: VLMConfig, step: StepSettings
) -> Callable[[Any, Batch, dict[str, jax.Array]], jax.Array]:
    """A jitted `score(params, rows, images) -> logprobs float32 [Q * R, T - 1]`."""

    def score(params: Any, rows: Batch, images: dict[str, jax.Array]) -> jax.Array:
        params = cast_weights(params, step.dtype)
        visual = _repeated_visual(params, config, rows, images, step)
        logprobs, _ = row_logprobs(params, config, rows, visual, step)
        return logprobs

    return jax.jit(score)


def make_update(
    config: VLMConfig,
    optimizer: optax.GradientTransformation,
    objective: GRPOSettings,
    step: StepSettings,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `update(state, rows, images, rewards, behavior, reference)`; state donated.

    rows: Q * R rows, row q * R + i is rollout i of prompt q; images: arrays of Q prompts; rewards
    float32 [Q, R]; behavior, reference float32 [Q * R, T - 1]. The group advantage is computed
    inside, so the rewards of a whole joint group must be in one call.
    """

    def update(state, rows: Batch, images, rewards, behavior, reference):
        num_prompts, rollouts = rewards.shape
        trained, frozen = split_params(state.params, step.trainable)
        frozen = cast_weights(frozen, step.dtype)
        tokens = rows.tokens.shape[1]

        def grouped(leaf):  # [Q * R, ...] -> [Q, R, ...]
            return leaf.reshape(num_prompts, rollouts, *leaf.shape[1:])

        def ungrouped(leaf):  # [q, R, ...] -> [q * R, ...]
            return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])

        def loss_of(trained: Flat, micro):
            groups, pictures, micro_rewards, micro_behavior, micro_reference = micro
            params = join_params(trained, frozen)
            flat = jax.tree.map(ungrouped, groups)
            visual = _repeated_visual(params, config, flat, pictures, step)
            logprobs, entropy = row_logprobs(params, config, flat, visual, step)
            mask = groups.loss_mask[:, :, 1:]
            shape = (*micro_rewards.shape, tokens - 1)
            loss, metrics = grpo_loss(
                logprobs.reshape(shape),
                micro_behavior,
                micro_reference,
                micro_rewards,
                mask,
                objective,
                num_prompts,
            )
            count = jnp.maximum(jnp.sum(rows.loss_mask[:, 1:]), 1)
            entropy_sum = jnp.sum(jnp.where(mask, entropy.reshape(shape), 0.0))
            return loss, metrics | {"train/entropy": jax.lax.stop_gradient(entropy_sum / count)}

        micro_batches = split_micro_batches(
            (
                jax.tree.map(grouped, rows),
                images,
                rewards,
                grouped(behavior),
                grouped(reference),
            ),
            step.micro_batches,
        )
        gradients, metrics = accumulate_gradients(
            loss_of, cast_weights(trained, step.dtype), micro_batches
        )
        state, norm = apply_gradients(state, gradients, optimizer, step.trainable)
        return state, metrics | {"train/grad_norm": norm}

    return jax.jit(update, donate_argnums=0)


def _repeated_visual(params, config, rows: Batch, images, step: StepSettings) -> jax.Array:
    """Visual tokens of Q prompts, encoded once, repeated for their R rows: [Q * R, M, D]."""
    visual = vlm.encode_images(
        params,
        config,
        images["patches"],
        images["patch_hw"],
        images["patch_segment"],
        dtype=step.dtype,
        remat=step.remat,
    )
    return jnp.repeat(visual, rows.tokens.shape[0] // visual.shape[0], axis=0)


def _images_of(batch: Batch) -> dict[str, np.ndarray]:
    return {
        "patches": np.asarray(batch.patches),
        "patch_hw": np.asarray(batch.patch_hw),
        "patch_segment": np.asarray(batch.patch_segment),
    }


def _sampler(config, processor, settings: RLSettings, completions: int, dtype: str):
    sampler = SamplerSettings(
        completions=completions,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        dtype=dtype,
    )
    return make_sampler(config, sampler, len(processor.tokenizer))


def _logprob_metrics(rows: Batch, behavior, sampled, lengths, free: int) -> dict[str, float]:
    """How far the recomputed log-probabilities are from those of sampling.

    For free completions the two are the same distribution, so the difference is numerical; for
    aware ones it is what the policy-free prompt does not know yet.
    """
    num_prompts, rollouts, steps = sampled.shape
    count = np.asarray(lengths)
    mask = np.arange(steps)[None, None] < count[..., None]
    again = np.zeros_like(sampled)
    for q in range(num_prompts):
        for i in range(rollouts):
            at = q * rollouts + i
            chosen = behavior[at][rows.loss_mask[at, 1:]]
            again[q, i, : len(chosen)] = chosen
    difference = np.where(mask, again - sampled, 0.0)
    metrics = {"rollouts/logprob_gap_max": float(np.abs(difference[:, :free]).max())}
    if free < rollouts:
        tokens = max(int(mask[:, free:].sum()), 1)
        metrics["rollouts/aware_log_ratio_mean"] = float(difference[:, free:].sum() / tokens)
    return metrics


def _as_records(examples, texts, grades, free: int) -> list[dict[str, Any]]:
    return [
        {
            "example_id": example.example_id,
            "answer": example.answer,
            "view": "policy_free" if i < free else "policy_aware",
            "completion": text,
            "accuracy": grade.accuracy,
            "format": grade.reason,
        }
        for example, row, row_grades in zip(examples, texts, grades, strict=True)
        for i, (text, grade) in enumerate(zip(row, row_grades, strict=True))
    ]


class _Clock:
    """Seconds of the parts of a step."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}_s"] = now - self._last
        self._last = now
