"""Error anatomy: replay what a model said against the scene and the policy; name what went wrong.

A ClevrPolicy completion is replayed citation by citation. The first flaw is the cause:

    missing_section  cites, or goes to, a Condition that the policy does not have
    wrong_section    is not where the previous line, or the start, leads
    wrong_rule       the right Condition, but the policy asks something else there
    perception       the answer fits what the model says it sees, which the picture does not show
    slip             the answer does not even fit what the model says it sees
    wrong_branch     the right rule and answer, but the policy goes on otherwise from there
    incomplete       a line lacks its answer or consequence, or the last one ends in no Case
    no_reasoning     no Condition is cited
    other_answer     the boxed answer is not the Case that the reasoning ends in
    format           nothing is boxed: there is no answer to be right or wrong

A right answer is `right`, or `right_but_flawed` when the reasoning has a flaw. Nothing else exists:
a completion without any of these flaws has the right answer, which a test proves.

A GTAPolicy call has: format, no_call (boxed, but not a tool call), wrong_tool, wrong_version (the
right tool), argument_missing, argument_unknown, wrong_argument (values compared exactly or as
numbers, boxes that overlap less than half), other_words (texts that differ; the grader says by how
much). Fields are counted by name. A call without a flaw whose box or text is not the gold one is
`partly_right`. Any other task has `right`, `partly_right`, `wrong`, `format`.

In: Examples and the records of `questions.py`. Out: cause, place and flaws of each; counts of all.

Source: paper section 5 (branching error) and its error analysis.
Next: trimpi_jax/evaluators/recital.py
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.answer_forms import normalize
from data_pipelines.clevr_policy.tree import Case, Condition
from data_pipelines.clevr_policy.wording import answer
from data_pipelines.example import Example
from trimpi_jax.evaluators.branching import branching_error
from trimpi_jax.evaluators.thoughts import (
    Citation,
    Thought,
    boxed_answer,
    conditions_of,
    has_tree,
    having,
    parse_thought,
    scene_of,
)
from trimpi_jax.grading.tool_calls import bbox_score, expression_score, parse_call

RIGHT = ("right", "right_but_flawed")
TOO_LONG = "prompt_too_long"
MIN_OVERLAP = 0.5  # intersection over union that counts as found: PASCAL VOC

_VERSION = re.compile(r"_v\d+$")

Flaws = list[tuple[int, str]]  # (how-manieth citation from 1; 0 = none in particular, kind)


def dissect(example: Example, record: dict[str, Any]) -> dict[str, Any]:
    """What became of one completion: `cause`, `step` of it, all `flaws`, and numbers of its task.

    Args:
        example: the question.
        record: completion, accuracy and format, as `Evaluator.ask` gives them.
    """
    text, right = record["completion"], record["accuracy"] == 1.0
    facts: dict[str, Any] = {}
    flaws: Flaws = []
    if record["format"] == TOO_LONG:
        return {"cause": TOO_LONG, "step": 0, "flaws": {}}
    if has_tree(example):
        thought = parse_thought(text)
        flaws = replay(example, thought, boxed_answer(text))
        facts = _seeing(thought.seen, scene_of(example))
    elif _is_tool_call(example):
        flaws, facts = _compare_calls(example, text)
    if boxed_answer(text) is None:
        flaws = [(0, "format"), *(flaw for flaw in flaws if flaw[1] != "format")]
    if right:
        cause, step = ("right_but_flawed" if flaws else "right"), 0
    elif flaws:
        step, cause = flaws[0]
    else:
        cause, step = ("partly_right" if record["accuracy"] > 0 else "wrong"), 0
    counts = dict(collections.Counter(kind for _, kind in flaws))
    return {"cause": cause, "step": step, "flaws": counts, **facts}


def replay(example: Example, thought: Thought, boxed: str | None) -> Flaws:
    """The flaws of a ClevrPolicy chain of thought in order; [] = it follows the policy throughout.

    After a flaw the replay goes on from what the model said, so that one mistake is not counted as
    many.
    """
    conditions = conditions_of(example)
    focus: tuple[str, ...] = scene_of(example)
    own_focus = thought.seen
    expected: str | None = "1"
    flaws: Flaws = []
    for step, cited in enumerate(thought.citations, start=1):
        condition = conditions.get(cited.section)
        if condition is None:
            flaws.append((step, "missing_section"))
        else:
            if cited.section != expected:
                flaws.append((step, "wrong_section"))
            if (cited.attribute, cited.value) != (condition.attribute, condition.value):
                flaws.append((step, "wrong_rule"))
        if cited.attribute and cited.value and cited.answer is not None:
            matching = having(focus, cited.attribute, cited.value)
            own = None if own_focus is None else having(own_focus, cited.attribute, cited.value)
            if cited.answer != bool(matching):
                fits = own is None or cited.answer == bool(own)
                flaws.append((step, "perception" if fits else "slip"))
            if cited.answer:
                focus = matching or focus
                own_focus = own or own_focus
        if flaw := _consequence_flaw(cited, condition, conditions):
            flaws.append((step, flaw))
        expected = cited.goes_to
    if not thought.citations:
        flaws.append((0, "no_reasoning"))
        return flaws
    last = thought.citations[-1]
    if last.case is None and (not flaws or flaws[-1] != (len(thought.citations), "incomplete")):
        flaws.append((len(thought.citations), "incomplete"))
    if last.case is not None and boxed is not None and normalize(boxed) != answer(last.case):
        flaws.append((len(thought.citations), "other_answer"))
    return flaws


def summarize_anatomy(
    examples: Sequence[Example], records: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Counts over all completions; `found` is what `dissect` gave for each.

    `causes` adds up to `count`; `flaws` counts the completions that have each kind at all; `steps`
    is cause -> citation number -> count. With scenes: how many are told exactly, and the objects
    told rightly of those told and of those there. With tool calls: `fields`, name -> [wrong, met].
    """
    steps: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for one in found:
        if one["step"]:
            steps[one["cause"]][one["step"]] += 1
    fields: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for one in found:
        for name, wrong in one.get("fields", {}).items():
            fields[name][0] += wrong
            fields[name][1] += 1
    summary: dict[str, Any] = {
        "count": len(found),
        "wrong": sum(one["cause"] not in RIGHT for one in found),
        "causes": dict(collections.Counter(one["cause"] for one in found).most_common()),
        "flaws": dict(
            collections.Counter(kind for one in found for kind in one["flaws"]).most_common()
        ),
        "steps": {cause: dict(sorted(counts.items())) for cause, counts in sorted(steps.items())},
    }
    if fields:
        summary["fields"] = dict(sorted(fields.items()))
    if seen := [one for one in found if "objects" in one]:
        summary["scenes"] = {
            "count": len(seen),
            "told": sum(one["objects_told"] is not None for one in seen),
            "exact": sum(
                one["objects_right"] == one["objects"] == one["objects_told"] for one in seen
            ),
            "objects": sum(one["objects"] for one in seen),
            "objects_told": sum(one["objects_told"] or 0 for one in seen),
            "objects_right": sum(one["objects_right"] for one in seen),
        }
        texts = [record["completion"] for record in records]
        summary["branching"] = branching_error(examples, texts)
    return summary


