"""A tree by hand, scenes by hand, and a reader of policy texts that knows nothing of the writer.

Condition 1 color red ──yes── 1.1 shape cube ──yes── Case 3
           │                        └─no──── Case 1
           └─no── 1.2 size small ──yes── Case 4
                        └─no──── Case 2
"""

from __future__ import annotations

import re

from data_pipelines.clevr.scene import SceneObject
from data_pipelines.clevr_policy.tree import Case, Condition, PolicyTree

TREE = PolicyTree(
    "L2-Karitu",
    2,
    Condition(
        "1",
        "color",
        "red",
        Condition("1.1", "shape", "cube", Case(3), Case(1)),
        Condition("1.2", "size", "small", Case(4), Case(2)),
    ),
    4,
)

_SECTION = re.compile(
    r"# Condition (?P<section>[\d.]+): any (?P<attribute>\w+) (?P<value>\w+)\?\n"
    r"- True: (?P<yes>.*)\n- False: (?P<no>.*)"
)


def make_object(words: str, column: float = 50.0) -> SceneObject:
    """`make_object("red small metal cube")`, standing anywhere."""
    color, size, material, shape = words.split()
    return SceneObject(shape, color, size, material, (0.0, 0.0, 0.35), 0.0, (column, 60.0, 11.0))


RED_CUBE = make_object("red small metal cube", 120.0)
BLUE_SPHERE = make_object("blue large rubber sphere", 40.0)
RED_CYLINDER = make_object("red large rubber cylinder", 80.0)
GREEN_CUBE = make_object("green small rubber cube", 10.0)


def read_policy(text: str) -> Condition | Case:
    """The tree that a policy document describes, found by following its own references."""
    sections = {match["section"]: match for match in _SECTION.finditer(text)}

    def read(reference: str) -> Condition | Case:
        word, number = reference.split()[-2:]
        if word == "Case":
            return Case(int(number))
        match = sections[number]
        return Condition(
            number, match["attribute"], match["value"], read(match["yes"]), read(match["no"])
        )

    return read("start at Condition 1")
