"""What a nano base sees and reads: greedy answers about unseen policies and unseen images.

    python benchmarks/nano_base.py --model trimpi_jax/assets/nano --questions 200

Prints, for -T and -M policies of depth 2, 4 and 6, the share of right answers with the policy in
the prompt and without it, with 95 % intervals; and the scores of the general questions (captions,
existence, text), the attributes of the captioned objects one by one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from data_pipelines.clevr_policy.dataset import ClevrPolicySettings, make_splits
from data_pipelines.example import Example
from data_pipelines.nano_base.general import make_general_questions
from trimpi_jax.evaluators.questions import EvaluationSettings, Evaluator
from trimpi_jax.evaluators.statistics import wilson_interval
from trimpi_jax.inputs.sizes import SizeReader
from trimpi_jax.rollouts.engine import make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.open_model import find_model, load_model, open_config

ATTRIBUTES = ("color", "size", "material", "shape")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--questions", type=int, default=200, help="of every row of the table")
    parser.add_argument("--policies", type=int, default=20, help="unseen policies of a row")
    parser.add_argument("--rows", default="T2,T4,T6,M2,M4,M6,general")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    ask = open_asker(options.model)
    found = {}
    for row in options.rows.split(","):
        started = time.time()
        if row == "general":
            found[row] = general(ask, options.questions, options.seed)
        else:
            examples = policy_questions(row, options)
            found[row] = {
                view: rate(ask(examples, aware, 260 if aware else 160))
                for view, aware in (("in_context", True), ("without", False))
            }
        print(row, json.dumps(found[row]), f"{time.time() - started:.0f} s", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def open_asker(folder: Path):
    """(examples, policy in the prompt, new tokens) -> records."""
    source = find_model(folder)
    model, processor = open_config(source, ConfigDict())
    model = dataclasses.replace(model, layer_loop="unrolled", attention="xla")
    mesh = make_mesh(-1, 1, 1)
    reader = SizeReader(processor)
    with jax.set_mesh(mesh):
        params = load_model(source, model, mesh)

    def ask(examples: list[Example], aware: bool, new_tokens: int):
        sizes = [reader.measure(example) for example in examples]
        sizes = [size.aware if aware else size.free for size in sizes]
        longest = max(size.tokens for size in sizes)
        engine = make_engine(
            model,
            processor,
            PromptSizes((-(-longest // 8) * 8,), (max(size.windows for size in sizes),)),
            mesh,
            dtype="float32",
        )
        evaluator = Evaluator(engine, EvaluationSettings(rows=50, max_new_tokens=new_tokens))
        with jax.set_mesh(mesh):
            evaluator.load(params)
            return evaluator.ask(examples, policy_in_prompt=aware)

    return ask


def policy_questions(row: str, options: argparse.Namespace) -> list[Example]:
    """Unseen images under unseen policies, for example "M4"."""
    settings = ClevrPolicySettings(
        variant=row[0],
        depth=int(row[1:]),
        policies=options.policies,
        train_per_policy=1,
        cot_per_policy=0,
        test=options.questions,
        width=168,
        height=112,
        min_objects=3,
        max_objects=5,
        seed=options.seed,
    )
    return list(make_splits(settings)["test"])


def general(ask, count: int, seed: int) -> dict[str, float]:
    """Mean score of a family of general questions, and of every attribute in the captions."""
    records = ask(make_general_questions(3 * count, seed), False, 96)
    scores, right, total = collections.defaultdict(list), collections.Counter(), 0
    for record in records:
        scores[record["groups"]["family"]].append(record["accuracy"])
        if record["groups"]["family"] == "caption":
            pairs = list(
                zip(objects(record["answer"]), objects(record["completion"]), strict=False)
            )
            total += max(len(objects(record["answer"])), len(objects(record["completion"])))
            for gold, said in pairs:
                right.update(n for n, a, b in zip(ATTRIBUTES, gold, said, strict=False) if a == b)
    means = {family: round(100 * sum(v) / len(v), 1) for family, v in scores.items()}
    return means | {name: round(100 * right[name] / max(total, 1), 1) for name in ATTRIBUTES}


def objects(text: str) -> list[list[str]]:
    """The four words of every object that a caption names, in its order."""
    found = re.search(r"I see: (.*)\.", text)
    return [part.split() for part in found[1].split(", ")] if found else []


def rate(records: list[dict]) -> dict[str, float]:
    """Per cent right, with its Wilson interval."""
    hits, count = sum(record["accuracy"] == 1 for record in records), len(records)
    low, high = wilson_interval(hits, count)
    return {"right": round(100 * hits / count, 1), "low": round(100 * low, 1),
            "high": round(100 * high, 1), "of": count}  # fmt: skip


if __name__ == "__main__":
    main()
