"""A user's own policy as Examples: the same splits as ClevrPolicy, so the same stages run on it.

    train   every training example, without its chain of thought (Direct SFT, RL)
    cot     the training examples that have one, with it (VM-CPT, CoT SFT)
    test    what is kept for the test
    override   cases under a changed policy of the same name, where the folder has override/

Unless the examples say it themselves, the test examples are drawn by seed; examples that share a
picture or a group stay on the same side, and pictures of override/ on the side of the test, so that
no held-out picture was ever trained on.

Next: trimpi_jax/grading/answer_forms.py
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy.cluster.hierarchy import DisjointSet

from data_pipelines.answer_forms import Python
from data_pipelines.example import Example
from data_pipelines.own_policy.folder import (
    Entry,
    Folder,
    Policy,
    facts,
    function_form,
    read_folder,
)
from data_pipelines.own_policy.task import Line, Task


@dataclasses.dataclass(frozen=True)
class OwnPolicySettings:
    """A user's own policy.

    Attributes:
        source: the folder with policy.md, examples.jsonl and task.toml; the task's choices stand
            in there.
    """

    source: str = ""

    def __post_init__(self):
        if not self.source:
            raise ValueError(
                "an own policy needs its folder (policy.md, examples.jsonl, task.toml):"
                " --source DIR, or --config.data.source=DIR"
            )


def make_splits(
    settings: OwnPolicySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Iterator[Example]]:
    """Split name -> Examples; the whole folder is checked before the first one is given out.

    Raises:
        ValueError: listing every problem of the folder.
    """
    folder = _read(settings.source)
    changed, held_out = folder.override or (folder.policy, [])
    test = choose_test(folder.task, folder.entries, held_out)
    if not 0 < len(test) < len(folder.entries):
        raise ValueError(
            f"{settings.source}: the examples cannot be split, since all share pictures or groups;"
            " use more pictures, or set allow_shared_images and each example's split"
        )
    train = [entry for entry in folder.entries if entry.example_id not in test]
    kept = [entry for entry in folder.entries if entry.example_id in test]
    root = Path(settings.source).expanduser()
    form = folder.task.answer
    python = function_form(form, root) if isinstance(form, Python) else None
    with_thought = [entry for entry in train if entry.line.cot.strip()]
    total = len(folder.entries) + len(with_thought) + len(held_out)
    done = 0

    def examples(
        entries: Sequence[Entry], policy: Policy = folder.policy, *, with_cot: bool = False
    ) -> Iterator[Example]:
        nonlocal done
        for entry in entries:
            yield make_example(folder.task, policy, entry, with_cot=with_cot, python=python)
            done += 1
            on_progress(done, total)

    splits = {
        "train": examples(train),
        "cot": examples(with_thought, with_cot=True),
        "test": examples(kept),
    }
    return splits | ({"override": examples(held_out, changed)} if held_out else {})


def recipe(settings: OwnPolicySettings) -> dict[str, Any]:
    """What decides the data: the content of the folder, wherever it stands."""
    folder = _read(settings.source)
    return {"dataset": "own", "policy": folder.task.name, "content_sha256": folder.sha256}


def choose_test(task: Task, entries: Sequence[Entry], held_out: Sequence[Entry] = ()) -> set[str]:
    """Ids of the test examples; those that share a picture with `held_out` come first."""
    if entries[0].line.split:
        return {entry.example_id for entry in entries if entry.line.split == "test"}
    together: DisjointSet = DisjointSet(entry.example_id for entry in entries)
    first: dict[Any, str] = {}
    for entry in entries:
        keys = [hashlib.sha256(image).hexdigest() for image in entry.images]
        for key in [*keys, *([("group", entry.line.group)] if entry.line.group else [])]:
            together.merge(entry.example_id, first.setdefault(key, entry.example_id))
    pictures = {image for entry in held_out for image in entry.images}
    shared = {entry.example_id for entry in entries if pictures.intersection(entry.images)}
    groups = [sorted(group) for group in together.subsets()]
    groups.sort(key=lambda group: _draw(task.split.seed, group[0]))
    groups.sort(key=lambda group: shared.isdisjoint(group))
    wanted = max(1, round(task.split.test_share * len(entries)))
    test: set[str] = set()
    for group in groups:
        fits = len(test) < wanted and len(test) + len(group) < len(entries)
        if fits or not shared.isdisjoint(group):
            test.update(group)
    return test


def make_example(
    task: Task, policy: Policy, entry: Entry, *, with_cot: bool, python: dict[str, Any] | None
) -> Example:
    """One line of examples.jsonl as the record that every stage reads."""
    return Example(
        example_id=entry.example_id,
        images=entry.images,
        query=word_query(task, entry.line),
        answer=entry.answer,
        cot=entry.line.cot.strip() if with_cot else "",
        policy_name=task.name,
        policy_text=policy.text,
        policy_images=policy.images,
        meta={
            "task": "own_policy",
            "answer_form": python or entry.form,
            "gold_cot": entry.line.cot.strip(),
            "facts": facts(entry.example_id, entry.line),
        },
    )


def word_query(task: Task, line: Line) -> str:
    """The user's message: template, profile, history, query and instruction."""
    profile = "".join(f"- {key}: {value}\n" for key, value in line.profile.items())
    history = "".join(f"{turn.role}: {turn.text}\n" for turn in line.history)
    return (
        string.Template(task.prompt.template)
        .substitute(
            policy=task.name,
            profile=f"Profile:\n{profile}" if profile else "",
            history=f"Earlier messages:\n{history}" if history else "",
            query=line.query.strip(),
            instruction=task.prompt.instruction,
        )
        .strip()
    )


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _read(source: str) -> Folder:
    root = Path(source).expanduser()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _read_once(source, hashlib.sha256(repr(states).encode()).hexdigest())


@functools.lru_cache(maxsize=1)  # the recipe and the splits are asked for one after the other
def _read_once(source: str, state: str) -> Folder:
    return read_folder(source)
