"""GTAPolicy as Examples: single tool calls under a policy, from the release or drawn here.

Splits
    train      steps of the training tasks, no chain of thought (Direct SFT, RL)
    cot        the same steps with their chain of thought (VM-CPT, CoT SFT)
    test       steps of other tasks
    override   the test steps under changed version rules, to be put into the prompt; the gold
               calls follow them, `meta["trained_answer"]` is what the trained policy asks for

A task is in train or in test with all its steps, so no image is in both. Tasks and profiles depend
on the seed only. The defaults are the sizes of the paper; a release with another number of steps is
refused, and the error says how many it has.

Source: paper section 3 (sizes), section 5 (override).
Next: data_pipelines/shards.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipelines.example import Example
from data_pipelines.gta_policy.catalogue import (
    PAPER_RULES,
    RuleBook,
    answer_form,
    override_rule_book,
    policy_text,
)
from data_pipelines.gta_policy.official import load_tasks
from data_pipelines.gta_policy.synthetic import make_tasks
from data_pipelines.gta_policy.tasks import Task, assign_profiles, make_examples, split_tasks

TRAIN_STEPS, TEST_STEPS = 451, 106  # paper section 3
SOURCES = ("synthetic", "official")
PROFILES = 1  # what a random number is for


@dataclasses.dataclass(frozen=True)
class GTAPolicySettings:
    """Tool calls under a policy of version rules.

    Attributes:
        source: "synthetic", drawn here, or "official", the GTA release.
        gta_dir: source official: the release folder (dataset.json, toolmeta.json, image/).
        train: training examples, which are single tool calls.
        test: test examples; the override split has as many.
        seed: other seeds give other tasks, users, splits and override rules.
        text_encoder: which model compares texts: a name of grading/text_similarity.py or a Hugging
            Face folder.
        text_layer: its hidden states that are compared, 1 = after the first layer; 0 = the last.
        text_baseline: BERTScore of unrelated texts, which becomes 0.
    """

    source: str = "synthetic"
    gta_dir: str = ""
    train: int = TRAIN_STEPS
    test: int = TEST_STEPS
    seed: int = 0
    text_encoder: str = "all-MiniLM-L6-v2-int8"
    text_layer: int = 0
    text_baseline: float = 0.0

    def __post_init__(self):
        problems = []
        if self.source not in SOURCES:
            problems.append(f"source is one of {SOURCES}, got {self.source!r}")
        if self.source == "official" and not self.gta_dir:
            problems.append("source official needs gta_dir, the folder of the GTA release")
        if self.source == "synthetic" and self.gta_dir:
            problems.append("gta_dir has no effect with source synthetic; set source official")
        if min(self.train, self.test) < 2:
            problems.append("train and test must be >= 2: no task has fewer steps")
        if self.seed < 0:
            problems.append("seed must be >= 0")
        if self.text_layer < 0:
            problems.append("text_layer must be >= 0")
        if not 0.0 <= self.text_baseline < 1.0:
            problems.append("text_baseline must be in [0, 1)")
        if problems:
            raise ValueError("GTAPolicy settings: " + "; ".join(problems))


def make_splits(
    settings: GTAPolicySettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Iterator[Example]]:
    """Split name -> Examples; `on_progress(done, total)` in steps whose tasks are made or read.

    Raises:
        ValueError: the release folder is broken (every problem is listed), or its tasks cannot be
            split as asked.
    """
    total = settings.train + settings.test
    done = 0

    def on_task(task: Task) -> None:
        nonlocal done
        done = min(total, done + len(task.steps))
        on_progress(done, total)

    if settings.source == "synthetic":
        # test first: its images keep their names when the training split grows
        test = make_tasks("test", settings.test, settings.seed, 1, on_task)
        first = 1 + sum(len(task.images) for task in test)
        train = make_tasks("train", settings.train, settings.seed, first, on_task)
    else:
        train, test = _split_release(settings, load_tasks(settings.gta_dir, on_task))
    override = override_rule_book(settings.seed)

    def generate(tasks: list[Task], book: RuleBook, with_cot: bool) -> Iterator[Example]:
        form = answer_form(
            settings.text_encoder, settings.text_layer or None, settings.text_baseline
        )
        document = policy_text(book)
        profiles = assign_profiles(tasks, np.random.default_rng([settings.seed, PROFILES]))
        for task, profile in zip(tasks, profiles, strict=True):
            yield from make_examples(
                task,
                profile,
                book,
                policy=document,
                answer_form=form,
                source=settings.source,
                with_cot=with_cot,
            )

    return {
        "train": generate(train, PAPER_RULES, False),
        "cot": generate(train, PAPER_RULES, True),
        "test": generate(test, PAPER_RULES, False),
        "override": generate(test, override, False),
    }


def recipe(settings: GTAPolicySettings) -> dict[str, Any]:
    """What decides the data, for the manifest."""
    made = {"dataset": "gta_policy", **dataclasses.asdict(settings)}
    if settings.source == "official":
        return made
    import jax
    import matplotlib
    import PIL

    from data_pipelines.clevr.renderer import LOOK

    return made | {
        "jax": jax.__version__,
        "look": LOOK,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
    }


def licence(settings: GTAPolicySettings) -> str:
    """Whose the pictures are, for the dataset card."""
    if settings.source == "official":
        return (
            "Images, requests and tool returns come from GTA (open-compass/GTA, Apache-2.0; its"
            " authors name copyright and privacy of the web images as open risks); profiles, policy"
            " and answers were generated by trimpi_jax, Apache-2.0."
        )
    return "Images, requests, policy and answers were generated by trimpi_jax, Apache-2.0."


def _split_release(settings: GTAPolicySettings, tasks: list[Task]) -> tuple[list[Task], list[Task]]:
    """Train and test tasks of the release, exactly as many steps as asked."""
    counts = [len(task.steps) for task in tasks]
    if sum(counts) != settings.train + settings.test:
        raise ValueError(
            f"{settings.gta_dir} has {len(tasks)} tasks with {sum(counts)} steps, the settings ask"
            f" for {settings.train} + {settings.test}; set train and test so that they add up to"
            f" {sum(counts)}"
        )
    rng = np.random.default_rng(settings.seed)
    train, test = split_tasks(counts, settings.test, rng)
    return [tasks[i] for i in train], [tasks[i] for i in test]
