"""Text on which the nano tokenizer is trained: prompts and completions of every task.

Next: trimpi_jax/models/nano_tokenizer.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.example import Example, completion_text
from data_pipelines.nano_base.mixture import (
    make_caption,
    make_existence,
    make_policy_question,
)

DEFAULT_SYSTEM = "You are a helpful assistant."  # what Qwen2.5-VL's chat template adds


def iter_corpus(seed: int, count: int) -> Iterator[str]:
    """`count` documents of policies, queries and completions, without images.

    The words that the chat template adds to every prompt are in every document, too.
    """
    scenes = sample_scenes(seed, 0, 256, min_objects=3, max_objects=8, width=168, height=112)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        objects = [dataclasses.asdict(thing) for thing in scenes[i % len(scenes)].objects]
        scene = Example(str(i), (), "", "", meta={"objects": objects})
        policy = make_policy_question(rng, scene, (1, 2, 3, 4))
        yield f"{DEFAULT_SYSTEM}\nsystem\nuser\nassistant\n"
        said = completion_text(policy.cot, policy.answer)
        yield "\n".join((policy.policy_text, policy.query, said))
        for example in (make_caption(rng, scene), make_existence(rng, scene)):
            yield f"{example.query}\n{example.answer}"
