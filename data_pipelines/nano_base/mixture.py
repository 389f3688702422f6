"""The tasks that teach the nano base to see, to reason and to read policies.

    caption    "I see: red small metal cube, blue large rubber sphere."       dense perception
    existence  four yes/no questions of one to three attributes at once      perception, logic
    text       sums, comparisons, words to repeat or to sort; no image       general ability
    policy     a random policy in the prompt, -T or -M, and several questions about it, each with
               its own image and chain of thought
    recite     "What is Condition 1.2?", "... after False?" behind a policy: what it says. No
               image. To look a section up is half of every step of a chain of thought, and here
               nothing else stands in the way of learning it
    filter     objects in words, one to six Conditions: which objects match. No image, no policy:
               the other half

A policy's name is fresh or, half of the time, one of a few that come again and again with other
trees: what a name meant before never helps, so the model learns to do what the prompt says (Policy
Override). Names and trees are of the half that no evaluated dataset may use (`is_held_out_name`,
`is_held_out_tree`), so an evaluated policy never occurs here. A step's examples depend only on
(seed, step), so a resumed run sees what an unbroken one would have seen.

Source: paper section 2 for the policy questions; the other tasks are ours.
Next: data_pipelines/nano_base/text_questions.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.clevr.scene import ATTRIBUTES, SceneObject
from data_pipelines.clevr_policy import wording
from data_pipelines.clevr_policy.crops import choose_shown
from data_pipelines.clevr_policy.tree import (
    Case,
    Condition,
    PolicyTree,
    follow,
    is_held_out_tree,
    iter_conditions,
    sample_name,
    sample_tree,
)
from data_pipelines.example import Example
from data_pipelines.nano_base.scenes import scene_objects

TASKS = ("caption", "existence", "text", "policy", "recite", "filter")
CAPTION_QUERIES = (
    "Describe the objects in the image.",
    "What do you see?",
    "List the objects.",
)
EXISTENCE_QUESTIONS = 4
MOST_FILTERS = 6  # Conditions one after the other, as deep as the deepest policies
REUSED_NAMES = 32  # a depth; each comes with a new tree every time
REUSED_SHARE = 0.5  # of the policies


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training, until `until` (share of the run)."""

    until: float
    shares: tuple[float, ...]  # of TASKS, in steps; missing ones are 0
    depths: tuple[int, ...] = (2,)  # depths of the policies, drawn uniformly
    shown: float = 0.0  # share of the policies that are -M
    shuffled: float = 0.0  # share of the policies whose sections stand in any order


def task_of_step(step: int, num_steps: int, phases: Sequence[Phase], seed: int) -> str:
    """The task whose examples fill the batch of a step."""
    phase = phase_of_step(step, num_steps, phases)
    rng = np.random.default_rng([seed, 11, step])
    shares = np.zeros(len(TASKS))
    shares[: len(phase.shares)] = phase.shares
    return str(rng.choice(TASKS, p=shares / shares.sum()))


def phase_of_step(step: int, num_steps: int, phases: Sequence[Phase]) -> Phase:
    """The phase that a step belongs to; the last one when its share is past every `until`."""
    return next((p for p in phases if step < p.until * num_steps), phases[-1])


def make_caption(rng: np.random.Generator, scene: Example) -> Example:
    """What is in the image, in naming order."""
    return dataclasses.replace(
        scene,
        query=str(rng.choice(CAPTION_QUERIES)),
        answer=f"I see: {wording.describe_objects(scene_objects(scene))}.",
        meta={"task": "caption"},
    )


def make_existence(rng: np.random.Generator, scene: Example) -> Example:
    """Several existence questions about one image; about three in four answers are True.

    Half ask for an object that is there; in the others one value is drawn anew.
    """
    objects = scene_objects(scene)
    questions, answers = [], []
    for number in range(1, EXISTENCE_QUESTIONS + 1):
        wanted = _sample_description(rng, objects)
        there = any(all(getattr(o, a) == v for a, v in wanted.items()) for o in objects)
        asked = " and ".join(f"{a} {v}" for a, v in wanted.items())
        questions.append(f"{number}. any {asked}?")
        answers.append(f"{number}. {there}")
    return dataclasses.replace(
        scene, query=" ".join(questions), answer=" ".join(answers), meta={"task": "existence"}
    )


@dataclasses.dataclass(frozen=True)
class DrawnPolicy:
    """A policy of the training half, and which of its values are pictures (-M; else none).

    `order`: its decision nodes as they stand below each other, () = in reading order.
    """

    tree: PolicyTree
    shown: tuple[Condition, ...] = ()
    order: tuple[Condition, ...] = ()

    @property
    def shown_sections(self) -> tuple[str, ...]:
        """Their sections, in the order of the policy."""
        return tuple(condition.section for condition in self.shown)

    @property
    def text(self) -> str:
        """The policy document."""
        return wording.policy_text(self.tree, self.shown_sections, self.order)


