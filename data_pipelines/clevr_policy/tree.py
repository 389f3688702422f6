"""A ClevrPolicy decision tree: sample one, follow it through a scene, sample its override.

A node asks whether any object *in focus* has `attribute = value`. A yes narrows the focus to the
objects that have it and retires the attribute; a no leaves the focus and retires only that value
for the path. A node where nothing can be asked any more, or at the full depth, is a response node
("Case k"). These rules give 4 / 16 / 55 distinct responses for depth 2 / 4 / 6, as in the paper.

        Condition 1 ──yes── Condition 1.1 ──yes── Case 3
             │                   └─no──── Case 1
             └─no── Condition 1.2 ──yes── Case 4
                                 └─no──── Case 2

Source: paper section 2.
Next: data_pipelines/clevr_policy/wording.py
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.clevr.scene import ATTRIBUTES, Scene, SceneObject

MAX_DEPTH = 10  # sections of deeper trees get names no reader can follow


@dataclasses.dataclass(frozen=True)
class Case:
    """A response node: answer `Case number`."""

    number: int


@dataclasses.dataclass(frozen=True)
class Condition:
    """A decision node with its two children."""

    section: str  # "1", "1.2.1": the true child of s is s.1, the false child s.2
    attribute: str
    value: str
    if_true: Condition | Case
    if_false: Condition | Case


@dataclasses.dataclass(frozen=True)
class PolicyTree:
    """A named policy. `depth` is the number of questions on the longest path."""

    name: str
    depth: int
    root: Condition
    num_cases: int


@dataclasses.dataclass(frozen=True)
class Visit:
    """One step of a path: the node, the answer, and the objects in focus afterwards."""

    condition: Condition
    answer: bool
    focus: tuple[SceneObject, ...]


def sample_tree(rng: np.random.Generator, name: str, depth: int) -> PolicyTree:
    """A random tree; case numbers 1..n are shuffled over its leaves.

    An attribute is drawn uniformly among those not retired on the path, then one of its values
    that was not answered "no" before, so rare attributes are as likely as common ones.

    Raises:
        ValueError: depth outside 1..MAX_DEPTH.
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"tree depth must be in 1..{MAX_DEPTH}, got {depth}")
    open_values = {attribute: tuple(values) for attribute, values in ATTRIBUTES.items()}
    root = _sample_node(rng, "1", depth, open_values)
    assert isinstance(root, Condition)
    numbers = iter((rng.permutation(_count_cases(root)) + 1).tolist())
    root = _number_cases(root, numbers)
    assert isinstance(root, Condition)
    return PolicyTree(name, depth, root, _count_cases(root))


def follow(tree: PolicyTree, objects: Sequence[SceneObject]) -> tuple[list[Visit], int]:
    """Walk the tree over the objects of a scene: (visits in order, case number)."""
    focus = tuple(objects)
    visits: list[Visit] = []
    node: Condition | Case = tree.root
    while isinstance(node, Condition):
        matching = tuple(o for o in focus if getattr(o, node.attribute) == node.value)
        focus = matching or focus
        visits.append(Visit(node, bool(matching), focus))
        node = node.if_true if matching else node.if_false
    return visits, node.number


def iter_conditions(node: Condition | Case) -> Iterator[Condition]:
    """Decision nodes in reading order: a node, its true side, its false side."""
    if isinstance(node, Condition):
        yield node
        yield from iter_conditions(node.if_true)
        yield from iter_conditions(node.if_false)


def case_numbers(node: Condition | Case) -> list[int]:
    """Case numbers of the leaves in reading order."""
    if isinstance(node, Case):
        return [node.number]
    return case_numbers(node.if_true) + case_numbers(node.if_false)


def sample_override(rng: np.random.Generator, tree: PolicyTree) -> PolicyTree:
    """A fresh tree under the same name and depth, different from `tree` (Policy Override)."""
    while (fresh := sample_tree(rng, tree.name, tree.depth)).root == tree.root:
        pass
    return fresh


def case_shares(tree: PolicyTree, scenes: Sequence[Scene]) -> dict[int, float]:
    """Share of scenes that end in each case, for every case of the tree."""
    counts = dict.fromkeys(sorted(case_numbers(tree.root)), 0)
    for scene in scenes:
        counts[follow(tree, scene.objects)[1]] += 1
    return {case: count / max(len(scenes), 1) for case, count in counts.items()}


def reachable_cases(tree: PolicyTree) -> list[int]:
    """The cases that some scene ends in, in ascending order.

    A path that answers "no" to every value of an attribute ends in a case that no scene can reach:
    where nothing is small, something is large. Every other case is reached by a scene of one object
    that fits the answers, and by as many copies of it as one likes.
    """

    def reach(node: Condition | Case, refused: dict[str, tuple[str, ...]]) -> Iterator[int]:
        if isinstance(node, Case):
            yield node.number
            return
        yield from reach(node.if_true, refused)
        no_more = (*refused.get(node.attribute, ()), node.value)
        if len(no_more) < len(ATTRIBUTES[node.attribute]):
            yield from reach(node.if_false, refused | {node.attribute: no_more})

    return sorted(reach(tree.root, {}))


