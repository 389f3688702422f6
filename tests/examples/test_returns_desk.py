"""The worked example: its policy, its judge and its pictures say the same."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

resvg_py = pytest.importorskip("resvg_py", reason="needs the examples extra (resvg-py)")

from data_pipelines.example import decode_image  # noqa: E402
from data_pipelines.own_policy.dataset import OwnPolicySettings, make_splits  # noqa: E402
from examples.returns_desk.draw import Item, draw_photo  # noqa: E402
from examples.returns_desk.judge import (  # noqa: E402
    CHANGED_RULES,
    DECISIONS,
    Case,
    change_policy,
    judge,
    reasoning,
)
from examples.returns_desk.make import DETAILS, HERE, main, write_details  # noqa: E402


def case(goods="mug", damage="none", seal="whole", box="open", days=10, membership="standard"):
    return Case(Item(goods, "red", damage, seal, box), days, membership)


# Each sentence of policy.md that decides, by hand: its number -> (case, decision)
RULES = {
    "6.4 day 30 is in time": (case(days=30), "Full refund"),
    "7.3 day 31 is late": (case(days=31), "Reject"),
    "6.4 gold until day 60": (case(days=60, membership="gold"), "Full refund"),
    "3 scratch with box": (case(damage="scratch", seal="torn"), "Partial refund"),
    "3 scratch without box": (case(damage="scratch", box="none"), "Store credit"),
    "4 kitchenware": (case("kettle", "crack"), "Replace"),
    "4 electronics": (case("lamp", "crack"), "Inspect"),
    "4 wear": (case("backpack", "crack"), "Repair"),
    "5 kitchenware": (case("mug", "stain"), "Partial refund"),
    "5 electronics": (case("headphones", "stain"), "Partial refund"),
    "5 wear, gold": (case("sneaker", "stain", membership="gold"), "Store credit"),
    "5 wear, standard": (case("sneaker", "stain"), "Reject"),
    "6.1 before 6.2": (case("lamp", seal="torn", box="none"), "Inspect"),
    "6.2": (case("lamp", box="none"), "Exchange"),
    "6.3": (case("kettle", seal="torn"), "Exchange"),
    "6.4": (case("lamp", box="closed"), "Full refund"),
    "6.4 wear may be tried on": (case("sneaker", seal="torn"), "Full refund"),
    "7.1": (case("lamp", "crack", days=61, membership="gold"), "Repair"),
    "7.1 not for standard": (case("lamp", "crack", days=61), "Reject"),
    "7.2": (case("mug", seal="torn", box="closed", days=99), "Store credit"),
    "7.3": (case("mug", days=99), "Reject"),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_judge_follows_the_document(rule):
    given, decision = RULES[rule]
    assert judge(given)[0] == decision
    assert judge(given)[1][-1].section == rule[0]


CHANGED = {  # the sentences of the override, by hand
    "day 15 is late": (case(days=15), "Reject"),
    "gold until day 90": (case(days=90, membership="gold"), "Full refund"),
    "scratch without box": (case(damage="scratch", box="none"), "Reject"),
    "cracked kitchenware": (case("mug", "crack"), "Inspect"),
    "cracked electronics": (case("lamp", "crack"), "Replace"),
    "cracked wear": (case("sneaker", "crack"), "Replace"),
    "no box": (case("mug", box="none"), "Store credit"),
}


@pytest.mark.parametrize("rule", CHANGED)
def test_the_judge_follows_the_changed_document(rule):
    given, decision = CHANGED[rule]
    assert judge(given, CHANGED_RULES)[0] == decision != judge(given)[0]


def test_every_changed_rule_changes_the_document():
    policy = (HERE / "policy.md").read_text()
    changed = change_policy(policy)
    lines = sum(a != b for a, b in zip(policy.split("\n"), changed.split("\n"), strict=True))
    assert lines == 9 and "14 days" in changed and "60 days" not in changed
    with pytest.raises(ValueError, match="should have this once"):
        change_policy(changed)


def test_reasoning_by_hand():
    assert reasoning(case("lamp", "crack", box="none")) == (
        "I see: red lamp, crack, whole seal, no box.\n"
        "Section 2: 10 days, standard limit 30, in time. Go to Section 3.\n"
        "Section 3: crack. Go to Section 4.\n"
        "Section 4: electronics. Decide Inspect."
    )


def test_policy_names_every_decision_and_is_of_realistic_length():
    policy = (HERE / "policy.md").read_text()
    assert 1000 <= len(policy.split()) <= 2000
    for decision in DECISIONS:
        assert len(re.findall(decision, policy)) >= 3, decision
    assert {Path(link).stem for link in re.findall(r"\]\((pictures/.*?)\)", policy)} == set(DETAILS)


def test_every_fact_of_an_item_is_visible():
    plain = Item("mug", "red", "none", "whole", "closed")
    picture = draw_photo(plain, 3)
    assert picture.shape == (224, 336, 3) and (draw_photo(plain, 3) == picture).all()
    others = [
        Item("kettle", "red", "none", "whole", "closed"),
        Item("mug", "blue", "none", "whole", "closed"),
        Item("mug", "red", "crack", "whole", "closed"),
        Item("mug", "red", "none", "torn", "closed"),
        Item("mug", "red", "none", "whole", "open"),
    ]
    for other in others:
        difference = np.abs(draw_photo(other, 3).astype(int) - picture).max(axis=2)
        assert (difference > 60).sum() > 100, other  # px that clearly differ


def test_the_committed_pictures_are_those_of_the_generator(tmp_path):
    write_details(tmp_path)
    for name in DETAILS:
        committed = decode_image((HERE / "pictures" / f"{name}.png").read_bytes()).astype(int)
        drawn = decode_image((tmp_path / f"{name}.png").read_bytes())
        assert np.abs(committed - drawn).mean() < 2  # another version of resvg may round otherwise


def test_the_made_folder_is_a_good_own_policy(tmp_path, capsys):
    folder = tmp_path / "desk"
    main(["--out", str(folder), "--count", "40", "--cot", "20", "--seed", "1"])
    assert "'Repair': 5" in capsys.readouterr().out
    splits = {k: list(v) for k, v in make_splits(OwnPolicySettings(str(folder))).items()}
    assert (len(splits["train"]), len(splits["test"])) == (32, 8) and len(splits["cot"]) >= 10
    for example in splits["cot"]:
        assert example.cot.endswith(f"Decide {example.answer}.")
    assert len(splits["test"][0].policy_images) == 5
    changed = splits["override"]
    assert [e.example_id for e in changed] == [e.example_id for e in splits["test"]]
    assert len(changed[0].policy_images) == 5 and "14 days" in changed[0].policy_text
    assert any(a.answer != b.answer for a, b in zip(changed, splits["test"], strict=True))
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert sum("cot" in line for line in lines) == 20
    with pytest.raises(SystemExit, match="is not empty"):
        main(["--out", str(folder)])
