"""How long the grading of one RL step of GTAPolicy takes: 512 completions, 64 questions times 8.

    python benchmarks/grading_speed.py [--encoder NAME_OR_FOLDER] [--questions 64] [--rollouts 8]

Every wrong text is another one, so nothing but the gold texts can be remembered from rollout to
rollout, and the encoder has to read all of them. `mixed` takes questions as the dataset has them,
`texts` only such whose gold call has a text to compare. CPU seconds, those of all cores together,
stay honest on a machine that others use too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipelines.gta_policy.catalogue import FIELD_KINDS, answer_form
from data_pipelines.gta_policy.dataset import GTAPolicySettings, make_splits
from trimpi_jax.grading.grader import grade_completions
from trimpi_jax.grading.text_similarity import DEFAULT_ENCODER, load_encoder

WORDS = "the a red small picture house number of price what year city in on with draw".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default=DEFAULT_ENCODER)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    form = answer_form(options.encoder)
    examples = [
        dataclasses.replace(example, meta={"answer_form": form})
        for example in make_splits(GTAPolicySettings())["train"]
    ]
    with_text = [e for e in examples if any(map(is_text, json.loads(e.answer)["arguments"]))]
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    encoder = load_encoder(options.encoder)
    print(f"{encoder.name}: loaded in {time.perf_counter() - started:.2f} s")
    for name, pool in (("mixed", examples), ("texts", with_text)):
        seconds, cpu = [], []
        for _ in range(options.steps):
            chosen = [pool[int(i)] for i in rng.integers(len(pool), size=options.questions)]
            chosen = [e for e in chosen for _ in range(options.rollouts)]
            texts = [f"<think>so</think>\\boxed{{{spoil(e.answer, rng)}}}" for e in chosen]
            started, started_cpu = time.perf_counter(), time.process_time()
            grades = grade_completions(texts, chosen, [True] * len(texts))
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - started_cpu)
        compared = sum("text_encoder" in g.details for g in grades)
        print(
            f"{name}: {len(texts)} calls, {compared} with a text; seconds a step:"
            f" {' '.join(f'{s:.2f}' for s in seconds)}, median {statistics.median(seconds):.2f},"
            f" CPU seconds {statistics.median(cpu):.2f}"
            f" ({len(os.sched_getaffinity(0))} cores)"
        )


def is_text(field: str) -> bool:
    """Whether the field is compared by the encoder."""
    return FIELD_KINDS[field] == "text"


def spoil(answer: str, rng: np.random.Generator) -> str:
    """The gold call with new texts: a part of the words kept, others put in."""
    call = json.loads(answer)
    for field, value in call["arguments"].items():
        if is_text(field):
            words = [w if rng.random() < 0.6 else str(rng.choice(WORDS)) for w in value.split(" ")]
            call["arguments"][field] = " ".join([*words, str(rng.integers(10**6))])
    return json.dumps(call)


if __name__ == "__main__":
    main()
