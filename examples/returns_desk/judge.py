"""The rules of policy.md as code: which decision a case gets, and the reasoning that leads there.

The policy document and this file say the same; tests/examples/test_returns_desk.py holds them
together. The decision follows from the photo (what, damage, seal, box) and the customer's profile
(days since delivery, membership).

Next: examples/returns_desk/make.py
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from examples.returns_desk.draw import Item

DECISIONS = (
    "Full refund",
    "Partial refund",
    "Exchange",
    "Replace",
    "Repair",
    "Store credit",
    "Inspect",
    "Reject",
)
KINDS = {
    "mug": "kitchenware",
    "kettle": "kitchenware",
    "lamp": "electronics",
    "headphones": "electronics",
    "sneaker": "wear",
    "backpack": "wear",
}
LIMIT_DAYS = {"standard": 30, "gold": 60}


@dataclasses.dataclass(frozen=True)
class Case:
    """A photo's content and the customer's profile."""

    item: Item
    days: int
    membership: str


class Step(NamedTuple):
    """One section of the policy, what was found there, and where it leads."""

    section: str
    finding: str
    leads_to: str  # "Section 3" or a decision


def judge(case: Case) -> tuple[str, list[Step]]:
    """(decision, the sections that were visited)."""
    item, gold = case.item, case.membership == "gold"
    kind, limit = KINDS[item.goods], LIMIT_DAYS[case.membership]
    steps: list[Step] = []

    def say(section: str, finding: str, leads_to: str) -> str:
        steps.append(Step(section, finding, leads_to))
        return leads_to

    if case.days > limit:
        say("2", f"{case.days} days, {case.membership} limit {limit}, late", "Section 7")
        if item.damage == "crack" and gold:
            decision = say("7", "cracked, gold", "Repair")
        elif item.damage == "none" and item.box == "closed":
            decision = say("7", "no damage, closed box", "Store credit")
        else:
            decision = say("7", "no other case", "Reject")
        return decision, steps
    say("2", f"{case.days} days, {case.membership} limit {limit}, in time", "Section 3")
    if item.damage == "crack":
        say("3", "crack", "Section 4")
        decision = say(
            "4", kind, {"kitchenware": "Replace", "electronics": "Inspect", "wear": "Repair"}[kind]
        )
        return decision, steps
    if item.damage == "stain":
        say("3", "stain", "Section 5")
        wear = kind == "wear"
        if wear and gold:
            decision = say("5", "wear, gold", "Store credit")
        elif wear:
            decision = say("5", "wear, standard", "Reject")
        else:
            decision = say("5", kind, "Partial refund")
        return decision, steps
    if item.damage == "scratch":
        decision = "Store credit" if item.box == "none" else "Partial refund"
        say("3", f"scratch, {_box(item)}", decision)
        return decision, steps
    say("3", "no damage", "Section 6")
    if item.seal == "torn" and kind == "electronics":
        decision = say("6", "electronics, torn seal", "Inspect")
    elif item.box == "none":
        decision = say("6", "no box", "Exchange")
    elif item.seal == "torn" and kind == "kitchenware":
        decision = say("6", f"kitchenware, torn seal, {_box(item)}", "Exchange")
    else:
        decision = say("6", f"{kind}, {item.seal} seal, {_box(item)}", "Full refund")
    return decision, steps


def reasoning(case: Case) -> str:
    """The chain of thought: what is seen, then one line for each section that was visited."""
    item = case.item
    damage = "no damage" if item.damage == "none" else item.damage
    lines = [f"I see: {item.colour} {item.goods}, {damage}, {item.seal} seal, {_box(item)}."]
    _, steps = judge(case)
    lines += [f"Section {step.section}: {step.finding}. {_go(step.leads_to)}." for step in steps]
    return "\n".join(lines)


def _go(leads_to: str) -> str:
    return f"Go to {leads_to}" if leads_to.startswith("Section") else f"Decide {leads_to}"


def _box(item: Item) -> str:
    return "no box" if item.box == "none" else f"{item.box} box"
