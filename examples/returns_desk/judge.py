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
MEMBERSHIPS = ("standard", "gold")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the two policies differ in."""

    standard_days: int = 30
    gold_days: int = 60
    cracked_kitchenware: str = "Replace"
    cracked_electronics: str = "Inspect"
    cracked_wear: str = "Repair"
    scratch_without_box: str = "Store credit"
    no_box: str = "Exchange"

    def limit_days(self, membership: str) -> int:
        """Until when a return is in time."""
        return self.gold_days if membership == "gold" else self.standard_days


RULES = Rules()
# The override: the same name, other rules. CHANGES turns policy.md into its text.
CHANGED_RULES = Rules(
    standard_days=14,
    gold_days=90,
    cracked_kitchenware="Inspect",
    cracked_electronics="Replace",
    cracked_wear="Replace",
    scratch_without_box="Reject",
    no_box="Store credit",
)
CHANGES = (
    (
        "The limit is 30 days for standard members and 60 days for gold members.",
        "The limit is 14 days for standard members and 90 days for gold members.",
    ),
    (
        "a standard member on day 30 is in time, on day 31 late",
        "a standard member on day 14 is in time, on day 15 late",
    ),
    (
        "goods cannot be sold as second choice, so decide Store credit.",
        "goods cannot be sold as second choice, so decide Reject.",
    ),
    (
        "Decide Replace. The cracked piece is\n  destroyed at the desk.",
        "Decide Inspect. The cracked piece is\n  kept for the maker.",
    ),
    (
        "Nobody plugs it in. Decide Inspect, and the\n  workshop looks at it first.",
        "Nobody plugs it in. Decide Replace, and the\n  old one is destroyed.",
    ),
    ("a tear can be sewn. Decide Repair.", "a tear cannot be sewn. Decide Replace."),
    (
        "The goods need a new one before they can be sold. Decide Exchange.",
        "The goods need a new one before they can be sold. Decide Store credit.",
    ),
)


def change_policy(text: str) -> str:
    """policy.md under CHANGED_RULES.

    Raises:
        ValueError: a sentence to change is not there just once.
    """
    for old, new in CHANGES:
        if text.count(old) != 1:
            raise ValueError(f"policy.md should have this once: {old!r}")
        text = text.replace(old, new)
    return text


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


def judge(case: Case, rules: Rules = RULES) -> tuple[str, list[Step]]:
    """(decision, the sections that were visited)."""
    item, gold = case.item, case.membership == "gold"
    kind, limit = KINDS[item.goods], rules.limit_days(case.membership)
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
        return say("4", kind, getattr(rules, f"cracked_{kind}")), steps
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
        decision = rules.scratch_without_box if item.box == "none" else "Partial refund"
        say("3", f"scratch, {_box(item)}", decision)
        return decision, steps
    say("3", "no damage", "Section 6")
    if item.seal == "torn" and kind == "electronics":
        decision = say("6", "electronics, torn seal", "Inspect")
    elif item.box == "none":
        decision = say("6", "no box", rules.no_box)
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
