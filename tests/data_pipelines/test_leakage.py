"""What is measured must not stand in what is trained on: every kind of leak is found and named."""

import dataclasses

import pytest

from data_pipelines.building import write_dataset
from data_pipelines.example import Example
from data_pipelines.leakage import check_leakage, identify

PLAIN = Example("a", (b"picture",), "what?", "Case 1", policy_name="P", policy_text="rules")


def row(example_id, scene, **changes):
    meta = {"scene_id": scene} if scene else {}
    changes = {"query": f"about {example_id}", **changes}
    return identify(dataclasses.replace(PLAIN, example_id=example_id, meta=meta, **changes))


def test_a_clean_dataset_is_counted():
    splits = {
        "train": [row("a", "s0"), row("b", "s1"), row("c", "s1", policy_name="Q")],
        "cot": [row("a", "s0")],  # a training split may repeat another
        "test": [row("d", "s2"), row("e", "", policy_text="", policy_name="")],
        "override": [row("f", "s2", policy_text="other rules")],
    }
    assert check_leakage(splits) == {
        "train": dict(sources=2, policies=2, policies_as_in_training=2, policies_changed=0),
        "cot": dict(sources=1, policies=1, policies_as_in_training=1, policies_changed=0),
        "test": dict(sources=1, policies=1, policies_as_in_training=1, policies_changed=0),
        "override": dict(sources=1, policies=1, policies_as_in_training=0, policies_changed=1),
    }


@pytest.mark.parametrize("trained", ["train", "cot", "cot_generated"])
@pytest.mark.parametrize("measured", ["test", "harder", "override_t"])
def test_a_shared_scene_is_found(trained, measured):
    splits = {
        measured: [row("x", "s0", policy_text="new"), row("y", "s7", policy_text="new")],
        trained: [row("a", "s7")],
    }
    with pytest.raises(ValueError, match=f"1 scenes or tasks of held-out split '{measured}'.*s7"):
        check_leakage(splits)


def test_the_same_question_under_another_id_is_found():
    same = row("b", "s1", query="about a")
    with pytest.raises(ValueError, match=r"whose policy name, query and images.*'b'"):
        check_leakage({"train": [row("a", "s0")], "test": [same]})
    other_picture = row("b", "s1", query="about a", images=(b"another",))
    check_leakage({"train": [row("a", "s0")], "test": [other_picture]})


def test_a_task_id_counts_like_a_scene():
    task = dataclasses.replace(PLAIN, meta={"task_id": "17"})
    other = dataclasses.replace(task, example_id="b", query="step 2")
    with pytest.raises(ValueError, match="task_id:17"):
        check_leakage({"train": [identify(task)], "test": [identify(other)]})


def test_one_name_with_two_texts_in_training_is_found():
    splits = {"train": [row("a", "s0")], "cot": [row("b", "s1", policy_text="other rules")]}
    with pytest.raises(ValueError, match="more than one text in training: 'P'"):
        check_leakage(splits)
    pictured = {"train": [row("a", "s0"), row("b", "s1", policy_images=(b"crop",))]}
    with pytest.raises(ValueError, match="more than one text"):
        check_leakage(pictured)


def test_an_override_that_changes_nothing_is_found():
    with pytest.raises(ValueError, match="policies of 'override' that are those of training: 'P'"):
        check_leakage({"train": [row("a", "s0")], "override": [row("b", "s1")]})


def test_all_leaks_are_told_at_once_and_long_lists_are_cut(tmp_path):
    train = [dataclasses.replace(PLAIN, example_id=str(i), query=str(i)) for i in range(9)]
    splits = {"train": train, "test": train, "override": train[:1]}
    with pytest.raises(ValueError) as error:
        write_dataset(tmp_path / "data", splits, {})
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "9 examples of held-out split 'test'" in lines[1] and "and 4 more" in lines[1]
    assert list(tmp_path.iterdir()) == []
