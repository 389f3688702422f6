"""Policy Referral, exact: is what a chain of thought says about the policy true?

Every citation of a Condition is held against the tree. Three things can be true of it:

    section    such a Condition exists
    question   the policy asks this there: attribute and value
    branch     from there, after the answer that it gives, the policy says to go on to this
               Condition ("branch") or to respond with this Case ("case")

    referral = 10 * (sum over citations of the share that is true) / citations      0..10

A reasoning that cites nothing says nothing true: 0, and it is counted. Whether the answers fit the
picture is perception, not referral: `answer` tells it beside the score, as does `pictured` for the
values that the policy shows by a picture. A policy of numbered rules ("Rule 3: ...", GTAPolicy, or
a user's own) is held against its text: the rule exists, and says that. There, a step that no rule
decides has nothing to cite: where the gold reasoning cites nothing either, there is no score.

In: Examples and completions. Out: a score with its parts for each, and their summary.

Source: paper section 5 (Policy Referral, 0-10); an LLM judges it in evaluators/judge.py.
Next: trimpi_jax/evaluators/judge.py
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.clevr_policy.tree import Case
from data_pipelines.example import Example
from trimpi_jax.evaluators.thoughts import (
    Citation,
    conditions_of,
    has_tree,
    having,
    parse_thought,
    reasoning_of,
    scene_of,
)

BEST = 10.0  # paper section 5: referral is scored 0-10

_RULE = re.compile(r"\bRule (\d{1,4}): *([^\n]*)")


def can_check_exactly(example: Example) -> bool:
    """Whether the policy is a tree, or has numbered rules to hold citations against."""
    return has_tree(example) or bool(_RULE.search(example.policy_text))


def score_referral(example: Example, text: str) -> dict[str, Any]:
    """Score 0..10 (None = there was nothing to cite) and parts of one completion.

    `parts` is name -> [true, checked]; `cited` is how many citations there are; `wrong` tells the
    first few that are not true, in words.

    Raises:
        ValueError: the Example has neither a tree nor numbered rules; ask `can_check_exactly`.
    """
    if has_tree(example):
        return _score_tree(example, text)
    if can_check_exactly(example):
        return _score_rules(example, text)
    raise ValueError(
        f"example {example.example_id}: its policy has no tree and no numbered rules to check"
        " citations against; use the judge"
    )


def summarize_referral(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean score, how many cite nothing, every part as true / checked, the scores in tenths.

    `count` are those with a score; those that had nothing to cite are counted apart.
    """
    nothing = sum(score["score"] is None for score in scores)
    scores = [score for score in scores if score["score"] is not None]
    parts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for score in scores:
        for name, (true, checked) in score["parts"].items():
            parts[name][0] += true
            parts[name][1] += checked
    return {
        "count": len(scores),
        "nothing_to_cite": nothing,
        "score": sum(s["score"] for s in scores) / len(scores) if scores else None,
        "cites_nothing": sum(s["cited"] == 0 for s in scores),
        "citations": sum(s["cited"] for s in scores),
        "all_true": sum(s["score"] == BEST for s in scores),
        "parts": dict(sorted(parts.items())),
        "histogram": dict(sorted(collections.Counter(int(s["score"]) for s in scores).items())),
    }


def describe_referral(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the summary says in the terminal."""
    count = summary["count"]
    lines = [
        ("referral, 0-10", f"{summary['score']:.2f} (mean of {count})" if count else "nothing"),
        ("answers wholly true", f"{summary['all_true']}/{count}"),
        ("answers that cite nothing", f"{summary['cites_nothing']}/{count}"),
    ]
    if summary["nothing_to_cite"]:
        lines.append(("left out: no rule to cite", str(summary["nothing_to_cite"])))
    return lines + [
        (f"{name}, true", f"{true}/{checked}") for name, (true, checked) in summary["parts"].items()
    ]


def _score_tree(example: Example, text: str) -> dict[str, Any]:
    conditions, shown = conditions_of(example), set(example.meta.get("shown", ()))
    parts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    focus = scene_of(example)
    wrong: list[str] = []
    shares: list[float] = []

    def check(name: str, true: bool, told: str) -> bool:
        parts[name][0] += true
        parts[name][1] += 1
        if not true:
            wrong.append(told)
        return true

    for cited in parse_thought(text).citations:
        condition = conditions.get(cited.section)
        if not check("section", condition is not None, f"no Condition {cited.section}"):
            shares.append(0.0)
            continue
        assert condition is not None
        asks = f"Condition {cited.section} asks any {condition.attribute} {condition.value}"
        true = 1 + check(
            "question",
            (cited.attribute, cited.value) == (condition.attribute, condition.value),
            f"{asks}, not {cited.attribute} {cited.value}",
        )
        name, leads, told = _check_consequence(cited, condition.if_true, condition.if_false)
        true += check(name, leads, f"Condition {cited.section}: {told}")
        shares.append(true / 3)
        if shown:
            parts["pictured"][0] += cited.pictured == (cited.section in shown)
            parts["pictured"][1] += 1
        if cited.answer is not None and cited.attribute and cited.value:
            matching = having(focus, cited.attribute, cited.value)
            parts["answer"][0] += cited.answer == bool(matching)
            parts["answer"][1] += 1
            focus = (matching or focus) if cited.answer else focus
    return _result(shares, parts, wrong)


def _check_consequence(cited: Citation, if_true: Any, if_false: Any) -> tuple[str, bool, str]:
    """(branch or case, whether it is what the policy says, what is wrong with it)."""
    name = "case" if cited.case is not None else "branch"
    if cited.answer is None:
        return name, False, "neither True nor False"
    child = if_true if cited.answer else if_false
    if isinstance(child, Case):
        right, expected = cited.case == child.number, f"Case {child.number}"
        name = "case"
    else:
        right, expected = cited.goes_to == child.section, f"Condition {child.section}"
    if cited.case is not None:
        said = f"Case {cited.case}"
    else:
        said = f"Condition {cited.goes_to}" if cited.goes_to else "nowhere"
    return name, right, f"{cited.answer} leads to {expected}, not to {said}"


def _score_rules(example: Example, text: str) -> dict[str, Any]:
    rules = {number: _plain(said) for number, said in _RULE.findall(example.policy_text)}
    parts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    wrong: list[str] = []
    shares: list[float] = []
    for number, said in _RULE.findall(reasoning_of(text)):
        exists = number in rules
        says = exists and _plain(said).startswith(rules[number])
        parts["section"][0] += exists
        parts["section"][1] += 1
        if exists:
            parts["question"][0] += says
            parts["question"][1] += 1
        if not says:
            wrong.append(f"Rule {number} says otherwise" if exists else f"no Rule {number}")
        shares.append((exists + says) / 2)
    found = _result(shares, parts, wrong)
    if not shares and not _RULE.search(example.meta.get("gold_cot") or "Rule 0: no gold reasoning"):
        found["score"] = None
    return found


def _result(shares: list[float], parts: dict[str, list[int]], wrong: list[str]) -> dict[str, Any]:
    return {
        "score": BEST * sum(shares) / len(shares) if shares else 0.0,
        "cited": len(shares),
        "parts": dict(parts),
        "wrong": wrong[:8],
    }


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()
