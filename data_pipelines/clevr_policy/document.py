"""A policy as the document that a model reads: its tree, its text, the pictures in it.

Next: data_pipelines/clevr_policy/supply.py
"""

from __future__ import annotations

import dataclasses

from data_pipelines.clevr_policy.crops import Crop
from data_pipelines.clevr_policy.tree import PolicyTree
from data_pipelines.clevr_policy.wording import policy_text


@dataclasses.dataclass(frozen=True)
class PolicyDocument:
    """-T has no crops; in -M each crop replaces the value of its section."""

    tree: PolicyTree
    text: str
    crops: tuple[Crop, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """Sections whose value is a picture, in reading order."""
        return tuple(crop.section for crop in self.crops)

    @property
    def images(self) -> tuple[bytes, ...]:
        """The pictures in the order of their marks."""
        return tuple(crop.png for crop in self.crops)


def make_document(tree: PolicyTree, crops: tuple[Crop, ...] = ()) -> PolicyDocument:
    """The document of a tree; `crops` in reading order."""
    return PolicyDocument(tree, policy_text(tree, [crop.section for crop in crops]), crops)