def describe_anatomy(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the summary says in the terminal: causes, what is seen, the branching error."""
    count = summary["count"]
    lines = [
        (cause, f"{100 * number / count:.1f} % ({number}/{count})")
        for cause, number in summary["causes"].items()
    ]
    if scenes := summary.get("scenes"):
        lines += [
            ("scenes told exactly", f"{scenes['exact']}/{scenes['count']}"),
            (
                "objects told rightly, of those there",
                f"{scenes['objects_right']}/{scenes['objects']}",
            ),
        ]
    if (branching := summary.get("branching")) and branching["count"]:
        error, scaled = branching["mean_absolute_difference"], branching["per_2000"]
        lines += [
            ("branching error, of 2,000 answers", f"{error:.2f}, {scaled:.2f}"),
            (
                "answers that cite a section that does not exist",
                f"{branching['answers_with_missing_section']}/{branching['count']}",
            ),
        ]
    lines += [
        (f"argument {name}, wrong", f"{wrong}/{met}")
        for name, (wrong, met) in summary.get("fields", {}).items()
    ]
    return lines


def _consequence_flaw(
    cited: Citation, condition: Condition | None, conditions: dict[str, Condition]
) -> str | None:
    if cited.answer is None or (cited.goes_to is None and cited.case is None):
        return "incomplete"
    if cited.goes_to is not None and cited.goes_to not in conditions:
        return "missing_section"
    if condition is None:  # told already
        return None
    child = condition.if_true if cited.answer else condition.if_false
    right = (
        cited.case == child.number if isinstance(child, Case) else cited.goes_to == child.section
    )
    return None if right else "wrong_branch"


def _seeing(seen: tuple[str, ...] | None, scene: tuple[str, ...]) -> dict[str, Any]:
    both = collections.Counter(seen or ()) & collections.Counter(scene)
    return {
        "objects": len(scene),
        "objects_told": None if seen is None else len(seen),
        "objects_right": both.total(),
    }


def _is_tool_call(example: Example) -> bool:
    return example.meta.get("answer_form", {}).get("form") == "gta_call"


def _compare_calls(example: Example, text: str) -> tuple[Flaws, dict[str, Any]]:
    said, _ = parse_call(boxed_answer(text))
    gold, _ = parse_call(example.answer)
    if gold is None:
        raise ValueError(f"example {example.example_id}: its answer is no tool call")
    if said is None:
        return [(0, "no_call")], {}
    flaws: Flaws = []
    if _VERSION.sub("", said[0]) != _VERSION.sub("", gold[0]):
        flaws.append((0, "wrong_tool"))
    elif said[0] != gold[0]:
        flaws.append((0, "wrong_version"))
    form = example.meta["answer_form"]
    defaults = form.get("defaults", {}).get(_VERSION.sub("", gold[0]), {})
    fields: dict[str, bool] = {}
    kinds: list[str] = []
    for name in dict.fromkeys((*gold[1], *said[1])):
        problem = _argument_flaw(
            form.get("fields", {}).get(name, "exact"),
            {**defaults, **said[1]}.get(name, _ABSENT),
            {**defaults, **gold[1]}.get(name, _ABSENT),
        )
        fields[name] = problem is not None
        if problem:
            kinds.append(problem)
    order = ("argument_missing", "argument_unknown", "wrong_argument", "other_words")
    flaws += [(0, kind) for kind in sorted(kinds, key=order.index)]
    return flaws, {"fields": fields}


_ABSENT = object()


def _argument_flaw(kind: str, said: Any, gold: Any) -> str | None:
    if said is _ABSENT:
        return "argument_missing"
    if gold is _ABSENT:
        return "argument_unknown"
    if kind == "expression":
        return None if expression_score(said, gold) == 1.0 else "wrong_argument"
    if kind == "bbox":
        return None if bbox_score(said, gold) >= MIN_OVERLAP else "wrong_argument"
    same = type(said) is type(gold) and said == gold
    if isinstance(said, str) and isinstance(gold, str):
        same = normalize(said) == normalize(gold)
        if kind == "text":
            return None if same else "other_words"
    return None if same else "wrong_argument"
