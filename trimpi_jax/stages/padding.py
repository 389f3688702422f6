"""How much of the buckets is padding, measured on the first examples of the config's data.

In: a config and a tokenizer. Out: per kind of row the buckets it falls into, the share of slots
that hold no token, and what fits nowhere. Completions of RL are not known before the run: the gold
ones stand for them.

Next: trimpi_jax/stages/programs.py
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.build import DATASETS, make_settings
from trimpi_jax.inputs.batching import as_buckets
from trimpi_jax.inputs.encode import EncodedRow, encode_prompt
from trimpi_jax.models.config import VLMConfig
from trimpi_jax.models.processor import load_processor
from trimpi_jax.stages.sft import encode_sft_row
from trimpi_jax.stages.vm_cpt import encode_vm_cpt_row


def measure_padding(
    config: ConfigDict, model: VLMConfig, folder: str, count: int
) -> Iterator[tuple[str, str]]:
    """(kind of row, what its buckets hold) for prompts and for training rows."""
    options = config.data.to_dict()
    name = options.pop("dataset")
    settings = make_settings(name, options)
    processor = load_processor(Path(folder), model)
    windows = max(as_buckets(config.windows))

    def first(split: str):
        splits = DATASETS[name].make_splits(settings, lambda done, total: None)
        return list(itertools.islice(splits[split], count)) if split in splits else []

    test, cot = first("test"), first("cot")
    for view, aware in (("policy-free prompts", False), ("policy-aware prompts", True)):
        rows = [encode_prompt(one, processor, policy_in_prompt=aware) for one in test]
        yield view, describe(rows, config.prompt_buckets, windows)
    if "vm_cpt" in config.stages:
        rows = [encode_vm_cpt_row(one, processor) for one in cot]
        yield "vm_cpt rows", describe(rows, config.row_buckets, windows)
    if {"cot_sft", "rl", "distillation"} & set(config.stages):
        rows = [encode_sft_row(one, processor, stage="cot_sft") for one in cot]
        yield "prompt and completion", describe(rows, config.row_buckets, windows)


def describe(rows: Sequence[EncodedRow], buckets: Sequence[int], windows: int) -> str:
    """One line; `buckets` in tokens, `windows` in vision windows a row."""
    if not rows:
        return "no examples"
    lengths = [len(row.tokens) for row in rows]
    fitting = [
        next((bucket for bucket in sorted(buckets) if length <= bucket), None)
        if len(row.images.patches) <= windows
        else None
        for row, length in zip(rows, lengths, strict=True)
    ]
    kept = [(length, b) for length, b in zip(lengths, fitting, strict=True) if b is not None]
    slots = sum(bucket for _, bucket in kept)
    waste = f"{100 * (1 - sum(length for length, _ in kept) / slots):.0f} %" if slots else "-"
    counts = Counter(bucket for _, bucket in kept)
    told = ", ".join(f"{count} in {bucket}" for bucket, count in sorted(counts.items()))
    used = sum(len(row.images.patches) for row in rows)
    vision = 100 * (1 - used / (len(rows) * windows)) if windows else 0.0
    text = f"{min(lengths)} to {max(lengths)} tokens; {told or 'none fits'}; {waste} padding, "
    text += f"{vision:.0f} % of the vision windows"
    missing = len(rows) - len(kept)
    return f"{text}; {missing} of {len(rows)} fit NO bucket" if missing else text
