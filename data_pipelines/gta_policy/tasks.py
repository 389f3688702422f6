"""A task is a request with images and a chain of tool calls; an Example is one step of it.

    Task      request, images, steps: call -> return -> call -> return -> ... -> answer
    Example   images, profile, request, the calls so far and what they returned -> the next call

The tool chain knows no versions: they come in here, from the profile and a rule book, for the gold
call and for the calls of the history alike. So one task gives the right Examples under any policy.

Source: paper section 3 (single-step instances with profile and history).
Next: data_pipelines/gta_policy/synthetic.py
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.example import Example
from data_pipelines.gta_policy.catalogue import (
    ACCOUNT_TYPES,
    K_CLOSED,
    K_OPEN,
    PAPER_RULES,
    POLICY_NAME,
    Condition,
    Profile,
    RuleBook,
    call_json,
    general_rules,
)

FORMAT_INSTRUCTION = (
    "Think inside <think></think> and put the JSON tool call inside \\boxed{}."  # paper section 4
)
BOUNDARY_SHARE = 0.15  # ours: of ages and credits that lie on or beside a threshold
BOUNDARY_AGES = (20, 21, 59, 60)
BOUNDARY_CREDITS = (249, 250, 251, 499, 500, 501, 749, 750, 751)
AGE_GROUPS = ((13, 21), (21, 60), (60, 86))  # ours: drawn equally often, so every rule is met
MAX_CREDITS = 1000  # ours
PROFILE_DRAWS = 8  # ours


@dataclasses.dataclass(frozen=True)
class NamedImage:
    """An encoded image and the name that calls use for it, such as `image/image_1.jpg`."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the chain. `tool` has no version; GoogleSearch's k is already the rule's."""

    tool: str
    arguments: dict[str, Any]
    thought: str  # why this call comes now; ends with a full stop
    returned: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A request, its images, and how it is solved."""

    task_id: str
    family: str  # "official", or the synthetic family
    images: tuple[NamedImage, ...]
    request: str
    steps: tuple[Step, ...]
    answer: str  # the last word to the user; no Example asks for it
    open_ended: bool = False


def sample_profile(rng: np.random.Generator) -> Profile:
    """A user; every rule is met often, and thresholds are hit exactly now and then."""
    age = int(rng.integers(*AGE_GROUPS[rng.integers(len(AGE_GROUPS))]))
    credits = int(rng.integers(0, MAX_CREDITS + 1))
    if rng.random() < BOUNDARY_SHARE:
        age = int(rng.choice(BOUNDARY_AGES))
    if rng.random() < BOUNDARY_SHARE:
        credits = int(rng.choice(BOUNDARY_CREDITS))
    return Profile(age, credits, ACCOUNT_TYPES[rng.integers(len(ACCOUNT_TYPES))])


def assign_profiles(tasks: Sequence[Task], rng: np.random.Generator) -> list[Profile]:
    """A user for each task, drawn so that the version rules are met about equally often.

    Of PROFILE_DRAWS users the one is taken whose rules, over the task's calls, were met least.
    """
    met = collections.Counter[int]()
    profiles = []
    for task in tasks:

        def rules(profile: Profile, task: Task = task) -> list[int]:
            found = [PAPER_RULES.rule_of(step.tool, profile) for step in task.steps]
            return [rule.number for rule in found if rule]

        drawn = [sample_profile(rng) for _ in range(PROFILE_DRAWS)]
        profile = min(drawn, key=lambda one: sum(met[number] for number in rules(one)))
        met.update(rules(profile))
        profiles.append(profile)
    return profiles


def split_tasks(
    step_counts: Sequence[int], test_steps: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """(train, test) task numbers with exactly `test_steps` steps in test, no task in both.

    Raises:
        ValueError: no set of tasks has that many steps.
    """
    order = [int(i) for i in rng.permutation(len(step_counts))]
    reached: dict[int, int | None] = {0: None}  # steps in test -> the task that was added last
    for i in order:
        for total in sorted(reached, reverse=True):
            if (more := total + step_counts[i]) <= test_steps and more not in reached:
                reached[more] = i
        if test_steps in reached:
            break
    if test_steps not in reached:
        raise ValueError(
            f"no set of these {len(step_counts)} tasks has {test_steps} steps; the nearest is"
            f" {max(reached)} of {sum(step_counts)}"
        )
    test: set[int] = set()
    total = test_steps
    while total:
        added = reached[total]
        assert added is not None
        test.add(added)
        total -= step_counts[added]
    return [i for i in order if i not in test], [i for i in order if i in test]


def make_examples(
    task: Task,
    profile: Profile,
    book: RuleBook,
    *,
    policy: str,
    answer_form: dict[str, Any],
    source: str,
    with_cot: bool,
) -> Iterator[Example]:
    """The steps of a task as Examples.

    Args:
        task: the task.
        profile: who asks.
        book: the version rules that the gold call follows.
        policy: the policy document of that book.
        answer_form: see `catalogue.answer_form`.
        source: "official" or "synthetic".
        with_cot: whether the Examples carry their chain of thought.
    """
    for number, step in enumerate(task.steps):
        gold_cot = chain_of_thought(task, number, profile, book)
        rule = book.rule_of(step.tool, profile)
        facts: dict[str, Any] = {}
        if book != PAPER_RULES:  # no model was trained on this policy, so it must be in the prompt
            trained = call_json(PAPER_RULES.versioned_name(step.tool, profile), step.arguments)
            facts = {"policy_in_prompt": True, "trained_answer": trained}
        yield Example(
            example_id=f"{task.task_id}/step{number + 1}",
            images=tuple(image.data for image in task.images),
            query=query(task, number, profile, book),
            answer=call_json(book.versioned_name(step.tool, profile), step.arguments),
            cot=gold_cot if with_cot else "",
            policy_name=POLICY_NAME,
            policy_text=policy,
            meta={
                "task": "gta_policy",
                "source": source,
                "family": task.family,
                "scene_id": task.task_id,
                "step": number + 1,
                "steps": len(task.steps),
                "profile": dataclasses.asdict(profile),
                "tool": step.tool,
                "rule": rule.number if rule else 0,
                "final_answer": task.answer,
                "gold_cot": gold_cot,
                "answer_form": answer_form,
                **facts,
            },
        )


def query(task: Task, number: int, profile: Profile, book: RuleBook) -> str:
    """What the user's side says before step `number`; it names the policy, never repeats it."""
    names = ", ".join(image.name for image in task.images)
    lines = [
        f"Images: {names}",
        f"User profile: age {profile.age}, credits {profile.credits},"
        f" account_type {profile.account_type}",
        f"Request: {task.request}",
    ]
    if number == 0:
        lines.append("Interaction history: none")
    else:
        lines.append("Interaction history:")
    for i, step in enumerate(task.steps[:number], start=1):
        call = call_json(book.versioned_name(step.tool, profile), step.arguments)
        lines += [f"{i}. Call: {call}", f"   Return: {step.returned}"]
    lines.append(
        f"According to the policy {POLICY_NAME}, what is the next tool call?"
        f' Answer with {{"name": ..., "arguments": {{...}}}}. {FORMAT_INSTRUCTION}'
    )
    return "\n".join(lines)


