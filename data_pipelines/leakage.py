"""Does anything that is measured stand in what is trained on? A check over whole datasets.

    training splits   their name begins with "train" or "cot"
    held-out splits   all others (test, override, harder variants)

Refused: a scene (or task) in a training and a held-out split; the same question about the same
images under the same policy in both; one policy name with two texts in training; an override split
with a policy that training has word for word.

In: one `Identity` an Example, made while it is written. Out: counts for the manifest.
Next: data_pipelines/dataset_card.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.example import Example

SOURCE_KEYS = ("scene_id", "task_id")  # of `Example.meta`: what an Example was made from
TRAINING = ("train", "cot")
OVERRIDE = "override"
SHOWN = 5  # offenders of one kind that an error names


class Identity(NamedTuple):
    """What one Example is about; JSON-able, so that a resumed build need not read shards again."""

    example_id: str
    source: str  # scene or task, "" = unknown
    policy_name: str
    policy: str  # digest of the policy's text and images, "" = no policy
    content: str  # digest of policy name, query and images
    answer: str
    chars: tuple[int, int, int]  # of policy text, query, chain of thought
    images: int


def identify(example: Example) -> Identity:
    """The Identity of an Example."""
    source = next((f"{k}:{example.meta[k]}" for k in SOURCE_KEYS if k in example.meta), "")
    policy = _digest(example.policy_text.encode(), *example.policy_images)
    return Identity(
        example.example_id,
        source,
        example.policy_name,
        policy if example.policy_text else "",
        _digest(example.policy_name.encode(), example.query.encode(), *example.images),
        example.answer,
        (len(example.policy_text), len(example.query), len(example.cot)),
        len(example.images),
    )


def is_training_split(name: str) -> bool:
    """Whether a split is trained on, by its name."""
    return name.startswith(TRAINING)


def check_leakage(splits: Mapping[str, Sequence[Identity]]) -> dict[str, Any]:
    """Counts of scenes and policies by split, once nothing was found that leaks.

    Raises:
        ValueError: naming every kind of leak with its first offenders.
    """
    training = [name for name in splits if is_training_split(name)]
    held_out = [name for name in splits if not is_training_split(name)]
    problems = [problem for name in splits for problem in _repeated(name, splits[name])]
    trained_sources = {row.source: name for name in training for row in splits[name] if row.source}
    trained_contents = {row.content: name for name in training for row in splits[name]}
    texts: dict[str, set[str]] = {}
    for name in training:
        for row in splits[name]:
            if row.policy:
                texts.setdefault(row.policy_name, set()).add(row.policy)
    ambiguous = [name for name, found in texts.items() if len(found) > 1]
    problems += _problem("policy names with more than one text in training", ambiguous)
    report: dict[str, Any] = {}
    for name in splits:
        rows = splits[name]
        known = {(n, text) for n, found in texts.items() for text in found}
        policies = {(row.policy_name, row.policy) for row in rows if row.policy}
        report[name] = {
            "sources": len({row.source for row in rows if row.source}),
            "policies": len(policies),
            "policies_as_in_training": len(policies & known),
            "policies_changed": sum(n in texts and (n, t) not in known for n, t in policies),
        }
    for name in held_out:
        rows = splits[name]
        shared = {r.source for r in rows if r.source in trained_sources}
        problems += _problem(
            f"scenes or tasks of held-out split '{name}' that training has, too", shared
        )
        shared = {r.example_id for r in rows if r.content in trained_contents}
        problems += _problem(
            f"examples of held-out split '{name}' whose policy name, query and images stand in"
            " training, too",
            shared,
        )
        if name.startswith(OVERRIDE):
            same = {r.policy_name for r in rows if r.policy in texts.get(r.policy_name, ())}
            problems += _problem(f"policies of '{name}' that are those of training", same)
    if problems:
        raise ValueError("this dataset must not be written:\n  " + "\n  ".join(problems))
    return report


def _repeated(split: str, rows: Sequence[Identity]) -> list[str]:
    seen: set[str] = set()
    twice = [row.example_id for row in rows if row.example_id in seen or seen.add(row.example_id)]
    return _problem(f"example ids that occur twice in '{split}'", twice)


def _problem(kind: str, offenders) -> list[str]:
    names = sorted(offenders)
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {kind}: {', '.join(map(repr, names[:SHOWN]))}{more}"]


def _digest(*pieces: bytes) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:32]
