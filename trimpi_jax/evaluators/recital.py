r"""Recital: does the model know the rules when it is asked for them, apart from following them?

    condition   what does Condition 1.2 of POLICY say?
                -> any size small? True: respond with Case 4. False: respond with Case 2
    cases       which cases can POLICY respond with?  -> Case 1, Case 2, Case 3, Case 4
    version     which version of OCR may a user of age 30, 620 credits, account_type B call?
                -> OCR_v4

Questions are made from the policies that a split is about, without any picture; what is said is
scored part by part: attribute, value, both consequences; found cases against all named ones; the
version. Asked with the policy in the prompt, the same questions tell whether a model understands
them at all: an internalized model that cannot recite may only never have been asked to.

In: Examples of a split. Out: questions as Examples; a score for each completion, and their summary.

Source: none in the paper; readers asked for it. Wording and scores are ours.
Next: trimpi_jax/evaluators/pressure.py
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.clevr_policy.tree import (
    Case,
    Condition,
    case_numbers,
    iter_conditions,
    tree_from_json,
)
from data_pipelines.clevr_policy.wording import answer
from data_pipelines.example import Example
from data_pipelines.gta_policy.catalogue import PAPER_RULES, TOOLS
from data_pipelines.gta_policy.tasks import sample_profile
from trimpi_jax.evaluators.statistics import format_rate, score_records
from trimpi_jax.evaluators.thoughts import boxed_answer, has_tree

USERS = 20  # profiles that each versioned tool is asked about
THINK = "Think inside <think></think> and put it inside \\boxed{{}}"

CONDITION_QUERY = (
    "According to the policy {policy}, what does Condition {section} say? "
    + THINK
    + " in the form: any ATTRIBUTE VALUE? True: CONSEQUENCE. False: CONSEQUENCE"
)
CASES_QUERY = (
    "According to the policy {policy}, which cases are there to respond with? Name all of them. "
    + THINK
    + " in the form: Case 1, Case 2"
)
VERSION_QUERY = (
    "According to the policy {policy}, which version of {tool} does a user of age {age} with"
    " {credits} credits and account_type {account} call? " + THINK + " in the form: {tool}_v1"
)

_ASKS = re.compile(r"\bany +(\w+) +(\w+)", re.I)
_TRUE = re.compile(r"\bTrue ?:(.*?)(?=\bFalse ?:|$)", re.I | re.S)
_FALSE = re.compile(r"\bFalse ?:(.*?)(?=\bTrue ?:|$)", re.I | re.S)
_LEADS = re.compile(r"\b(case|condition) +(\d{1,6}(?:\.\d{1,3}){0,40})", re.I)
_CASE = re.compile(r"\bcase +(\d{1,6})\b", re.I)


def make_recital(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """The questions about every policy that the Examples are about; [] = none can be asked.

    Args:
        examples: of a split whose policy was trained.
        seed: of the users that tool versions are asked for.
    """
    questions: list[Example] = []
    done: set[str] = set()
    for example in examples:
        if example.policy_name not in done:
            done.add(example.policy_name)
            if has_tree(example):
                questions += _ask_tree(example)
            elif example.meta.get("task") == "gta_policy":
                questions += _ask_versions(example, seed)
    return questions


def score_recital(example: Example, text: str) -> dict[str, Any]:
    """`accuracy` in [0, 1] (1 = wholly right) and its `parts` of one completion."""
    said = boxed_answer(text)
    gold = example.meta["recital"]
    parts: dict[str, float] = {}
    if gold["kind"] == "condition":
        asks = _ASKS.search(said or "")
        parts["attribute"] = float(bool(asks) and asks[1].lower() == gold["attribute"])
        parts["value"] = float(bool(asks) and asks[2].lower() == gold["value"])
        for name, pattern in (("if_true", _TRUE), ("if_false", _FALSE)):
            found = pattern.search(said or "")
            leads = _LEADS.search(found[1]) if found else None
            parts[name] = float(bool(leads) and f"{leads[1]} {leads[2]}".lower() == gold[name])
    elif gold["kind"] == "cases":
        named, there = {int(n) for n in _CASE.findall(said or "")}, set(gold["cases"])
        parts["cases"] = len(named & there) / len(named | there)
    else:
        parts["version"] = float((said or "").strip() == example.answer)
    return {"accuracy": sum(parts.values()) / len(parts), "parts": parts}


def summarize_recital(
    examples: Sequence[Example], scores: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Of all, and of each kind: wholly right ones, mean score, means of the parts.

    `by_guessing` is what guessing a version at random would get.
    """
    kinds: dict[str, list[tuple[Example, dict[str, Any]]]] = collections.defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        kinds[example.meta["recital"]["kind"]].append((example, score))
    summary: dict[str, Any] = {**score_records(scores), "kinds": {}}
    for kind, pairs in kinds.items():
        parts: dict[str, list[float]] = collections.defaultdict(list)
        for _, score in pairs:
            for name, value in score["parts"].items():
                parts[name].append(value)
        found = score_records([score for _, score in pairs])
        found["parts"] = {name: sum(values) / len(values) for name, values in parts.items()}
        if kind == "version":
            chances = [1 / example.meta["recital"]["versions"] for example, _ in pairs]
            found["by_guessing"] = sum(chances) / len(chances)
        summary["kinds"][kind] = found
    return summary