def chain_of_thought(task: Task, number: int, profile: Profile, book: RuleBook) -> str:
    """Profile, what is known, why this tool, the rules that apply, the version that follows."""
    step = task.steps[number]
    called = [book.versioned_name(done.tool, profile) for done in task.steps[:number]]
    lines = [
        f"The user is {profile.age} years old, has {profile.credits} credits and account type"
        f" {profile.account_type}.",
        f"Called so far: {', '.join(called)}." if called else "Nothing has been called yet.",
        step.thought,
        *_general_rule_lines(task, number, book),
    ]
    rule = book.rule_of(step.tool, profile)
    if rule is None:
        lines.append(f"{step.tool} has one version.")
    else:
        why = "; ".join(explain(condition, profile) for condition in rule.when)
        lines.append(f"Rule {rule.number}: {rule}. {why[0].upper()}{why[1:]}.")
    lines.append(f"So I call {book.versioned_name(step.tool, profile)}.")
    return "\n".join(lines)


def explain(condition: Condition, profile: Profile) -> str:
    """Why a condition holds: `credits 620 is above 250 and at most 750`."""
    value = getattr(profile, condition.field)
    if condition.among:
        return f"{condition.field} {value} is one of {', '.join(condition.among)}"
    bounds = (
        (condition.above, "above"),
        (condition.at_least, "at least"),
        (condition.below, "below"),
        (condition.up_to, "at most"),
    )
    said = " and ".join(f"{word} {bound}" for bound, word in bounds if bound is not None)
    return f"{condition.field} {value} is {said}"


def _general_rule_lines(task: Task, number: int, book: RuleBook) -> Iterator[str]:
    """The rules for all users that decide this step, each as `Rule 27: ... So k=1.`"""
    rules = general_rules(book)
    step = task.steps[number]
    if step.tool == "ImageDescription" and len(task.images) > 1:
        yield _cite(rules["describe"]) + f" {step.arguments['image']} has not been described."
    if step.tool == "MathOCR":
        yield _cite(rules["math"])
    if step.tool == "GoogleSearch":
        ended = "is open-ended" if task.open_ended else "is not open-ended"
        k = K_OPEN if task.open_ended else K_CLOSED
        yield _cite(rules["k"]) + f" This question {ended}, so k={k}."
    region_next = any(s.tool == "RegionAttributeDescription" for s in task.steps[number + 1 :])
    if step.tool == "RegionAttributeDescription" or (step.tool == "TextToBbox" and region_next):
        yield _cite(rules["bbox"])


def _cite(rule: tuple[int, str]) -> str:
    return f"Rule {rule[0]}: {rule[1]}"