def sample_balanced_tree(
    rng: np.random.Generator,
    name: str,
    depth: int,
    scenes: Sequence[Scene],
    *,
    candidates: int = 64,
) -> PolicyTree:
    """The candidate with the most cases in use on `scenes`; then the rarest most frequent case.

    A purely random tree often sends most scenes to one leaf (with few objects, "any cyan thing?"
    is mostly no), and a model that always answers that leaf would look good. A case is in use when
    it takes at least a quarter of an even share. Ties go to the earlier candidate.
    """
    trees = [sample_tree(rng, name, depth) for _ in range(candidates)]
    return min(trees, key=lambda tree: _imbalance(tree, scenes))


def _imbalance(tree: PolicyTree, scenes: Sequence[Scene]) -> tuple[int, float]:
    shares = case_shares(tree, scenes).values()
    in_use = sum(share >= 0.25 / tree.num_cases for share in shares)
    return -in_use, max(shares)


_SYLLABLES_FIRST = tuple("ba be bo da du fe fi ga go ha ka ke lo lu ma mi mo na ne".split())
_SYLLABLES_LAST = tuple("pa pe ra ri ro sa se su ta te ti to va ve vi wa ya zo zu".split())


def sample_name(rng: np.random.Generator, depth: int, *, held_out: bool) -> str:
    """A pronounceable invented name in the paper's style, for example `L2-Karitu`.

    Names fall into two halves by a hash of their letters: `held_out=True` gives names for datasets
    that a model is judged on, `held_out=False` names for the training of the base model, so no
    evaluated name can occur there.
    """
    while True:
        first = rng.choice(_SYLLABLES_FIRST)
        rest = [str(rng.choice(_SYLLABLES_LAST)) for _ in range(2)]
        letters = str(first) + "".join(rest)
        if is_held_out_name(letters) == held_out:
            return f"L{depth}-{letters.capitalize()}"


def is_held_out_name(name: str) -> bool:
    """True for names that only evaluated datasets may use; the `L2-` prefix does not matter."""
    letters = name.rpartition("-")[2].lower()
    return hashlib.sha256(letters.encode()).digest()[0] % 2 == 0


def is_held_out_tree(tree: PolicyTree) -> bool:
    """True for trees that only evaluated datasets may use, by a hash of all their questions.

    Looks at sections, attributes and values, not at names or case numbers: a renumbered copy of an
    evaluated tree is held out too.
    """
    questions = "|".join(f"{c.section} {c.attribute} {c.value}" for c in iter_conditions(tree.root))
    return hashlib.sha256(questions.encode()).digest()[0] % 2 == 0


def tree_to_json(node: Condition | Case) -> dict:
    """The tree as JSON-like maps; `tree_from_json` reads it back."""
    if isinstance(node, Case):
        return {"case": node.number}
    return {
        "section": node.section,
        "attribute": node.attribute,
        "value": node.value,
        "if_true": tree_to_json(node.if_true),
        "if_false": tree_to_json(node.if_false),
    }


def tree_from_json(fields: dict) -> Condition | Case:
    """Inverse of `tree_to_json`."""
    if "case" in fields:
        return Case(fields["case"])
    return Condition(
        fields["section"],
        fields["attribute"],
        fields["value"],
        tree_from_json(fields["if_true"]),
        tree_from_json(fields["if_false"]),
    )


def _sample_node(
    rng: np.random.Generator, section: str, depth: int, open_values: dict[str, tuple[str, ...]]
) -> Condition | Case:
    attributes = [attribute for attribute, values in open_values.items() if values]
    if depth == 0 or not attributes:
        return Case(0)  # numbered later
    attribute = str(rng.choice(attributes))
    value = str(rng.choice(open_values[attribute]))
    others = tuple(v for v in open_values[attribute] if v != value)
    return Condition(
        section,
        attribute,
        value,
        _sample_node(rng, f"{section}.1", depth - 1, open_values | {attribute: ()}),
        _sample_node(rng, f"{section}.2", depth - 1, open_values | {attribute: others}),
    )


def _count_cases(node: Condition | Case) -> int:
    return len(case_numbers(node))


def _number_cases(node: Condition | Case, numbers: Iterator[int]) -> Condition | Case:
    if isinstance(node, Case):
        return Case(next(numbers))
    if_true = _number_cases(node.if_true, numbers)
    return dataclasses.replace(
        node, if_true=if_true, if_false=_number_cases(node.if_false, numbers)
    )
