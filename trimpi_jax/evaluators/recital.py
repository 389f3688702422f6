r"""Recital: does the model know the rules when it is asked for them, apart from following them?

    continued   a question as in training, its answer begun up to a Condition on its path:
                `<think>I see: ... False: go to Condition 1.2 / Condition 1.2: any`
                -> size small? none. False: respond with Case 2
    jumped      the same, begun there at once: `<think>I see: ... / Condition 1.2: any`
    condition   what does Condition 1.2 of POLICY say?
                -> any size small? True: respond with Case 4. False: respond with Case 2
    cases       which cases can POLICY respond with?  -> Case 1, Case 2, Case 3, Case 4
    version     which version of OCR may a user of age 30, 620 credits, account_type B call?
                -> OCR_v4

The first two need no new ability, the model goes on in its own words; `jumped` tells whether it
knows a rule by its number, or only as what comes next. The others are questions that it was never
trained to answer, without a picture. What is said is scored part by part: attribute, value, the
consequence of the answer given, or both; found cases against all named ones; the version. Asked
with the policy in the prompt, the same questions tell whether a model understands them at all: an
internalized model that cannot recite may only never have been asked to.

In: Examples of a split. Out: questions as Examples; a score for each completion, and their summary.

Source: none in the paper; readers asked for it. Wording and scores are ours.
Next: trimpi_jax/evaluators/pressure.py
"""

from __future__ import annotations

import collections
import dataclasses
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
from trimpi_jax.evaluators.thoughts import boxed_answer, has_tree, parse_thought

USERS = 20  # profiles that each versioned tool is asked about; ours
SCENES = 4  # pictures that each section is begun with; ours
BEGUN = ("continued", "jumped")
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
    of_policy: dict[str, list[Example]] = collections.defaultdict(list)
    for example in examples:
        of_policy[example.policy_name].append(example)
    for own in of_policy.values():
        if has_tree(own[0]):
            questions += [*_begin_sections(own), *_ask_tree(own[0])]
        elif own[0].meta.get("task") == "gta_policy":
            questions += _ask_versions(own[0], seed)
    return questions


def score_recital(example: Example, text: str) -> dict[str, Any]:
    """`accuracy` in [0, 1] (1 = wholly right) and its `parts` of one completion."""
    said = boxed_answer(text)
    gold = example.meta["recital"]
    parts: dict[str, float] = {}
    if gold["kind"] in BEGUN:
        begun = example.meta["answer_begins"]
        cited = parse_thought(begun + text).citations[len(parse_thought(begun).citations) - 1]
        leads = f"condition {cited.goes_to}" if cited.case is None else f"case {cited.case}"
        parts["attribute"] = float(cited.attribute == gold["attribute"])
        parts["value"] = float(cited.value == gold["value"])
        expected = gold["if_true" if cited.answer else "if_false"]
        parts["consequence"] = float(cited.answer is not None and leads == expected)
    elif gold["kind"] == "condition":
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


def _begin_sections(examples: Sequence[Example]) -> Iterator[Example]:
    """Every section, behind the path that leads there and at once; scenes are those on the path."""
    for condition in iter_conditions(tree_from_json(examples[0].meta["tree"])):
        mark = f"\nCondition {condition.section}:"
        on_path = [example for example in examples if mark in example.meta["gold_cot"]]
        for i, example in enumerate(on_path[:SCENES]):
            path, _, _ = example.meta["gold_cot"].partition(mark)
            seen = path.partition("\n")[0]
            kinds = {"continued": path, "jumped": seen}
            for kind, before in kinds.items() if path != seen else [("continued", path)]:
                how = {"kind": kind, **_told(condition)}
                yield dataclasses.replace(
                    example,
                    example_id=f"recital/{example.policy_name}/{kind}-{condition.section}-{i}",
                    answer=_say(condition),
                    cot="",
                    meta=example.meta
                    | {
                        "family": f"recital, {kind}",
                        "recital": how,
                        # to the end of a token in every tokenizer: a mark may be one with " any"
                        "answer_begins": f"<think>{before}{mark} any",
                    },
                )


def _ask_tree(example: Example) -> Iterator[Example]:
    root = tree_from_json(example.meta["tree"])
    for condition in iter_conditions(root):
        yield _question(
            example,
            f"condition-{condition.section}",
            CONDITION_QUERY.format(policy=example.policy_name, section=condition.section),
            _say(condition),
            {"kind": "condition", **_told(condition)},
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


def _say(condition: Condition) -> str:
    leads = [
        f"respond with {_name(child)}" if isinstance(child, Case) else f"go to {_name(child)}"
        for child in (condition.if_true, condition.if_false)
    ]
    return f"any {condition.attribute} {condition.value}? True: {leads[0]}. False: {leads[1]}"


def _told(condition: Condition) -> dict[str, str]:
    return {
        "attribute": condition.attribute,
        "value": condition.value,
        "if_true": _name(condition.if_true).lower(),
        "if_false": _name(condition.if_false).lower(),
    }


def _name(node: Condition | Case) -> str:
    return answer(node.number) if isinstance(node, Case) else f"Condition {node.section}"
