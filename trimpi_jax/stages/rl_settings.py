"""The sizes of an RL step, and which of them make no sense together.

Source: paper section 4.
Next: trimpi_jax/stages/rl.py
"""

from __future__ import annotations

import dataclasses

from trimpi_jax.objectives.grpo import ObjectiveSettings


@dataclasses.dataclass(frozen=True)
class RLSettings:
    """Sizes of a step. `group_size` is G: a prompt's joint group has 2G rollouts."""

    group_size: int
    prompts: int  # Q, groups of a step
    update_prompts: int  # groups of an optimizer update
    sample_prompts: int  # prompts that are sampled at a time: what the KV cache has room for
    policy_rollout: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    completion_buckets: tuple[int, ...]
    seed: int
    top_k: int = 0
    compact_every: int = 0
    policy_chunk: int = 1  # prompts that may share one copy of a policy while decoding
    max_attempts: int = 1  # batches of prompts a step may draw; 1 = no dynamic sampling
    max_rollouts: int = 0  # the stage ends when so many have been sampled; 0 = no limit
    stop_after_dry_steps: int = 0  # steps in a row that ran out of attempts; 0 = never stop
    overlong_tokens: int = 0  # width of the soft overlong ramp; 0 = no penalty
    max_failed_grades: float = 0.05  # share of completions whose grading may fail
    needs_think: bool = True

    def __post_init__(self):
        problems = []
        if self.prompts % self.update_prompts:
            problems.append(
                f"rl.prompts {self.prompts} is not a multiple of rl.update_prompts"
                f" {self.update_prompts}: an update takes whole groups"
            )
        if not 1 <= self.sample_prompts <= self.prompts:
            problems.append(
                f"rl.sample_prompts {self.sample_prompts} is not between 1 and rl.prompts"
                f" {self.prompts}"
            )
        if self.group_size < 1 or (self.group_size == 1 and not self.policy_rollout):
            # a joint group of 2 is the smallest that has a spread
            problems.append("rl.group_size must be >= 1 with policy rollouts, >= 2 without")
        if self.temperature <= 0:
            problems.append("rl.temperature must be > 0: equal rollouts teach nothing")
        if max(self.completion_buckets) != self.max_new_tokens:
            problems.append(
                f"the largest of rl.completion_buckets {self.completion_buckets} must be"
                f" max_new_tokens {self.max_new_tokens}"
            )
        if self.max_attempts < 1 or self.stop_after_dry_steps < 0:
            problems.append("rl.max_attempts >= 1 and rl.stop_after_dry_steps >= 0")
        if self.max_attempts == 1 and self.stop_after_dry_steps:
            problems.append(
                "rl.stop_after_dry_steps has no effect without dynamic sampling (rl.max_attempts 1)"
            )
        if not 0 <= self.overlong_tokens < self.max_new_tokens:
            problems.append("0 <= rl.overlong_tokens < max_new_tokens")
        if not 0 <= self.max_failed_grades <= 1:
            problems.append("rl.max_failed_grades is a share")
        if self.max_rollouts < 0 or self.max_rollouts % max(2 * self.group_size, 1):
            problems.append(
                f"rl.max_rollouts {self.max_rollouts} is not a multiple of a group's"
                f" {2 * self.group_size} rollouts"
            )
        if self.policy_chunk < 1:
            problems.append("rl.policy_chunk must be >= 1")
        if self.policy_chunk > 1 and not self.policy_rollout:
            problems.append("rl.policy_chunk has no effect without policy rollouts")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def free_rollouts(self) -> int:
        """Policy-free rollouts of a joint group."""
        return self.group_size * (1 if self.policy_rollout else 2)

    @property
    def rollouts(self) -> int:
        """R, all of a joint group."""
        return 2 * self.group_size

    @property
    def is_dynamic(self) -> bool:
        """Whether groups without spread are dropped and asked again."""
        return self.max_attempts > 1


def completion_buckets(max_new_tokens: int) -> tuple[int, ...]:
    """Lengths that completions are padded to in scores and updates: long ones also in halves."""
    if max_new_tokens < 512:  # one program; the padding of short completions costs less
        return (max_new_tokens,)
    return (max_new_tokens // 4, max_new_tokens // 2, max_new_tokens)


def check_objective(objective: ObjectiveSettings, settings: RLSettings) -> None:
    """Raise where an option of the objective would mean something else than it says."""
    plain = settings.temperature == 1 and settings.top_p == 1 and settings.top_k == 0
    if objective.importance_cap and not plain:
        raise ValueError(
            "rl.importance_cap compares the sampler with the training graph: it needs temperature"
            " 1, top_p 1 and top_k 0, since a cut distribution has no such ratio"
        )
