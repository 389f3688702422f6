"""Shapes from the data: what a config leaves to "auto" is computed once from the shards.

    max_new_tokens   the longest gold completion and a quarter more
    prompt_buckets   tokens of every prompt, with and without the policy
    row_buckets      tokens of every training row of the supervised stages that run
    windows          vision windows of every prompt

The same data and model give the same sizes, so a run that is continued compiles the same programs.

Next: trimpi_jax/stages/pipeline.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.example import Example
from trimpi_jax.inputs.batching import as_buckets, plan_buckets, round_up
from trimpi_jax.inputs.sizes import ExampleSize, SizeReader
from trimpi_jax.models.processor import Processor

AUTO = "auto"
KEYS = ("max_new_tokens", "prompt_buckets", "row_buckets", "windows")
SLACK = 1.25  # a sampled completion may be longer than the longest gold one


def has_auto_sizes(config: ConfigDict) -> bool:
    """Whether the sizes of a config depend on its data."""
    return any(config.get(key) == AUTO for key in KEYS)


def fill_auto_sizes(
    config: ConfigDict, splits: Mapping[str, Iterable[Example]], processor: Processor
) -> ConfigDict:
    """The config with every size a number, or itself when all of them are.

    A size in a config is a number, a tuple, a text like "320,4096", or "auto".

    Args:
        config: of the run.
        splits: every split of its data; read only where something is "auto".
        processor: of the model.

    Raises:
        ValueError: a text that is none of these, or a split that a stage needs is empty.
    """
    texts = {key: config[key] for key in KEYS if isinstance(config.get(key), str)}
    if not texts:
        return config
    found = {key: _parse(key, text) for key, text in texts.items() if text != AUTO}
    if len(found) < len(texts):
        reader = SizeReader(processor)
        sizes = {name: [reader.measure(one) for one in part] for name, part in splits.items()}
        _check_splits(config, sizes)
        chosen = choose_sizes(config, sizes, found.get("max_new_tokens"))
        found |= {key: chosen[key] for key in texts if key not in found}
    filled = config.copy_and_resolve_references()
    with filled.unlocked(), filled.ignore_type():  # a text becomes a number
        filled.update(found)
    return filled


def choose_sizes(
    config: ConfigDict, splits: dict[str, list[ExampleSize]], max_new_tokens: int | None = None
) -> dict[str, Any]:
    """All four sizes, from the sizes of the Examples of every split."""
    everything = [size for sizes in splits.values() for size in sizes]
    new_tokens = max_new_tokens or config.max_new_tokens
    if isinstance(new_tokens, str):
        new_tokens = round_up(int(SLACK * max(size.completion_tokens for size in everything)))
    prompts = [size.free for size in everything]
    prompts += [size.aware for size in everything if size.aware]
    rows: list[int] = []
    for stage in config.stages:
        if stage == "vm_cpt":
            rows += [(s.aware or s.free).tokens + s.completion_tokens for s in splits["cot"]]
        elif stage == "cot_sft":
            rows += [s.free.tokens + s.completion_tokens for s in splits["cot"]]
        elif stage == "distillation":
            rows += [s.free.tokens + new_tokens for s in splits["train"]]
        elif stage == "direct_sft":
            rows += [s.free.tokens + s.completion_tokens for s in splits["train"]]
    return {
        "max_new_tokens": new_tokens,
        "prompt_buckets": plan_buckets([prompt.tokens for prompt in prompts]),
        "row_buckets": plan_buckets(rows or [prompt.tokens for prompt in prompts]),
        "windows": plan_buckets([prompt.windows for prompt in prompts], rounded=False),
    }


def describe_sizes(config: ConfigDict) -> str:
    """The four sizes in words."""
    return (
        f"prompts of {tuple(config.prompt_buckets)} tokens, training rows of"
        f" {tuple(config.row_buckets)}, {as_buckets(config.windows)} windows,"
        f" {config.max_new_tokens} new tokens"
    )


def _check_splits(config: ConfigDict, splits: dict[str, list[ExampleSize]]) -> None:
    needs_cot = [
        stage
        for stage in config.stages
        if stage in ("vm_cpt", "cot_sft") or config[stage].get("data") == "cot"
    ]
    if needs_cot and not splits.get("cot"):
        raise ValueError(
            f"the stages {needs_cot} train on examples with a chain of thought, and none has one;"
            ' write "cot" for some of them, or choose method=direct_sft'
        )


def _parse(key: str, text: str) -> Any:
    numbers: list[int] = []
    with contextlib.suppress(ValueError):
        numbers = sorted(int(part) for part in text.split(","))
    if min(numbers, default=0) < 1 or (key == "max_new_tokens" and len(numbers) > 1):
        form = "a number" if key == "max_new_tokens" else "numbers like 320,4096"
        raise ValueError(f"config.{key} is '{text}'; write {AUTO}, or {form}")
    return numbers[0] if key == "max_new_tokens" else tuple(numbers)