def describe_recital(summary: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """What the summary says in the terminal; `where`: the policy is in the prompt, or not."""
    lines = []
    for kind, found in summary["kinds"].items():
        lines.append((f"{kind}, {where}: wholly right", format_rate(found)))
        lines += [(f"{kind}: {name}", f"{100 * v:.1f} %") for name, v in found["parts"].items()]
        if "by_guessing" in found:
            lines.append((f"{kind}: by guessing", f"{100 * found['by_guessing']:.1f} %"))
    return lines


def _ask_tree(example: Example) -> Iterator[Example]:
    root = tree_from_json(example.meta["tree"])
    for condition in iter_conditions(root):
        leads = [_leads(child) for child in (condition.if_true, condition.if_false)]
        gold = {
            "kind": "condition",
            "attribute": condition.attribute,
            "value": condition.value,
            "if_true": leads[0].removeprefix("go to ").removeprefix("respond with ").lower(),
            "if_false": leads[1].removeprefix("go to ").removeprefix("respond with ").lower(),
        }
        yield _question(
            example,
            f"condition-{condition.section}",
            CONDITION_QUERY.format(policy=example.policy_name, section=condition.section),
            f"any {condition.attribute} {condition.value}? True: {leads[0]}. False: {leads[1]}",
            gold,
        )
    cases = sorted(case_numbers(root))
    yield _question(
        example,
        "cases",
        CASES_QUERY.format(policy=example.policy_name),
        ", ".join(map(answer, cases)),
        {"kind": "cases", "cases": cases},
    )


def _ask_versions(example: Example, seed: int) -> Iterator[Example]:
    for number, tool in enumerate(tool for tool in TOOLS.values() if tool.versions):
        rng = np.random.default_rng([seed, number])
        for i in range(USERS):
            user = sample_profile(rng)
            yield _question(
                example,
                f"{tool.name}-{i}",
                VERSION_QUERY.format(
                    policy=example.policy_name,
                    tool=tool.name,
                    age=user.age,
                    credits=user.credits,
                    account=user.account_type,
                ),
                PAPER_RULES.versioned_name(tool.name, user),
                {"kind": "version", "versions": tool.versions},
            )


def _question(example: Example, name: str, query: str, gold: str, how: dict[str, Any]) -> Example:
    return Example(
        example_id=f"recital/{example.policy_name}/{name}",
        images=(),
        query=query,
        answer=gold,
        policy_name=example.policy_name,
        policy_text=example.policy_text,
        policy_images=example.policy_images,
        meta={"task": "recital", "family": f"recital, {how['kind']}", "recital": how},
    )


def _leads(child: Condition | Case) -> str:
    if isinstance(child, Case):
        return f"respond with {answer(child.number)}"
    return f"go to Condition {child.section}"
