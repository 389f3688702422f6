"""What the nano base can do besides policies: captions and existence questions on unseen scenes.

The scenes are of a stream of their own (`nano-base-general`), which no training ever draws.

Next: trimpi_jax/grading/benchmarks.py
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.example import Example
from data_pipelines.nano_base.mixture import make_caption, make_existence
from data_pipelines.nano_base.scenes import SceneSetSettings, make_scene_examples


def make_general_questions(count: int, seed: int = 0) -> list[Example]:
    """`count` questions, captions and existence in turn, each about a scene of its own."""
    settings = SceneSetSettings(count=count, seed=seed, split="general")
    questions = []
    for number, scene in enumerate(make_scene_examples(settings)):
        rng = np.random.default_rng([seed, 23, number])
        example = make_existence(rng, scene) if number % 2 else make_caption(rng, scene)
        task = "existence" if number % 2 else "caption"
        meta = {"answer_form": {"form": f"nano_{task}"}, "family": task}
        questions.append(dataclasses.replace(example, example_id=f"nano/{number}", meta=meta))
    return questions
