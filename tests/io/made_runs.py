"""A workdir as a run leaves it, written by hand: two models, four questions, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.building import write_dataset
from data_pipelines.example import Example, encode_png
from trimpi_jax.evaluators.questions import summarize

GOLD = (
    "Condition 1: any color red? red cube. True: go to Condition 1.1\nCondition 1.1: none. Case 3"
)
WRONG = GOLD.replace("Case 3", "Case 1")


def make_examples(**changes: str) -> list[Example]:
    """Four questions with pictures; `changes` are appended to texts of the same name."""
    rng = np.random.default_rng(0)
    fields = {"query": "Which case?", "answer": "Case 3", "cot": GOLD, "policy_name": "L2-Red"}
    texts = {name: text + changes.get(name, "") for name, text in fields.items()}
    return [
        Example(
            example_id=f"q{number}{changes.get('example_id', '')}",
            images=(encode_png(rng.integers(0, 256, (28, 42, 3), dtype=np.uint8)),),
            **texts,
        )
        for number in range(4)
    ]


def make_record(example: Example, right: bool, said: str = "", **changes: Any) -> dict[str, Any]:
    """As `Evaluator.ask` gives it."""
    answer = "Case 3" if right else "Case 1"
    return {
        "example_id": example.example_id,
        "policy_name": example.policy_name,
        "answer": example.answer,
        "completion": f"<think>{GOLD if right else WRONG}</think>\\boxed{{{answer}}}{said}",
        "parsed": answer + said,
        "accuracy": float(right),
        "format": "ok",
        "prompt_tokens": 82,
        "details": {},
        "groups": {},
    } | changes


def write_run(
    workdir: Path,
    *,
    examples: list[Example] | None = None,
    said: str = "",
    rights: tuple[int, int] = (1, 3),
    **config: Any,
) -> Path:
    """Base and one RL stage; of four questions `rights` are right, with the policy all are."""
    examples = examples or make_examples()
    workdir.mkdir(parents=True)
    facts = {
        "name": "made",
        "method": "trimpi_poro_grpo",
        "model_dir": "assets/nano",
        "seed": 0,
        "data": {"dataset": "clevr_policy", "variant": "T", "depth": 2, "policies": 1},
        "rl": {"policy_rollout": True, "objective": "grpo"},
    }
    (workdir / "config.json").write_text(json.dumps(facts | config))
    write_dataset(workdir / "data", {"test": examples}, {"dataset": "clevr_policy_t"})
    for stage, right in zip(("0_base", "3_rl"), rights, strict=True):
        free = [make_record(e, number < right, said) for number, e in enumerate(examples)]
        aware = [make_record(example, True, said) for example in examples]
        (workdir / stage).mkdir()
        (workdir / stage / "evaluation.json").write_text(
            json.dumps(
                {
                    "stage": stage,
                    "policy_free": summarize(free) | {"prefill_ms": 1.0},
                    "policy_free_records": free,
                    "policy_aware": summarize(aware) | {"prefill_ms": 2.0},
                    "policy_aware_records": aware,
                }
            )
        )
    lines = [
        {"step": step, "rollouts/reward_mean": step / 10, "rollouts/accuracy_free": step / 20}
        for step in range(5)
    ]
    (workdir / "3_rl" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return workdir
