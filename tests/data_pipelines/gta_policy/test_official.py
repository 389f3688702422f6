"""The release's layout: two real records, records of our own, and every way a folder can be bad."""

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.gta_policy.catalogue import (
    PAPER_RULES,
    TOOLS,
    Profile,
    answer_form,
    policy_text,
)
from data_pipelines.gta_policy.dataset import GTAPolicySettings, make_splits
from data_pipelines.gta_policy.official import load_tasks
from data_pipelines.gta_policy.tasks import make_examples

REAL = Path(__file__).parents[4] / "shared" / "data" / "gta"


def jpeg(width=32, height=24):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, format="JPEG")
    return buffer.getvalue()


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": function}],
        "thought": f"I use {name}.",
    }


def returned(name, content, kind="text"):
    return {"role": "tool", "name": name, "content": {"type": kind, "content": content}}


def record(request, *turns, answer="done", gt=None, files=("image/image_1.jpg",)):
    return {
        "tools": [],
        "files": [{"type": "image", "path": path, "url": None} for path in files],
        "dialogs": [
            {"role": "user", "content": request},
            *turns,
            {"role": "assistant", "content": answer},
        ],
        "gt_answer": gt,
    }


RECORDS = {
    "0": record(
        "Where is this and what can I eat there?",
        call("OCR", image="image/image_1.jpg"),
        returned("OCR", "(1, 2, 30, 20) LISBON"),
        call("GoogleSearch", query="food in Lisbon", k=10),
        returned("GoogleSearch", "Pastel de nata"),
        gt=["a", "b", "c"],
    ),
    "1": record(
        "How high is the tower?",
        call("GoogleSearch", query="height of the tower"),
        returned("GoogleSearch", "330 m"),
        gt={"whitelist": [["330"]], "blacklist": None},
        files=("image/image_1.jpg", "image/image_2.jpg"),
    ),
    "2": record(
        "Mark the door.",
        call("TextToBbox", image="image/image_2.jpg", text="door"),
        returned("TextToBbox", "(3, 4, 20, 22), score 80"),
        call("DrawBox", image="image/image_2.jpg", bbox="(3, 4, 20, 22)"),
        returned("DrawBox", "image/image_9.jpg", "image"),
        files=("image/image_2.jpg",),
    ),
}


def toolmeta():
    return {
        tool.name: {"name": tool.name, "inputs": [{"name": a.name} for a in tool.arguments]}
        for tool in TOOLS.values()
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "image").mkdir()
    for i in (1, 2):
        (tmp_path / "image" / f"image_{i}.jpg").write_bytes(jpeg())
    write(tmp_path, RECORDS)
    return tmp_path


def write(folder, records, tools=None):
    (folder / "dataset.json").write_text(json.dumps(records))
    (folder / "toolmeta.json").write_text(json.dumps(tools or toolmeta()))


def test_records_become_single_steps(folder):
    tasks = load_tasks(folder)
    assert [(task.task_id, len(task.steps)) for task in tasks] == [
        ("gta/0", 2),
        ("gta/1", 1),
        ("gta/2", 2),
    ]
    first, second = make_examples(
        tasks[0],
        Profile(30, 620, "B"),
        PAPER_RULES,
        policy=policy_text(PAPER_RULES),
        source="official",
        answer_form=answer_form("x"),
        with_cot=True,
    )
    called = '{"name": "OCR_v4", "arguments": {"image": "image/image_1.jpg"}}'
    assert first.answer == called
    assert f"1. Call: {called}\n   Return: (1, 2, 30, 20) LISBON" in second.query
    assert "I use GoogleSearch." in second.cot


def test_k_follows_the_policy_not_the_record(folder):
    first, second, _ = load_tasks(folder)
    assert first.steps[1].arguments == {"query": "food in Lisbon", "k": 4}  # three free answers
    assert second.steps[0].arguments == {"query": "height of the tower", "k": 1}  # one answer


def test_the_release_is_split_by_task_to_the_very_step(folder):
    splits = make_splits(GTAPolicySettings("official", str(folder), train=3, test=2))
    made = {name: list(examples) for name, examples in splits.items()}
    sizes = {name: len(examples) for name, examples in made.items()}
    assert sizes == {"train": 3, "cot": 3, "test": 2, "override": 2}
    train = {e.meta["scene_id"] for e in made["train"]}
    assert not train & {e.meta["scene_id"] for e in made["test"]}
    with pytest.raises(ValueError, match=r"3 tasks with 5 steps, the settings ask for 451 \+ 106"):
        make_splits(GTAPolicySettings("official", str(folder)))


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared GTA excerpt is not here")
def test_real_records_and_the_real_toolmeta(tmp_path):
    (tmp_path / "image").mkdir()
    for i in (1, 2, 96):
        (tmp_path / "image" / f"image_{i}.jpg").write_bytes(jpeg())
    shutil.copy(REAL / "excerpt.json", tmp_path / "dataset.json")
    shutil.copy(REAL / "toolmeta.json", tmp_path / "toolmeta.json")
    (task,) = load_tasks(tmp_path)  # record 0 of the excerpt has no calls
    assert (task.task_id, task.answer, task.open_ended) == ("gta/1", "58", False)
    assert [step.tool for step in task.steps] == ["OCR", "Calculator"]
    assert task.steps[1].arguments == {"expression": "290 / 5"}
    assert task.steps[0].returned.startswith("(34, 240, 1243, 1031) PHARMACIST")


