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
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from data_pipelines.example import Example
from trimpi_jax.grading.answers import RewardWeights
from trimpi_jax.grading.rewards import Failure, check_failures, reward_completions
from trimpi_jax.io.agreement import gather, largest
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
    deal_groups,
    decode_groups,
    encode_groups,
    make_group_batch,
)
from trimpi_jax.rollouts.sampler import allowed_tokens
from trimpi_jax.sharding import fetch_rows, place_batch, row_share
from trimpi_jax.stages.policy_update import Distribution, make_scorer, make_update
from trimpi_jax.stages.rl_metrics import (
    Drawn,
    Outcome,
    Place,
    as_records,
    outcomes_of,
    rollout_metrics,
)
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
        self.sampled = 0  # rollouts since the stage began, of all processes
        self.last_drawn: list[Drawn] = []
        self.last_failures: list[Failure] = []  # of all processes

    def __call__(
        self, state: TrainState, number: int, examples: Sequence[Example]
    ) -> tuple[TrainState, dict[str, Any]]:
        clock = _Clock()
        self.last_failures = []
        self.loaded = self.engine.load(state.params)
        found, drawn, attempts = self._collect_groups(number, examples, clock)
        used, surplus = found.split(self.settings.prompts)
        self.last_drawn = drawn
        metrics = self._metrics(drawn, attempts, len(used.owners), clock)
        metrics["rollouts/sampled_total"] = self.sampled
        self.kept = self._with_behavior(surplus)
        # about to be donated; what was computed from them leaves its room to the update
        self.loaded = None
        if used.owners:
            state, training = self._updates(state, used, clock)
            metrics |= training
        return state, metrics | clock.laps | {"time/step_s": sum(clock.laps.values())}

    @property
    def last_rollouts(self) -> list[dict[str, Any]]:
        """What the last step sampled on this process, for a look at the text."""
        free = self.settings.free_rollouts
        return [record for part in self.last_drawn for record in as_records(part, free)]

    def gather_rollouts(self) -> list[dict[str, Any]]:
        """`last_rollouts` of all processes, in the order of the prompts; all must call it."""
        free, share = self.settings.free_rollouts, row_share(self.engine.mesh)
        own = [[part.places, as_records(part, free)] for part in self.last_drawn]
        told = [
            (place, records[i * self.settings.rollouts : (i + 1) * self.settings.rollouts])
            for parts in share.of_leaders(gather(own, "texts"))
            for places, records in parts
            for i, place in enumerate(places)
        ]
        return [one for _, records in sorted(told, key=lambda t: tuple(t[0])) for one in records]

    def _metrics(
        self, drawn: Sequence[Drawn], attempts: int, used: int, clock: _Clock
    ) -> dict[str, Any]:
        """Of what all processes have sampled; only numbers and reasons travel."""
        own = [one for part in drawn for one in outcomes_of(part)]
        dropped = sum(len(part.dropped) for part in drawn)
        told = row_share(self.engine.mesh).of_leaders(gather([own, dropped], "outcomes"))
        outcomes = [Outcome(*one) for part, _ in told for one in part]
        return rollout_metrics(
            sorted(outcomes, key=lambda one: tuple(one.place)),
            len(self.last_failures),
            sum(count for _, count in told),
            self.settings,
            attempts,
            used,
            clock.laps,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the stage should end early: too many dry steps in a row, or no rollouts left."""
        limit = self.settings.stop_after_dry_steps
        return (bool(limit) and self.dry_steps >= limit) or self._prompts_left() == 0

    def _prompts_left(self) -> int | None:
        """Prompts that may still be sampled; None = as many as are wanted."""
        limit = self.settings.max_rollouts
        return max(limit - self.sampled, 0) // self.settings.rollouts if limit else None

    def save_place(self) -> dict[str, Any]:
        """What a resumed run needs beside the state and the stream, JSON-able.

        The groups of all processes: another number of them can go on.
        """
        own = [[group.order, encode_groups([group])[0]] for group in self.kept]
        told = row_share(self.engine.mesh).of_leaders(gather(own, "kept groups"))
        texts = [text for _, text in sorted(one for part in told for one in part)]
        return {"groups": texts, "dry_steps": self.dry_steps, "sampled": self.sampled}

    def restore_place(self, saved: dict[str, Any]) -> None:
        """Inverse of `save_place`."""
        share = row_share(self.engine.mesh)
        self.kept = [
            dataclasses.replace(group, order=order)
            for order, group in enumerate(decode_groups(saved["groups"]))
            if order % share.count == share.number
        ]
        self.dry_steps, self.sampled = saved["dry_steps"], saved["sampled"]

    def _collect_groups(
        self, number: int, examples: Sequence[Example], clock: _Clock
    ) -> tuple[_Found, list[Drawn], int]:
        """(groups to train on and surplus, everything drawn here, attempts made)."""
        share, dynamic = row_share(self.engine.mesh), self.settings.is_dynamic
        own = [[group.order, group.example.example_id] for group in self.kept]
        told = share.of_leaders(gather(own, "kept groups"))
        waited = sorted((order, i) for i, part in enumerate(told) for order, _ in part)
        found = _Found(list(self.kept), [i for _, i in waited], share.number, len(waited))
        seen = {name for part in told for _, name in part}
        drawn: list[Drawn] = []
        for attempt in range(self.settings.max_attempts):
            if self._prompts_left() == 0:
                return found, drawn, attempt
            if attempt:
                assert self.fetch_more is not None
                examples = self.fetch_more()
            fresh = [
                ((attempt, i, share.number), example)
                for i, example in enumerate(examples)
                # a prompt has the same samples wherever it comes up in a step
                if not (dynamic and example.example_id in seen)
            ]
            told = share.of_leaders(
                gather([[place, one.example_id] for place, one in fresh], "prompts")
            )
            allowed = sorted((tuple(place), name) for part in told for place, name in part)
            allowed = dict(allowed[: self._prompts_left()])
            seen.update(allowed.values())
            self.sampled += len(allowed) * self.settings.rollouts
            fresh = [(place, example) for place, example in fresh if place in allowed]
            most = max(collections.Counter(number for *_, number in allowed).values(), default=0)
            size = share.part(self.settings.sample_prompts)
            good: list[tuple[Place, Group]] = []
            for start in range(0, most, size):
                drawn.append(self._draw(number, fresh[start : start + size], clock))
                good += [
                    (place, group)
                    for place, group in zip(drawn[-1].places, drawn[-1].groups, strict=True)
                    if group.has_spread or not dynamic
                ]
            told = share.of_leaders(gather([place for place, _ in good], "groups with a spread"))
            places = sorted((tuple(place), i) for i, part in enumerate(told) for place in part)
            found.groups.extend(group for _, group in good)
            found.owners.extend(i for _, i in places)
            if len(found.owners) >= self.settings.prompts or not dynamic:
                self.dry_steps = 0
                return found, drawn, attempt + 1
        self.dry_steps += 1
        self.say(
            f"rl step {number}: {len(found.owners)} of {self.settings.prompts} groups have a spread"
            f" of rewards after {self.settings.max_attempts} attempts; training on these"
            f" ({self.dry_steps} such steps in a row)"
        )
        return found, drawn, self.settings.max_attempts

    def _draw(self, number: int, asking: Sequence[tuple[Place, Example]], clock: _Clock) -> Drawn:
        """Sample and grade this process's part of one batch of prompts."""
        settings, engine = self.settings, self.engine
        assert self.loaded is not None
        key = jax.random.fold_in(jax.random.key(settings.seed), SAMPLING)
        key = jax.random.fold_in(key, number)
        examples = [example for _, example in asking]
        questions = encode_questions(engine, examples, aware=settings.policy_rollout)
        if not any(gather(len(questions.examples), "prompts that fit")):
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
            part = fetch(engine, view, rollouts)
            clock.lap("decode")
            said, rewarded, failed = self._grade(questions.examples, part)
            clock.lap("grade")
            parts.append(part)
            texts.append(said)
            grades.append([[grade for grade, _ in row] for row in rewarded])
            rewards.append([[value for _, value in row] for row in rewarded])
            failures += failed
        told = gather([len(questions.examples), failures], "failed grades")
        told = row_share(engine.mesh).of_leaders(told)
        failures = [Failure(*one) for _, part in told for one in part]
        self.last_failures += failures
        count = sum(count for count, _ in told) * settings.rollouts
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
        place_of = {id(example): place for place, example in asking}
        places = [place_of[id(example)] for example in questions.examples]
        return Drawn(places, groups, joined, said, questions.dropped)

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

    def _with_behavior(self, surplus: _Found) -> list[Group]:
        """Groups with the log-probs of the actor that sampled them, before that actor changes."""
        assert self.loaded is not None
        mesh = self.engine.mesh
        size, aged = row_share(mesh).part(self.settings.update_prompts), []
        for start in range(0, surplus.most(), size):
            part = surplus.groups[start : start + size]
            batch = self._group_batch(part)
            scored = fetch_rows(self._score(self.loaded.params, batch, None), mesh)
            aged += [
                dataclasses.replace(group, behavior_logprobs=logprobs)
                if group.behavior_logprobs is None
                else group
                for group, logprobs in zip(part, scored, strict=False)
            ]
        return [
            dataclasses.replace(group, order=order)
            for group, order in zip(aged, surplus.own_numbers(), strict=True)
        ]

    def _group_batch(self, groups: Sequence[Group]) -> GroupBatch:
        """This process's part of an update's groups."""
        return make_group_batch(
            groups,
            self.engine.processor,
            self.engine.sizes,
            self.settings.completion_buckets,
            row_share(self.engine.mesh).part(self.settings.update_prompts),
            lambda sizes: largest(sizes, "shape of groups"),
        )

    def _deal(self, used: _Found) -> list[list[Group]]:
        """This process's groups of every update: all have room for equally many.

        Groups that dynamic sampling has left on a process with no room for them move to another.
        """
        share, size = row_share(self.engine.mesh), self.settings.update_prompts
        dealt: list[int] = []
        for start in range(0, len(used.owners), size):
            owners = used.owners[start : start + size]
            dealt += deal_groups(owners, share.count, share.part(size))
        here = dict(zip(used.own_numbers(), used.groups, strict=True))
        if dealt != used.owners:
            moving = [number for number in here if dealt[number] != share.number]
            own = [[n, encode_groups([here[n]])[0]] for n in moving]
            told = share.of_leaders(gather(own, "groups that move"))
            here |= {n: decode_groups([text])[0] for part in told for n, text in part}
        return [
            [
                here[n]
                for n in range(start, min(start + size, len(dealt)))
                if dealt[n] == share.number
            ]
            for start in range(0, len(dealt), size)
        ]

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
        self, state: TrainState, used: _Found, clock: _Clock
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer update per `update_prompts` groups; metrics are their means."""
        parts, size = self._deal(used), self.settings.update_prompts
        batches = [self._group_batch(part) for part in parts]
        visual = [self._frozen_visual(state.params, batch) for batch in batches]
        # the first update after sampling is on-policy: behavior = actor
        on_policy = len(parts) == 1 and not used.old
        behavior: list[Any] = [None] * len(parts)
        reference: list[Any] = [None] * len(parts)
        for i, (part, batch) in enumerate(zip(parts, batches, strict=True)):
            if not on_policy:
                is_old = min((i + 1) * size, len(used.owners)) <= used.old
                behavior[i] = self._behavior(state.params, part, batch, visual[i], is_old)
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
        tokens = sum(int(group.lengths.sum()) for part in parts for group in part)
        tokens += sum(int(b.prompts.lengths[b.prompts.valid].sum()) for b in batches)
        room = sum(
            batch.prompts.tokens.size + batch.completions[:, :, 1:].size for batch in batches
        )
        told = row_share(self.engine.mesh).of_leaders(gather(tokens, "tokens"))
        totals["rollouts/padding_waste"] = 1 - sum(told) / (room * len(told))
        jax.block_until_ready(state.step)
        clock.lap("update")
        return state, dict(totals)

    def _behavior(
        self,
        params: Any,
        groups: Sequence[Group],
        batch: GroupBatch,
        visual: jax.Array | None,
        is_old: bool,
    ) -> jax.Array:
        """Behavior log-probs of a batch: kept ones of older groups, fresh ones of the others."""
        kept = behavior_of(groups, batch.completions.shape)
        if not is_old:
            fresh = fetch_rows(self._score(params, batch, visual), self.engine.mesh)
            for i, group in enumerate(groups):
                if group.behavior_logprobs is None:
                    kept[i] = fresh[i]
        return self._place(kept)


class _Found(NamedTuple):
    """Groups of all processes, of which each has its own: in one order, that of the prompts."""

    groups: list[Group]  # of this process
    owners: list[int]  # of all: the share that has each
    share: int  # of this process
    old: int  # the first ones, which waited since the step before

    def own_numbers(self) -> list[int]:
        """Where this process's groups stand among all."""
        return [number for number, owner in enumerate(self.owners) if owner == self.share]

    def most(self) -> int:
        """The largest number of groups of one process."""
        return max(collections.Counter(self.owners).values(), default=0)

    def split(self, count: int) -> tuple[_Found, _Found]:
        """The first `count` groups, and the rest."""
        first, rest = self.owners[:count], self.owners[count:]
        here = first.count(self.share)
        return (
            self._replace(groups=self.groups[:here], owners=first, old=min(self.old, count)),
            self._replace(groups=self.groups[here:], owners=rest, old=max(self.old - count, 0)),
        )


class _Clock:
    """Seconds of the parts of a step; a part that comes again is added up."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now, name = time.perf_counter(), f"time/{name}_s"
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
