r"""From a tree and a scene to words: policy text, query, chain of thought, answer.

    policy   The policy of L2-Karitu. Start at Condition 1 with every object in focus. ...
             # Condition 1: any color red?
             - True: go to Condition 1.1
             - False: respond with Case 2
    query    According to the policy L2-Karitu, what should be the response for the given image? ...
    cot      I see: red small metal cube A, blue large rubber sphere B.
             Condition 1: any color red? A. True: go to Condition 1.1
             Condition 1.1: any shape cube? A. True: respond with Case 3
    answer   Case 3

In the -M variant the values of some conditions ("shown") are pictures inside the policy, not words;
the chain of thought names the value that it sees there:

    policy   # Condition 1: any color <image>?
    cot      Condition 1: any color red (pictured)? A. True: go to Condition 1.1

A line of the chain of thought repeats the policy's words as they stand, with what is seen between
the question and its consequence: to follow a policy is then to copy the right lines of it, which is
what attention learns first.

The chain of thought names the objects first, so that seeing and reasoning can be told apart when an
answer is wrong, and gives each a letter, by which the Conditions' lines call it: to say which
objects match is then one token each. (With the objects' words in place of letters a small model
had learned to follow the tree and to see, and after 90,000 questions still not to filter.) It names
them by colour, not by place: what a model attends to in an image is
content, and Qwen2.5-VL's positions are relative, so "the next colour" is far easier to learn for a
small model than "the next one to the right". Then it visits each Condition of the path in order,
says which objects match, narrows the focus on a yes and names the next Condition.

Source: paper section 2 (style; wording ours).
Next: data_pipelines/clevr_policy/dataset.py
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence

from data_pipelines.clevr.scene import ATTRIBUTES, SceneObject
from data_pipelines.clevr_policy.tree import (
    Case,
    Condition,
    PolicyTree,
    follow,
    iter_conditions,
)
from data_pipelines.example import IMAGE_MARK

FORMAT_INSTRUCTION = (
    "Think inside <think></think> and put the final answer inside \\boxed{}."  # paper section 2
)


LETTERS = (*string.ascii_uppercase, *(2 * letter for letter in string.ascii_uppercase))
SHOWN_INSTRUCTION = (
    " A value given as a picture is that of the object in it; all pictures have the same scale."
)


def policy_text(
    tree: PolicyTree, shown: Collection[str] = (), order: Sequence[Condition] = ()
) -> str:
    """The policy document of a tree: instruction, name, one section per decision node.

    `shown` holds the sections whose value is a picture: IMAGE_MARK stands in its place, and the
    pictures come in the order of the sections. `order`: all decision nodes as they shall stand
    below each other; without it, in reading order.
    """
    nodes = order or tuple(iter_conditions(tree.root))
    sections = [section_text(node, node.section in shown) for node in nodes]
    instruction = (
        f"The policy of {tree.name}. Start at Condition 1 with every object in focus."
        " After True only the matching objects stay in focus; after False the focus stays."
    )
    return "\n".join([instruction + (SHOWN_INSTRUCTION if shown else ""), *sections])


def section_text(node: Condition, shown: bool = False) -> str:
    """The section of a decision node, as it stands in the policy."""
    value = IMAGE_MARK if shown else node.value
    return (
        f"# Condition {node.section}: any {node.attribute} {value}?\n"
        f"- True: {_go_to(node.if_true)}\n- False: {_go_to(node.if_false)}"
    )


def line_text(node: Condition, verdict: bool, seen: str = "", shown: bool = False) -> str:
    """The line of a chain of thought that visits a decision node: question, seen, consequence."""
    value = f"{node.value} (pictured)" if shown else node.value
    child = node.if_true if verdict else node.if_false
    question = f"Condition {node.section}: any {node.attribute} {value}?"
    return f"{question}{seen and f' {seen}.'} {verdict}: {_go_to(child)}"


def query(policy_name: str) -> str:
    """The user's question; it names the policy and never repeats it."""
    return (
        f"According to the policy {policy_name}, what should be the response for the given image?"
        f" {FORMAT_INSTRUCTION}"
    )


def describe_object(thing: SceneObject) -> str:
    """`red small metal cube`."""
    return f"{thing.color} {thing.size} {thing.material} {thing.shape}"


def describe_objects(objects: Sequence[SceneObject]) -> str:
    """All objects in naming order, separated by commas."""
    return ", ".join(describe_object(thing) for thing in in_naming_order(objects))


def list_objects(ordered: Sequence[SceneObject]) -> str:
    """Objects in their order, each with the letter that it is called by."""
    return ", ".join(f"{describe_object(o)} {LETTERS[i]}" for i, o in enumerate(ordered))


def call_objects(ordered: Sequence[SceneObject], chosen: Collection[SceneObject]) -> str:
    """The letters of the chosen ones among objects that `list_objects` has listed."""
    numbers = {id(thing) for thing in chosen}
    return ", ".join(LETTERS[i] for i, thing in enumerate(ordered) if id(thing) in numbers)


def in_naming_order(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """Objects by colour, then size, material and shape, each in the order of `ATTRIBUTES`."""
    return sorted(
        objects,
        key=lambda thing: tuple(
            ATTRIBUTES[name].index(getattr(thing, name))
            for name in ("color", "size", "material", "shape")
        ),
    )


def chain_of_thought(
    tree: PolicyTree, objects: Sequence[SceneObject], shown: Collection[str] = ()
) -> str:
    """What goes between `<think>` and `</think>` for these objects; `shown` as in `policy_text`."""
    visits, _ = follow(tree, objects)
    ordered = in_naming_order(objects)
    lines = [f"I see: {list_objects(ordered)}."]
    for visit in visits:
        matching = call_objects(ordered, visit.focus) if visit.answer else "none"
        shown_here = visit.condition.section in shown
        lines.append(line_text(visit.condition, visit.answer, matching, shown_here))
    return "\n".join(lines)


def answer(case: int) -> str:
    """The canonical answer of a case number."""
    return f"Case {case}"


def _go_to(node: Condition | Case) -> str:
    if isinstance(node, Case):
        return f"respond with {answer(node.number)}"
    return f"go to Condition {node.section}"