def draw_policy(
    rng: np.random.Generator,
    depth: int,
    *,
    shown_share: float = 0.0,
    reused_share: float = REUSED_SHARE,
    shuffled: bool = False,
) -> DrawnPolicy:
    """A random policy; `shown_share` of its values are pictures, at least one where it is not 0.

    `shuffled`: its sections stand in any order, so that they are found by their numbers alone.
    """
    if rng.random() < reused_share:
        name = _reused_name(int(rng.integers(REUSED_NAMES)), depth)
    else:
        name = sample_name(rng, depth, held_out=False)
    tree = sample_tree(rng, name, depth)
    while is_held_out_tree(tree):
        tree = sample_tree(rng, name, depth)
    shown = choose_shown(rng, tree, shown_share) if shown_share else ()
    if not shuffled:
        return DrawnPolicy(tree, shown)
    nodes = list(iter_conditions(tree.root))
    order = tuple(nodes[i] for i in rng.permutation(len(nodes)))
    return DrawnPolicy(tree, tuple(node for node in order if node in shown), order)


def ask_policy(policy: DrawnPolicy, scene: Example) -> Example:
    """The question about one image, with policy text, answer and chain of thought."""
    objects = scene_objects(scene)
    visits, case = follow(policy.tree, objects)
    cot = wording.chain_of_thought(policy.tree, objects, policy.shown_sections)
    return dataclasses.replace(
        scene,
        query=wording.query(policy.tree.name),
        answer=wording.answer(case),
        cot=cot,
        policy_name=policy.tree.name,
        policy_text=policy.text,
        meta={
            "task": "policy",
            "depth": policy.tree.depth,
            "path": [visit.condition.section for visit in visits],
            "gold_cot": cot,
        },
    )


def recite_section(rng: np.random.Generator, policy: DrawnPolicy) -> Example:
    """What one section of a policy says, one whose value is not a picture.

    Half of the time all of it, else what it says after True or after False: the line of a chain of
    thought without what is seen. Half of the sections are of the lowest ones, where cases stand:
    what other sections lead to follows from their numbers.
    """
    sections = [c for c in iter_conditions(policy.tree.root) if c not in policy.shown]
    lowest = [c for c in sections if isinstance(c.if_true, Case)]
    if lowest and rng.random() < 0.5:
        sections = lowest
    condition = sections[int(rng.integers(len(sections)))]
    query, said = f"What is Condition {condition.section}?", wording.section_text(condition)
    if rng.random() < 0.5:
        verdict = bool(rng.integers(2))
        query = f"What is Condition {condition.section} after {verdict}?"
        said = wording.line_text(condition, verdict)
    return Example(
        "",
        (),
        query,
        said,
        policy_name=policy.tree.name,
        policy_text=policy.text,
        meta={"task": "recite", "depth": policy.tree.depth},
    )


def make_filter(rng: np.random.Generator, scene: Example) -> Example:
    """One to six Conditions on objects that are named, in the words of a chain of thought.

    Half have fewer objects than the scene, down to one, and half at most two Conditions: whether
    this one matches is what is learned first, what stayed in focus since the last True what next.
    """
    objects = scene_objects(scene)
    if rng.random() < 0.5:
        objects = objects[: int(rng.integers(1, len(objects)))] if len(objects) > 1 else objects
    ordered = wording.in_naming_order(objects)
    focus, asked, said = ordered, [], []
    most = 2 if rng.random() < 0.5 else MOST_FILTERS
    for number in range(1, 1 + int(rng.integers(1, most + 1))):
        attribute = str(rng.choice(list(ATTRIBUTES)))
        there = [getattr(thing, attribute) for thing in focus]
        value = str(rng.choice(there if rng.random() < 0.5 else ATTRIBUTES[attribute]))
        line = f"Condition {number}: any {attribute} {value}?"
        matching = [thing for thing in focus if getattr(thing, attribute) == value]
        called = wording.call_objects(ordered, matching) if matching else "none"
        asked.append(line)
        said.append(f"{line} {called}. {bool(matching)}")
        focus = matching or focus
    return Example(
        "",
        (),
        "\n".join([f"I see: {wording.list_objects(ordered)}.", *asked]),
        "\n".join(said),
        meta={"task": "filter"},
    )


def make_policy_question(
    rng: np.random.Generator, scene: Example, depths: Sequence[int]
) -> Example:
    """A -T policy of a random depth, its question about this image, with chain of thought."""
    return ask_policy(draw_policy(rng, int(rng.choice(depths))), scene)


def _reused_name(number: int, depth: int) -> str:
    return sample_name(np.random.default_rng([17, number]), depth, held_out=False)


def _sample_description(rng: np.random.Generator, objects: Sequence[SceneObject]) -> dict[str, str]:
    """One to three attribute values: half of the time of an object that is there."""
    attributes = rng.permutation(list(ATTRIBUTES))[: rng.integers(1, 4)]
    thing = objects[int(rng.integers(len(objects)))]
    wanted = {str(a): getattr(thing, a) for a in attributes}
    if rng.random() < 0.5:
        changed = str(rng.choice(attributes))
        wanted[changed] = str(rng.choice(ATTRIBUTES[changed]))
    return wanted
