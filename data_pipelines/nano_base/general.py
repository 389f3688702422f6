"""What the nano base can do besides policies: captions, existence and text questions, all unseen.

The scenes are of a stream of their own (`nano-base-general`), which no training ever draws.

Next: trimpi_jax/grading/benchmarks.py
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.example import Example
from data_pipelines.nano_base.mixture import make_caption, make_existence
from data_pipelines.nano_base.scenes import SceneSetSettings, make_scene_examples
from data_pipelines.nano_base.text_questions import make_text_question

FAMILIES = ("caption", "existence", "text")


def make_general_questions(count: int, seed: int = 0) -> list[Example]:
    """`count` questions, the families in turn; each of an image has a scene of its own."""
    pictures = sum(FAMILIES[number % len(FAMILIES)] != "text" for number in range(count))
    settings = SceneSetSettings(count=pictures, seed=seed, split="general")
    scenes = iter(make_scene_examples(settings)) if pictures else iter(())
    questions = []
    for number in range(count):
        rng = np.random.default_rng([seed, 23, number])
        family = FAMILIES[number % len(FAMILIES)]
        if family == "text":
            example = make_text_question(rng, held_out=True)
        else:
            make = make_existence if family == "existence" else make_caption
            example = make(rng, next(scenes))
        meta = {"answer_form": {"form": f"nano_{family}"}, "family": family}
        questions.append(dataclasses.replace(example, example_id=f"nano/{number}", meta=meta))
    return questions
