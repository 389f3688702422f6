"""Questions about the tree by hand, and texts as a model may write them: right, bent, hostile."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from data_pipelines.clevr.scene import ATTRIBUTES, Scene
from data_pipelines.clevr_policy.dataset import make_example
from data_pipelines.clevr_policy.document import make_document
from data_pipelines.clevr_policy.tree import PolicyTree
from data_pipelines.example import Example, completion_text
from data_pipelines.gta_policy.catalogue import PAPER_RULES, answer_form, call_json, policy_text
from tests.data_pipelines.policy_reader import BLUE_SPHERE, RED_CUBE, TREE, make_object

SECTIONS = ("1", "1.1", "1.2", "1.3", "1.1.1", "7", "1.2.2.2.2")


def ask_about(*objects, tree: PolicyTree = TREE, crops=()) -> Example:
    """A question about a scene; `red cube, blue sphere` when none is given: 1 yes, 1.1 yes."""
    scene = Scene("s", objects or (RED_CUBE, BLUE_SPHERE))
    return make_example(make_document(tree, crops), scene, b"", with_cot=False)


def gold(example: Example) -> str:
    return completion_text(example.meta["gold_cot"], example.answer)


def ask_call(name="OCR_v4", text_encoder="none", **arguments) -> Example:
    return Example(
        example_id="t/step1",
        images=(),
        query="?",
        answer=call_json(name, arguments or {"image": "image/image_1.jpg"}),
        policy_name="GTAPolicy",
        policy_text=policy_text(PAPER_RULES),
        meta={"answer_form": answer_form(text_encoder)},
    )


def call(name, **arguments) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<think>So I call {name}.</think>\\boxed{{{call}}}"


objects = st.lists(
    st.tuples(*(st.sampled_from(ATTRIBUTES[n]) for n in ("color", "size", "material", "shape"))),
    min_size=1,
    max_size=5,
).map(lambda rows: [make_object(" ".join(row)) for row in rows])

_piece = st.one_of(
    st.sampled_from(
        [
            *(f"Condition {section}: " for section in SECTIONS),
            *(f"go to Condition {section}\n" for section in SECTIONS),
            *(f"respond with Case {n}" for n in (1, 2, 3, 4, 5)),
            "any color red? ", "any color red (pictured)? ", "any shape cube? ", "any size small? ",
            "none. ", "True: ", "False: ", "I see: red small metal cube.\n", "I see: ", "<think>",
            "</think>", "\\boxed{", "\\boxed{Case 3}", "}", "{", "Rule 3: ", "Rule 99: x\n", "\n",
            '{"name": "OCR_v4", "arguments": {"image": ["a"]}}', "\\boxed{null}", "Condition 1.",
            "\\boxed{any color red? True: go to Condition 1.1. False: respond with Case 2}",
        ]
    ),
    st.text(max_size=12),
)  # fmt: skip
model_texts = st.one_of(st.text(max_size=60), st.lists(_piece, max_size=25).map("".join))
"""What a model may say: loose texts, and the pieces of right answers in any order."""


@st.composite
def bent_completions(draw) -> tuple[Example, str]:
    """A question and its gold completion with some words changed for others of their kind."""
    example = ask_about(*draw(objects))
    text = gold(example)
    words = ("red", "cube", "blue", "small", "large", "True", "False", "none", "color", "shape",
             "Condition 1.1", "Condition 1.2", "Condition 1:", "Case 1", "Case 2", "Case 3",
             "Case 4", "\\boxed{", "\n", " any", "}")  # fmt: skip
    for _ in range(draw(st.integers(0, 3))):
        old = draw(st.sampled_from([word for word in words if word in text] or ["e"]))
        places = [i for i in range(len(text)) if text.startswith(old, i)]
        if places:
            at = draw(st.sampled_from(places))
            text = text[:at] + draw(st.sampled_from((*words, ""))) + text[at + len(old) :]
    return example, text
