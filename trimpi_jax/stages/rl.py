"""The RL stage: GRPO or DAPO, with or without PolicyRollout.

One step, in the order in which its numbers are born:

    views       every prompt without and with the policy            rollouts/groups.py
    rollouts    G completions of each (2G free ones without PoRo)    rollouts/engine.py
    rewards     text -> [Q, 2G], while the device still samples      grading/rewards.py
    groups      dynamic sampling: drop those of equal rewards, ask   rollouts/sampled.py
                again, keep the surplus for the next step
    log-probs   behavior actor and reference, policy-free prompt     stages/policy_update.py
    updates     joint-group advantage, clipped surrogate, KL         objectives/grpo.py

With one update per step the behavior actor is the actor itself: its log-probabilities are those of
the update, and nothing is scored twice.

Deviations from the paper: 1. the reward weights are 0.9 accuracy + 0.1 format (not stated there).
2. A run without PolicyRollout draws 2G free rollouts, so both cost the same number of rollouts.
3. Log-probabilities are those of the sampler's distribution: visual tokens, which it never draws,
have probability 0.

Source: paper section 4.
Next: trimpi_jax/evaluators/questions.py
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from data_pipelines.example import Example
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.grading.rewards import Failure, check_failures, reward_completions
from trimpi_jax.models.processor import decode_completion
from trimpi_jax.objectives.grpo import ObjectiveSettings, overlong_penalty
from trimpi_jax.rollouts.choosing import SamplerSettings
from trimpi_jax.rollouts.engine import (
    Asked,
    Engine,
    Weights,
    answer,
    encode_questions,
    encode_visual,
    fetch,
    make_aware_view,
    make_free_view,
    read_prompts,
)
from trimpi_jax.rollouts.sampled import (
    Group,
    behavior_of,
    decode_groups,
    encode_groups,
    make_group_batch,
)
from trimpi_jax.rollouts.sampler import allowed_tokens
from trimpi_jax.sharding import place_batch
from trimpi_jax.stages.policy_update import Distribution, make_scorer, make_update
from trimpi_jax.stages.rl_metrics import Drawn, as_records, rollout_metrics
from trimpi_jax.stages.rl_settings import RLSettings, check_objective
from trimpi_jax.stages.supervised import StepSettings
from trimpi_jax.stages.train_state import Flat, TrainState, join_params, split_params
from trimpi_jax.types import GroupBatch

SAMPLING = 1  # folded into the root key: what the randomness is for
FREE, AWARE = 0, 1  # folded in next: the view


class RLStep:
    """The step function of the loop: `step(state, number, examples) -> (state, metrics)`.

    Args:
        engine: samples, grades nothing.
        reference: the trained half of the KL anchor's weights (arrays of its own; the frozen half
            is the actor's), or None when kl_beta is 0.
        optimizer: see `make_optimizer`.
        settings, objective, weights, step: see the dataclasses.
        fetch_more: brings another batch of prompts for dynamic sampling.
        say: told of a step that ran dry.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Flat | None,
        optimizer: optax.GradientTransformation,
        settings: RLSettings,
        objective: ObjectiveSettings,
        weights: RewardWeights,
        step: StepSettings,
        fetch_more: Callable[[], Sequence[Example]] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):
        check_objective(objective, settings)
        if settings.is_dynamic and fetch_more is None:
            raise ValueError("dynamic sampling needs fetch_more")
        self.engine, self.settings, self.weights = engine, settings, weights
        self.objective, self.step, self.reference = objective, step, reference
        self.fetch_more, self.say = fetch_more, say
        sampler = SamplerSettings(
            completions=settings.free_rollouts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            dtype=step.dtype,
            compact_every=settings.compact_every,
        )
        self.samplers = (sampler, dataclasses.replace(sampler, completions=settings.group_size))
        allowed = allowed_tokens(engine.config, len(engine.processor.tokenizer))
        distribution = Distribution(tuple(allowed.tolist()), settings.temperature)
        self.score = make_scorer(engine.config, distribution, step)
        self.update = make_update(
            engine.config, optimizer, objective, distribution, step, settings.free_rollouts
        )
        self.loaded: Weights | None = None
        self.kept: list[Group] = []  # surplus groups of the step before
        self.dry_steps = 0  # in a row
        self.sampled = 0  # rollouts since the stage began
        self.last_rollouts: list[dict[str, Any]] = []  # for a look at the text
        self.last_failures: list[Failure] = []

    def __call__(
        self, state: TrainState, number: int, examples: Sequence[Example]
    ) -> tuple[TrainState, dict[str, Any]]:
        clock = _Clock()
        self.last_failures = []
        self.loaded = self.engine.load(state.params)
        groups, drawn, attempts = self._collect_groups(number, examples, clock)
        used = groups[: self.settings.prompts]
        surplus = groups[self.settings.prompts :]
        self.last_rollouts = [
            record for part in drawn for record in as_records(part, self.settings.free_rollouts)
        ]
        metrics = rollout_metrics(drawn, self.settings, attempts, len(used), clock.laps)
        metrics["rollouts/sampled_total"] = self.sampled
        self.kept = self._with_behavior(surplus)
        # about to be donated; what was computed from them leaves its room to the update
        self.loaded = None
        if used:
            state, training = self._updates(state, used, clock)
            metrics |= training
        return state, metrics | clock.laps | {"time/step_s": sum(clock.laps.values())}

    @property
    def is_finished(self) -> bool:
        """Whether the stage should end early: too many dry steps in a row, or no rollouts left."""
        limit = self.settings.stop_after_dry_steps
        return (bool(limit) and self.dry_steps >= limit) or self._prompts_left() == 0

    def _prompts_left(self) -> int | None:
        """Prompts that may still be sampled; None = as many as are wanted."""
        limit = self.settings.max_rollouts
        return max(limit - self.sampled, 0) // (2 * self.settings.group_size) if limit else None

    def save_place(self) -> dict[str, Any]:
        """What a resumed run needs beside the state and the stream, JSON-able."""
        return {
            "groups": encode_groups(self.kept),
            "dry_steps": self.dry_steps,
            "sampled": self.sampled,
        }

    def restore_place(self, saved: dict[str, Any]) -> None:
        """Inverse of `save_place`."""
        self.kept, self.dry_steps = decode_groups(saved["groups"]), saved["dry_steps"]
        self.sampled = saved["sampled"]

    def _collect_groups(
        self, number: int, examples: Sequence[Example], clock: _Clock
    ) -> tuple[list[Group], list[Drawn], int]:
        """(groups to train on and surplus, everything drawn, attempts made)."""
        groups, drawn, seen = list(self.kept), [], {group.example.example_id for group in self.kept}
        for attempt in range(self.settings.max_attempts):
            if self._prompts_left() == 0:
                return groups, drawn, attempt
            if attempt:
                assert self.fetch_more is not None
                examples = self.fetch_more()
            # a prompt has the same samples wherever it comes up in a step
            fresh = [example for example in examples if example.example_id not in seen]
            if self.settings.is_dynamic:
                seen |= {example.example_id for example in fresh}
            else:
                fresh = list(examples)
            fresh = fresh[: self._prompts_left()]
            self.sampled += len(fresh) * 2 * self.settings.group_size
            size = self.settings.sample_prompts
            for start in range(0, len(fresh), size):
                drawn.append(self._draw(number, fresh[start : start + size], clock))
                groups += [
                    group
                    for group in drawn[-1].groups
                    if group.has_spread or not self.settings.is_dynamic
                ]
            if len(groups) >= self.settings.prompts or not self.settings.is_dynamic:
                self.dry_steps = 0
                return groups, drawn, attempt + 1
        self.dry_steps += 1
        self.say(
            f"rl step {number}: {len(groups)} of {self.settings.prompts} groups have a spread of"
            f" rewards after {self.settings.max_attempts} attempts; training on these"
            f" ({self.dry_steps} such steps in a row)"
        )
        return groups, drawn, self.settings.max_attempts

    def _draw(self, number: int, examples: Sequence[Example], clock: _Clock) -> Drawn:
        """Sample and grade one batch of prompts."""
        settings, engine = self.settings, self.engine
        assert self.loaded is not None
        key = jax.random.fold_in(jax.random.key(settings.seed), SAMPLING)
        key = jax.random.fold_in(key, number)
        questions = encode_questions(engine, examples, aware=settings.policy_rollout)
        if not questions.examples:
            raise ValueError(
                f"none of the prompts {questions.dropped[:4]} ... fits"
                f" {max(engine.sizes.token_buckets)} tokens and {max(engine.sizes.window_buckets)}"
                " windows;"
                " add a larger bucket to --config.prompt_buckets"
            )
        free = make_free_view(engine, questions, settings.sample_prompts)
        views = [free]
        if settings.policy_rollout:
            views.append(
                make_aware_view(engine, questions, settings.sample_prompts, settings.policy_chunk)
            )
        visual = encode_visual(engine, self.loaded, free)
        asked: list[Asked] = []
        for purpose, view in enumerate(views):
            asked.append(
                read_prompts(
                    engine,
                    self.loaded,
                    view,
                    visual if view is free or view.policies else None,
                    self.samplers[purpose],
                    jax.random.fold_in(key, (FREE, AWARE)[purpose]),
                    questions.examples,
                )
            )
        jax.block_until_ready([one.last for one in asked])
        clock.lap("prefill")
        # both views are on their way before the first is looked at: grading overlaps sampling
        answers = [answer(self.loaded, one) for one in asked]
        parts, texts, grades, rewards, failures = [], [], [], [], []
        for view, rollouts in zip(views, answers, strict=True):
            part = fetch(view, rollouts)
            clock.lap("decode")
            said, rewarded, failed = self._grade(questions.examples, part)
            clock.lap("grade")
            parts.append(part)
            texts.append(said)
            grades.append([[grade for grade, _ in row] for row in rewarded])
            rewards.append([[value for _, value in row] for row in rewarded])
            failures += failed
        count = len(questions.examples) * settings.group_size * 2
        self.last_failures += failures
        check_failures(failures, count, settings.max_failed_grades)
        tokens, lengths, stopped, sampled = (
            np.concatenate([getattr(part, name) for part in parts], axis=1)
            for name in ("tokens", "lengths", "stopped", "logprobs")
        )
        total = np.concatenate([np.asarray(part, np.float32) for part in rewards], axis=1)
        groups = [
            Group(example, tokens[q], lengths[q], stopped[q], sampled[q], total[q])
            for q, example in enumerate(questions.examples)
        ]
        joined = [[*a, *b] for a, b in zip(grades[0], grades[-1], strict=True)]
        said = [[*a, *b] for a, b in zip(texts[0], texts[-1], strict=True)]
        if len(views) == 1:
            joined, said = grades[0], texts[0]
        return Drawn(groups, joined, said, failures, questions.dropped)

    def _grade(self, examples: Sequence[Example], part) -> tuple[list, list, list[Failure]]:
        """(texts [Q][G], (grade, reward) [Q][G], failures) of one view."""
        count = part.lengths.shape[1]
        texts = [
            [
                decode_completion(self.engine.processor, part.tokens[q, g, : part.lengths[q, g]])
                for g in range(count)
            ]
            for q in range(len(examples))
        ]
        found = reward_completions(
            [text for row in texts for text in row],
            [example for example in examples for _ in range(count)],
            part.stopped.reshape(-1).tolist(),
            self.weights,
            needs_think=self.settings.needs_think,
        )
        lengths = part.lengths + ~part.stopped  # cut off = one token too long
        penalty = np.asarray(
            overlong_penalty(lengths, self.settings.max_new_tokens, self.settings.overlong_tokens)
        ).reshape(-1)
        pairs = [
            (grade, value + float(extra))
            for grade, value, extra in zip(found.grades, found.rewards, penalty, strict=True)
        ]
        rows = [pairs[q * count : (q + 1) * count] for q in range(len(examples))]
        return texts, rows, found.failures

    def _with_behavior(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with the log-probs of the actor that sampled them, before that actor changes."""
        assert self.loaded is not None
        size, aged = self.settings.update_prompts, []
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            batch = self._group_batch(part)
            scored = jax.device_get(self._score(self.loaded.params, batch, None))
            aged += [
                dataclasses.replace(group, behavior_logprobs=logprobs)
                if group.behavior_logprobs is None
                else group
                for group, logprobs in zip(part, scored, strict=False)
            ]
        return aged

    def _group_batch(self, groups: Sequence[Group]) -> GroupBatch:
        return make_group_batch(
            groups,
            self.engine.processor,
            self.engine.sizes,
            self.settings.completion_buckets,
            self.settings.update_prompts,
        )

    def _score(self, params: Any, batch: GroupBatch, visual: jax.Array | None) -> jax.Array:
        prompts, completions = self._place((batch.prompts, batch.completions))
        return self.score(params, prompts, visual, completions)

    def _frozen_visual(self, params: Any, batch: GroupBatch) -> jax.Array | None:
        """Visual tokens for scores and update where the tower is frozen: encoded once for all."""
        if self.step.trainable == "all":
            return None
        return self.engine.encode(params, self._place(batch.prompts))

    def _place(self, batch: Any) -> Any:
        return place_batch(batch, self.engine.mesh)

    def _updates(
        self, state: TrainState, groups: Sequence[Group], clock: _Clock
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer update per `update_prompts` groups; metrics are their means."""
        size = self.settings.update_prompts
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        batches = [self._group_batch(part) for part in parts]
        visual = [self._frozen_visual(state.params, batch) for batch in batches]
        # the first update after sampling is on-policy: behavior = actor
        on_policy = len(parts) == 1 and all(g.behavior_logprobs is None for g in groups)
        behavior: list[Any] = [None] * len(parts)
        reference: list[Any] = [None] * len(parts)
        for i, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            if not on_policy:
                behavior[i] = self._behavior(state.params, part, batch, visual[i])
            if self.reference is not None:
                _, frozen = split_params(state.params, self.step.trainable)
                anchor = join_params(self.reference, frozen)
                reference[i] = self._score(anchor, batch, visual[i])
        jax.block_until_ready((behavior, reference))
        clock.lap("score")
        totals: dict[str, Any] = collections.defaultdict(float)
        for i, batch in enumerate(batches):
            state, metrics = self.update(
                state, self._place(batch), visual[i], behavior[i], reference[i]
            )
            for name, value in metrics.items():
                totals[name] += value / len(batches)
        used = sum(int(group.lengths.sum()) for group in groups)
        room = sum(
            batch.prompts.tokens.size + batch.completions[:, :, 1:].size for batch in batches
        )
        prompt_tokens = sum(int(b.prompts.lengths[b.prompts.valid].sum()) for b in batches)
        totals["rollouts/padding_waste"] = 1 - (used + prompt_tokens) / room
        jax.block_until_ready(state.step)
        clock.lap("update")
        return state, dict(totals)

    def _behavior(
        self, params: Any, groups: Sequence[Group], batch: GroupBatch, visual: jax.Array | None
    ) -> jax.Array:
        """Behavior log-probs of a batch: kept ones of older groups, fresh ones of the others."""
        kept = behavior_of(groups, batch.completions.shape[-1], len(batch.rewards))
        if any(group.behavior_logprobs is None for group in groups):
            fresh = jax.device_get(self._score(params, batch, visual))
            for i, group in enumerate(groups):
                if group.behavior_logprobs is None:
                    kept[i] = fresh[i]
        return self._place(kept)


class _Clock:
    """Seconds of the parts of a step; a part that comes again is added up."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now, name = time.perf_counter(), f"time/{name}_s"
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
