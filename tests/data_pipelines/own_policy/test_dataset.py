"""From a good folder to Examples: wording, splits, the same bytes twice."""

import dataclasses
import json

import pytest

from data_pipelines.build import build, make_settings
from data_pipelines.own_policy.dataset import OwnPolicySettings, make_splits, recipe
from data_pipelines.streaming import read_split
from tests.data_pipelines.own_policy.folders import TASK, example, png, write_folder


def splits_of(folder):
    splits = make_splits(OwnPolicySettings(str(folder)))
    return {name: list(examples) for name, examples in splits.items()}


def test_an_example_in_words(tmp_path):
    lines = [
        example(
            0,
            split="test",
            profile={"age": 34, "gold": True},
            history=[{"role": "customer", "text": "It broke."}],
        ),
        example(1, split="train", cot="It is scratched. "),
    ]
    splits = splits_of(write_folder(tmp_path / "desk", lines=lines))
    (test,), (train,), (cot,) = splits["test"], splits["train"], splits["cot"]
    assert test.query == (
        "Profile:\n- age: 34\n- gold: True\nEarlier messages:\ncustomer: It broke.\n"
        "According to the policy Desk: Take it back?"
        " Think inside <think></think> and put the final answer inside \\boxed{}."
    )
    assert test.policy_name == "Desk" and test.policy_images == (png(199),)
    assert test.meta["answer_form"] == {
        "form": "choice",
        "choices": ["Yes", "No"],
        "ignore_case": True,
    }
    assert train.query.startswith("According to the policy Desk") and train.cot == ""
    assert cot == dataclasses.replace(train, cot="It is scratched.")


def test_drawn_split_keeps_groups_and_pictures_together(tmp_path):
    lines = [example(i) for i in range(20)]
    lines += [example(i, id=f"again{i}", images=[f"pictures/{i}.png"]) for i in range(10)]
    lines[18]["group"] = lines[19]["group"] = "one case"
    folder = write_folder(tmp_path / "desk", lines=lines, count=20)
    splits = splits_of(folder)
    assert 6 <= len(splits["test"]) <= 7 and len(splits["train"]) == 30 - len(splits["test"])
    side = {item.example_id: name for name in ("train", "test") for item in splits[name]}
    assert all(side[f"e{i}"] == side[f"again{i}"] for i in range(10))
    assert side["e18"] == side["e19"]
    assert splits == splits_of(folder)
    (folder / "task.toml").write_text(TASK + "[split]\nseed = 1\n")
    assert {item.example_id for item in splits_of(folder)["test"]} != {
        item.example_id for item in splits["test"]
    }


def test_override_is_held_out_with_its_own_policy(tmp_path):
    folder = write_folder(tmp_path / "desk", count=10, lines=[example(i) for i in range(10)])
    (folder / "override").mkdir()
    (folder / "override" / "policy.md").write_text("# Desk\n\nSay No: ![x](../pictures/9.png)\n")
    changed = [example(i, images=[f"../pictures/{i}.png"], answer="No") for i in (3, 5, 7)]
    (folder / "override" / "examples.jsonl").write_text("\n".join(map(json.dumps, changed)))
    splits = splits_of(folder)
    assert {item.example_id for item in splits["test"]} == {"e3", "e5", "e7"}  # more than a fifth
    assert len(splits["train"]) == 7
    override = splits["override"]
    assert [item.answer for item in override] == ["No"] * 3
    assert override[0].policy_text == "# Desk\n\nSay No: <image>"
    assert override[0].policy_images == (png(9),) and override[0].policy_name == "Desk"
    assert override[0].images == (png(3),) and splits["test"][0].policy_images == (png(199),)
    settings = make_settings("own", {"source": str(folder)})
    manifest = build("own", settings, tmp_path / "out")
    assert manifest["leakage"]["override"]["policies_changed"] == 1


def test_examples_that_cannot_be_split(tmp_path):
    folder = write_folder(tmp_path / "desk", lines=[example(i, group="all") for i in range(4)])
    with pytest.raises(ValueError, match="cannot be split"):
        splits_of(folder)


def test_same_folder_same_bytes_and_another_recipe_after_a_change(tmp_path):
    folder = write_folder(tmp_path / "desk", lines=[example(i, cot="c") for i in range(6)])
    settings = make_settings("own", {"source": str(folder)})
    seen = []
    one = build("own", settings, tmp_path / "one", lambda done, total: seen.append((done, total)))
    assert build("own", settings, tmp_path / "two") == one
    assert seen[-1] == (11, 11)  # 6 examples, 5 of them once more with their chain of thought
    assert read_split(tmp_path / "one", "cot")[0].cot == "c"
    (folder / "pictures" / "3.png").write_bytes(png(77))
    assert recipe(settings) != one["recipe"]


def test_the_source_must_be_named():
    with pytest.raises(ValueError, match="--source DIR"):
        OwnPolicySettings()