BROKEN = {
    "a tool that is not described": (
        lambda r: r["0"]["dialogs"].__setitem__(1, call("Teleport", image="image/image_1.jpg")),
        r"record 0: dialogs\[1\] calls 'Teleport', which the policy does not describe",
    ),
    "an argument that the tool has not": (
        lambda r: r["0"]["dialogs"].__setitem__(1, call("OCR", picture="image/image_1.jpg")),
        r"dialogs\[1\]: OCR has no argument 'picture'\n.*OCR needs the argument 'image'",
    ),
    "an image out of the folder": (
        lambda r: r["1"]["files"].append({"type": "image", "path": "../secret.jpg"}),
        r"record 1: '\.\./secret\.jpg' leaves the folder",
    ),
    "an absolute image": (
        lambda r: r["1"]["files"].append({"type": "image", "path": "/etc/hostname"}),
        r"record 1: '/etc/hostname' leaves the folder",
    ),
    "a missing image": (
        lambda r: r["2"]["files"].append({"type": "image", "path": "image/image_7.jpg"}),
        r"record 2: the image 'image/image_7\.jpg' is missing",
    ),
    "an absent answer": (
        lambda r: r["0"]["dialogs"][-1].pop("content"),
        r"record 0: dialogs\[5\] has no answer",
    ),
    "no last word": (
        lambda r: r["0"]["dialogs"].pop(),
        r"record 0: dialogs\[4\], the last, must be the assistant's answer",
    ),
    "two calls at once": (
        lambda r: r["0"]["dialogs"][1]["tool_calls"].append({}),
        r"record 0: dialogs\[1\] has 2 tool calls, expected one",
    ),
    "an unknown role": (
        lambda r: r["0"]["dialogs"][1].update(role="robot"),
        r"record 0: dialogs\[1\] has the role 'robot'",
    ),
    "a file that is no image": (
        lambda r: r["0"]["files"][0].update(type="audio"),
        r"record 0: files\[0\] has the type 'audio', expected 'image'",
    ),
    "no files": (lambda r: r["0"].update(files=[]), "record 0: 'files' must be a list"),
    "no dialogs": (lambda r: r["0"].update(dialogs=None), "record 0: 'dialogs' must be a list"),
    "no record": (lambda r: r.update({"0": 7}), "record 0: expected an object, got int"),
    "a return without text": (
        lambda r: r["0"]["dialogs"][2].update(content={"type": "text"}),
        r"record 0: dialogs\[2\]\.content\.content must be a text",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_record_is_named(folder, what):
    change, message = BROKEN[what]
    records = json.loads(json.dumps(RECORDS))
    change(records)
    write(folder, records)
    with pytest.raises(ValueError, match=message):
        load_tasks(folder)


def test_all_problems_are_listed_together(folder):
    records = json.loads(json.dumps(RECORDS))
    for what in ("a missing image", "an absent answer", "an image out of the folder"):
        BROKEN[what][0](records)
    write(folder, records)
    with pytest.raises(ValueError, match="3 problems in") as caught:
        load_tasks(folder)
    assert str(caught.value).count("\n- ") == 3


def test_images_that_are_none_or_too_large(folder):
    (folder / "image" / "image_1.jpg").write_bytes(b"not an image")
    (folder / "image" / "image_2.jpg").write_bytes(jpeg()[:200])
    with pytest.raises(ValueError, match="no readable image") as caught:
        load_tasks(folder)
    assert "image/image_2.jpg" in str(caught.value)
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, format="PNG")  # 200 megapixels in a few kB
    (folder / "image" / "image_1.jpg").write_bytes(buffer.getvalue())
    (folder / "image" / "image_2.jpg").write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"more than (the limit of )?40000000"):
        load_tasks(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.jpg"
    secret.write_bytes(jpeg())
    (folder / "image" / "image_1.jpg").unlink()
    (folder / "image" / "image_1.jpg").symlink_to(secret)
    with pytest.raises(ValueError, match="leaves the folder"):
        load_tasks(folder)


def test_files_that_are_missing_or_no_json(folder):
    (folder / "toolmeta.json").unlink()
    (folder / "dataset.json").write_text('{"0": {}, "0": {}}')
    with pytest.raises(ValueError, match=r"keys \['0'\] stand twice") as caught:
        load_tasks(folder)
    assert "toolmeta.json is missing" in str(caught.value)
    write(folder, [])
    with pytest.raises(ValueError, match=r"dataset\.json is a list, expected an object"):
        load_tasks(folder)
    write(folder, {"0": record("Hello?")})
    with pytest.raises(ValueError, match="no record with a tool call"):
        load_tasks(folder)


def test_tools_that_differ_from_the_policys(folder):
    tools = toolmeta()
    tools["OCR"]["inputs"].append({"name": "language"})
    tools["Teleport"] = {"inputs": []}
    del tools["TextToBbox"]
    write(folder, RECORDS, tools)
    with pytest.raises(ValueError, match="OCR has the arguments") as caught:
        load_tasks(folder)
    assert "the policy has no tool 'Teleport'" in str(caught.value)
    assert "calls 'TextToBbox', which toolmeta.json does not describe" in str(caught.value)
