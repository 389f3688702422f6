"""The tasks that teach the nano base to see and to read policies.

    caption    "I see: red small metal cube, blue large rubber sphere."       dense perception
    existence  four yes/no questions of one to three attributes at once      perception, logic
    policy     a fresh random policy in the prompt, its question and chain of thought

Names and trees are of the half that no evaluated dataset may use (`is_held_out_name`,
`is_held_out_tree`), so an evaluated policy never occurs here. A step's examples depend only on
(seed, step), so a resumed run sees what an unbroken one would have seen.

Source: paper section 2 for the policy questions; the other tasks are ours.
Next: trimpi_jax/inputs/encode.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.clevr.scene import ATTRIBUTES, SceneObject
from data_pipelines.clevr_policy import wording
from data_pipelines.clevr_policy.tree import follow, is_held_out_tree, sample_name, sample_tree
from data_pipelines.example import Example
from data_pipelines.nano_base.scenes import scene_objects

TASKS = ("caption", "existence", "policy")
CAPTION_QUERIES = (
    "Describe the objects in the image.",
    "What do you see?",
    "List the objects.",
)
EXISTENCE_QUESTIONS = 4


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training: until `until` (share of the run), tasks with these shares of steps."""

    until: float
    shares: tuple[float, float, float]  # of TASKS
    depths: tuple[int, ...] = (2,)  # depths of the policies, drawn uniformly
    max_objects: int = 10  # policy questions are asked about scenes of at most this many objects


def task_of_step(step: int, num_steps: int, phases: Sequence[Phase], seed: int) -> str:
    """The task whose examples fill the batch of a step."""
    phase = phase_of_step(step, num_steps, phases)
    rng = np.random.default_rng([seed, 11, step])
    return str(rng.choice(TASKS, p=np.asarray(phase.shares) / sum(phase.shares)))


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


def make_policy_question(
    rng: np.random.Generator, scene: Example, depths: Sequence[int]
) -> Example:
    """A fresh policy of a random depth, its question about this image, with chain of thought."""
    objects = scene_objects(scene)
    depth = int(rng.choice(depths))
    name = sample_name(rng, depth, held_out=False)
    tree = sample_tree(rng, name, depth)
    while is_held_out_tree(tree):
        tree = sample_tree(rng, name, depth)
    visits, case = follow(tree, objects)
    return dataclasses.replace(
        scene,
        query=wording.query(name),
        answer=wording.answer(case),
        cot=wording.chain_of_thought(tree, objects),
        policy_name=name,
        policy_text=wording.policy_text(tree),
        meta={
            "task": "policy",
            "depth": depth,
            "path": [visit.condition.section for visit in visits],
            "gold_cot": wording.chain_of_thought(tree, objects),
        },
    )


def _sample_description(rng: np.random.Generator, objects: Sequence[SceneObject]) -> dict[str, str]:
    """One to three attribute values: half of the time of an object that is there."""
    attributes = rng.permutation(list(ATTRIBUTES))[: rng.integers(1, 4)]
    thing = objects[int(rng.integers(len(objects)))]
    wanted = {str(a): getattr(thing, a) for a in attributes}
    if rng.random() < 0.5:
        changed = str(rng.choice(attributes))
        wanted[changed] = str(rng.choice(ATTRIBUTES[changed]))
    return wanted
