"""A user's own policy as Examples: the same splits as ClevrPolicy, so the same stages run on it.

    train   every training example, without its chain of thought (Direct SFT, RL)
    cot     the training examples that have one, with it (VM-CPT, CoT SFT)
    test    what is kept for the test

Unless the examples say it themselves, the test examples are drawn by seed; examples that share a
picture or a group stay on the same side, so that no test picture was ever trained on.

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
from data_pipelines.own_policy.folder import Entry, Folder, facts, function_form, read_folder
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
    test = choose_test(folder.task, folder.entries)
    train = [entry for entry in folder.entries if entry.example_id not in test]
    kept = [entry for entry in folder.entries if entry.example_id in test]
    root = Path(settings.source).expanduser()
    form = folder.task.answer
    python = function_form(form, root) if isinstance(form, Python) else None
    with_thought = [entry for entry in train if entry.line.cot.strip()]
    total = len(folder.entries) + len(with_thought)
    done = 0

    def examples(entries: Sequence[Entry], with_cot: bool) -> Iterator[Example]:
        nonlocal done
        for entry in entries:
            yield make_example(folder, entry, with_cot=with_cot, python=python)
            done += 1
            on_progress(done, total)

    return {
        "train": examples(train, False),
        "cot": examples(with_thought, True),
        "test": examples(kept, False),
    }


def recipe(settings: OwnPolicySettings) -> dict[str, Any]:
    """What decides the data: the content of the folder, wherever it stands."""
    folder = _read(settings.source)
    return {"dataset": "own", "policy": folder.task.name, "content_sha256": folder.sha256}


def choose_test(task: Task, entries: Sequence[Entry]) -> set[str]:
    """Ids of the test examples."""
    if entries[0].line.split:
        return {entry.example_id for entry in entries if entry.line.split == "test"}
    together: DisjointSet = DisjointSet(entry.example_id for entry in entries)
    first: dict[Any, str] = {}
    for entry in entries:
        keys = [hashlib.sha256(image).hexdigest() for image in entry.images]
        for key in [*keys, *([("group", entry.line.group)] if entry.line.group else [])]:
            together.merge(entry.example_id, first.setdefault(key, entry.example_id))
    groups = [sorted(group) for group in together.subsets()]
    groups.sort(key=lambda group: _draw(task.split.seed, group[0]))
    wanted = max(1, round(task.split.test_share * len(entries)))
    test: set[str] = set()
    for group in groups:
        if len(test) < wanted and len(test) + len(group) < len(entries):
            test.update(group)
    return test


def make_example(
    folder: Folder, entry: Entry, *, with_cot: bool, python: dict[str, Any] | None
) -> Example:
    """One line of examples.jsonl as the record that every stage reads."""
    return Example(
        example_id=entry.example_id,
        images=entry.images,
        query=word_query(folder.task, entry.line),
        answer=entry.answer,
        cot=entry.line.cot.strip() if with_cot else "",
        policy_name=folder.task.name,
        policy_text=folder.policy_text,
        policy_images=folder.policy_images,
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
