"""The paper's branching error: which Conditions answers cite, against which they should.

For every Condition id s, count the answers that cite it and the gold chains of thought that do:

    branching error = mean over s of |answers citing s - gold chains citing s|

over all ids that either side cites, policies pooled, an id once an answer. Counts grow with the
number of answers, so `per_2000` scales them to the paper's 2,000 test instances (CoT SFT 39.74,
+GRPO 38.72, TriMPI 7.07).

In: Examples with a gold chain of thought, and completions. Out: the error and both distributions.

Source: paper section 5, branching error. Decided: ids pooled, one count an answer.
Next: trimpi_jax/evaluators/anatomy.py
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from data_pipelines.example import Example
from trimpi_jax.evaluators.thoughts import cited_sections, conditions_of, has_tree

PAPER_ANSWERS = 2000  # paper section 2: unseen test instances of a task


def branching_error(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Any]:
    """Mean absolute difference of the counts; answers that cite a section that does not exist.

    `distribution` is id -> [answers, gold chains]. Examples without a tree are left out and
    counted in `left_out`.
    """
    said, gold, missing = (collections.Counter[str]() for _ in range(3))
    count = with_missing = 0
    for example, text in zip(examples, texts, strict=True):
        if not has_tree(example):
            continue
        count += 1
        cited = cited_sections(text)
        said.update(cited)
        gold.update(cited_sections(example.meta["gold_cot"]))
        there = conditions_of(example)
        strangers = [section for section in cited if section not in there]
        missing.update(strangers)
        with_missing += bool(strangers)
    ids = sorted({*said, *gold}, key=lambda section: [int(part) for part in section.split(".")])
    error = sum(abs(said[s] - gold[s]) for s in ids) / len(ids) if ids else None
    return {
        "count": count,
        "left_out": len(examples) - count,
        "mean_absolute_difference": error,
        "per_2000": None if error is None else error * PAPER_ANSWERS / count,
        "answers_with_missing_section": with_missing,
        "missing_sections": dict(missing.most_common(20)),
        "distribution": {section: [said[section], gold[section]] for section in ids},
    }
