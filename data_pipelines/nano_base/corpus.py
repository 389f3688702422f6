r"""Text on which the nano tokenizer is trained: prompts and completions of every task.

A small model reads a policy far sooner when what belongs together is one token. The fixed wording
between two values of a policy is such a piece, and so is a section's number:

    Qwen2.5       # | Condition | ' ' | 1 | . | 2 | : | any | shape | cube | ?\n | - | True | : ...
    nano          # Condition | ' 1.2' | : any | shape | cube | ?\n- True: | go to Condition | ...

To go on from "go to Condition 1.2" is then to look up one token; a policy of depth 6 takes 770
tokens instead of 2,400. Everything else is split by Qwen2.5's own rules.

Source: tokens across words, SuperBPE, arXiv:2503.13423.
Next: trimpi_jax/models/nano_tokenizer.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines.clevr.sampling import sample_scenes
from data_pipelines.example import IMAGE_MARK, Example, completion_text
from data_pipelines.nano_base.mixture import (
    ask_policy,
    draw_policy,
    make_caption,
    make_existence,
)
from data_pipelines.nano_base.text_questions import make_text_question

# regular expressions of what is not split: fixed wording, and numbers of sections and cases
WHOLE = (
    r"\?\n- True:",
    r"\n- False:",
    r"# Condition",
    r"\nCondition",
    r" ?go to Condition",
    r" ?respond with Case",
    r": any",
    r" \(pictured\)",
    r"(?<=Condition) [\d.]*\d",
    r"(?<=Case) \d+",
    r" [A-J](?=[,.])",
    r"The policy of L",
    r"\. Start at Condition 1 with every object in focus\.",
    r" After True only the matching objects stay in focus; after False the focus stays\.",
    r" A value given as a picture is that of the object in it;",
    r" all pictures have the same scale\.",
    r"According to the policy L",
    r", what should be the response for the given image\?",
    r" Think inside <think></think> and put the final answer inside \\boxed\{\}\.",
    r"<think>",
    r"\n?</think>\n?",
    r"\\boxed\{",
    r"You are a helpful assistant\.",
)
DEFAULT_SYSTEM = "You are a helpful assistant."  # what Qwen2.5-VL's chat template adds
DEPTHS = (1, 2, 4, 6)


def iter_corpus(seed: int, count: int) -> Iterator[str]:
    """`count` documents of policies, queries and completions, without images.

    The words that the chat template adds to every prompt are in every document, too.
    """
    scenes = sample_scenes(seed, 0, 256, min_objects=3, max_objects=8, width=168, height=112)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        objects = [dataclasses.asdict(thing) for thing in scenes[i % len(scenes)].objects]
        scene = Example(str(i), (), "", "", meta={"objects": objects})
        shown_share = 0.5 * (i // 4 % 2)
        drawn = draw_policy(rng, DEPTHS[i % 4], shown_share=shown_share, reused_share=0.0)
        policy = ask_policy(drawn, scene)
        yield f"{DEFAULT_SYSTEM}\nsystem\nuser\nassistant\n"
        said = completion_text(policy.cot, policy.answer)
        yield "\n".join((policy.policy_text.replace(IMAGE_MARK, ""), policy.query, said))
        for example in (
            make_caption(rng, scene),
            make_existence(rng, scene),
            make_text_question(rng, held_out=False),
        ):
            yield f"{example.query}\n{example.answer}"
