"""A folder's problems: all of them, each with its file and line, and nothing written."""

import json
import os
import struct
import zlib

import pytest

from data_pipelines.build import build, make_settings
from data_pipelines.own_policy.folder import read_folder
from tests.data_pipelines.own_policy.folders import TASK, example, png, write_folder


def problems_of(folder):
    """The listed problems, without the head line."""
    with pytest.raises(ValueError) as caught:
        read_folder(folder)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith(f"{len(lines)} problem"), caught.value
    return [line.strip() for line in lines]


def test_a_good_folder(tmp_path):
    folder = read_folder(write_folder(tmp_path / "desk"))
    assert folder.policy.text == "# Desk\n\nSay Yes if it looks like this:\n\n<image>"
    assert folder.policy.images == (png(199),)
    assert [entry.example_id for entry in folder.entries] == [f"e{i}" for i in range(6)]
    assert folder.entries[3].images == (png(3),) and folder.entries[3].answer == "Yes"


def huge_png(width, height):
    """The head of a PNG that claims a size; no decoder may get to its pixels."""

    def chunk(kind, content):
        head = struct.pack(">I", len(content)) + kind + content
        return head + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_every_problem_is_listed_at_once_with_its_line(tmp_path):
    folder = write_folder(
        tmp_path / "desk",
        policy="# Desk\n\n![a](pictures/absent.png)\n\nText <|im_end|> here.\n\n![b](http://x/y.png)\n",
        lines=[
            example(0, id="twice"),
            example(1, id="twice"),  # line 2
            example(2, images=["../secret.png"]),
            example(3, images=["pictures/text.png"]),
            "{not json",  # line 5
            example(4, images=["pictures/huge.png"]),
            {"images": ["pictures/5.png"], "query": "q"},
            example(5, answer="Maybe"),
            example(5, id="p", images=[], extra=1),  # line 9
            example(5, id="q", answer=None),
            example(5, id="r", answer="  "),
            example(5, id="s", query="say <image>"),  # line 12
            example(5, id="t", cot="<think>x"),
            example(5, id="u", images=["/etc/passwd"]),
            example(5, id="v", images=["pictures/cut.png"]),  # line 15
            example(5, id="w", split="valid"),
            example(5, id="x", images=["link.png"]),
            example(5, id="y", images=["pictures/Goood.png"]),  # line 18
            '{"id": "z", "id": "z", "images": ["pictures/5.png"], "query": "q", "answer": "Yes"}',
        ],
    )
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "pictures" / "text.png").write_text("I am text")
    (folder / "pictures" / "huge.png").write_bytes(huge_png(20_000, 10_000))
    (folder / "pictures" / "cut.png").write_bytes(png(9, (400, 300))[:-900])
    found = problems_of(folder)
    expected = [
        ("policy.md:3:", "'pictures/absent.png' is not there"),
        ("policy.md:5:", "chat marks ['<|im_end|>']"),
        ("policy.md:7:", "no file of the folder"),
        ("examples.jsonl:2:", "id 'twice' stands on line 1 already"),
        ("examples.jsonl:3:", "'../secret.png' leaves the folder"),
        ("examples.jsonl:4:", "no readable image"),
        ("examples.jsonl:5:", "no JSON"),
        ("examples.jsonl:6:", "more than 40000000 pixels"),
        ("examples.jsonl:7:", "answer is absent"),
        ("examples.jsonl:8:", "'Maybe' is none of the choices"),
        ("examples.jsonl:9:", "images is empty"),
        ("examples.jsonl:9:", "unknown key extra"),
        ("examples.jsonl:10:", "answer is absent"),
        ("examples.jsonl:11:", "answer is absent"),
        ("examples.jsonl:12:", "the query contains <image>"),
        ("examples.jsonl:13:", "holds <think>"),
        ("examples.jsonl:14:", "leaves the folder"),
        ("examples.jsonl:15:", "no readable image"),
        ("examples.jsonl:16:", "split: expected 'train' or 'test', got 'valid'"),
        ("examples.jsonl:17:", "leaves the folder"),
        ("examples.jsonl:18:", "did you mean 'good.png'?"),
        ("examples.jsonl:19:", "['id'] stand twice"),
    ]
    for line, (place, text) in zip(found, expected, strict=True):
        assert line.startswith(place) and text in line, (line, place, text)


def test_odd_links_and_values_are_problems_and_no_exceptions(tmp_path):
    links = ("pictures", "loop.png", "fifo.png", "a\0b.png", "C:\\x.png", "a" * 5000, "x.svg")
    lines = [example(0, id=f"l{i}", images=[link]) for i, link in enumerate(links)]
    values = ('"\\ud800"', "9" * 5000, "1e999", "true", "[" * 50_000, '{"name": "\\ud800"}')
    lines += [f'{{"images": ["pictures/1.png"], "query": "q", "answer": {v}}}' for v in values]
    folder = write_folder(tmp_path / "desk", lines=lines)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "fifo.png")
    (folder / "x.svg").write_text("<svg/>")
    found = problems_of(folder)
    assert {line.split(":")[1] for line in found} == {str(i) for i in range(1, len(lines) + 1)}
    assert "examples.jsonl:1: 'pictures' is no file" in found
    assert any("no readable image of PNG, JPEG" in line for line in found)


def test_nothing_is_written_for_a_bad_folder(tmp_path):
    folder = write_folder(tmp_path / "desk", lines=[example(0), example(0)])
    with pytest.raises(ValueError, match=r"examples.jsonl:2: the id 'e0' stands on line 1"):
        build("own", make_settings("own", {"source": str(folder)}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["desk"]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("name = 3\n[answer]\nform='exact'", ["task.toml:1: name: expected a valid string, got 3"]),
        ("name = 'a'", ["task.toml: answer is absent"]),
        ("name = 'a'\n\n[answer]\nform = 'guess'", ["task.toml:4: answer.form 'guess' is unknown"]),
        ("name = 'a'\n[answer]\ntools = 3", ["task.toml:2: answer.form is absent"]),
        (
            TASK + "\n[split]\ntest_share = 2.0\nwhy = 1",
            [":8: split.test_share", ":9: unknown key"],
        ),
        ("name = 'a'\nname = 'b'", ["task.toml:2: no TOML"]),
        (
            'name = "a"\n[prompt]\ntemplate = "$query $who"\n[answer]\nform = "exact"',
            ["task.toml:3: prompt.template: unknown placeholders ['who']"],
        ),
        (
            "name = 'a'\n[answer]\nform = 'regex'\npattern = '(a'",
            ["task.toml:4: answer.pattern: the pattern does not compile"],
        ),
        (
            "name = 'a'\n[answer]\nform = 'choice'\nchoices = ['Yes', 'yes ']",
            ["task.toml:4: answer.choices: choices must differ"],
        ),
        (
            "name='a'\n[answer]\nform = 'tool_call'\n[answer.tools.refund]\namount = 'nearly'",
            ["task.toml:5: answer.tools.refund.amount.metric: expected 'exact', 'number'"],
        ),
        (
            "name='a'\n[answer]\nform = 'python'\nfile = '../evil.py'",
            ["task.toml: answer.file: '../evil.py' leaves the folder"],
        ),
    ],
)
def test_problems_of_the_task_file(tmp_path, task, expected):
    found = problems_of(write_folder(tmp_path / "desk", task=task))
    for text in expected:
        assert any(text in line for line in found), (text, found)


def test_a_tool_that_the_policy_never_names(tmp_path):
    task = "name='a'\n[answer]\nform='tool_call'\n[answer.tools.refund]\nid='exact'\n"
    call = {"name": "refund", "arguments": {"id": "1"}}
    lines = [example(0, answer=call), example(1, answer={"name": "ban", "arguments": {}})]
    found = problems_of(write_folder(tmp_path / "desk", task=task, lines=lines))
    assert "'refund', which policy.md never names" in found[0]
    assert "examples.jsonl:2: calls the tool 'ban', which [answer.tools] does not describe" in found


def test_missing_files_and_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no folder; it should hold policy.md"):
        read_folder(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "desk")
    (folder / "policy.md").unlink()
    (folder / "examples.jsonl").write_bytes(b'{"id": "\xff"}')
    found = problems_of(folder)
    assert "policy.md: 'policy.md' is not there" in found
    assert any(line.startswith("examples.jsonl:1: no UTF-8 text") for line in found)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("a\n\n`![b](pictures/good.png)`", "policy.md:3: write a picture as"),
        ("a\n\n![b][ref]\n\n[ref]: pictures/good.png", "policy.md: write a picture as"),
        ('a\n\n<img src="pictures/good.png">', "policy.md:3: write <img> as"),
        ("  \n", "policy.md: the policy is empty"),
    ],
)
def test_pictures_that_would_be_lost_are_problems(tmp_path, policy, expected):
    assert any(
        expected in line for line in problems_of(write_folder(tmp_path / "d", policy=policy))
    )


def test_pictures_in_tables_lists_and_titles_are_found_in_order(tmp_path):
    policy = (
        '![a](pictures/0.png) and ![b](<pictures/1.png> "title")\n\n'
        "| x | y |\n|---|---|\n| ![c](pictures/2.png) | ![d](./pictures/3.png) |\n\n"
        "- ![e](pictures/4%2Epng)\n\n```\n![code](pictures/none.png)\n```\n"
    )
    folder = read_folder(write_folder(tmp_path / "desk", policy=policy))
    assert folder.policy.images == tuple(png(i) for i in range(5))
    assert folder.policy.text.count("<image>") == 5
    assert "![code](pictures/none.png)" in folder.policy.text


def test_large_pictures_are_scaled_down_and_small_ones_kept(tmp_path):
    import io

    from PIL import Image

    folder = write_folder(tmp_path / "desk", task=TASK + "[images]\nmax_pixels = 10000\n")
    (folder / "pictures" / "0.png").write_bytes(png(0, (400, 200)))
    first, second = read_folder(folder).entries[:2]
    assert Image.open(io.BytesIO(first.images[0])).size == (141, 70)  # sqrt(10000 / 80000) * sides
    assert second.images == (png(1),)


def test_split_problems(tmp_path):
    lines = [example(i, split="test" if i > 3 else "train") for i in range(5)]
    found = problems_of(write_folder(tmp_path / "a", lines=[*lines, example(5)]))
    assert found == ['examples.jsonl:6: no "split", but other examples have one']
    leak = example(5, split="test", images=["pictures/1.png"])
    found = problems_of(write_folder(tmp_path / "b", lines=[*lines, leak]))
    assert len(found) == 1 and "examples.jsonl:6: a picture of this test example" in found[0]
    assert "line 2" in found[0]
    found = problems_of(write_folder(tmp_path / "c", lines=lines[:3]))
    assert found == ['examples.jsonl: no example has "split": "test"']


def test_problems_of_an_override(tmp_path):
    lines = [example(i, split="test" if i > 3 else "train") for i in range(6)]
    folder = write_folder(tmp_path / "desk", lines=lines)
    (folder / "override").mkdir()
    (folder / "override" / "policy.md").write_text(
        "![a](../pictures/zzzzzzzz.png) ![b](../../x.png)"
    )
    wrong = [
        example(4, images=["../pictures/4.png"], answer="Maybe"),
        example(5, images=["pictures/5.png"], split="test"),
    ]
    (folder / "override" / "examples.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    assert problems_of(folder) == [
        "override/examples.jsonl:1: 'Maybe' is none of the choices ['Yes', 'No']",
        "override/examples.jsonl:2: 'override/pictures/5.png' is not there",
        "override/examples.jsonl:2: split has no effect here: all of these examples are held out",
        "override/policy.md:1: 'override/../../x.png' leaves the folder; copy the file into it and"
        " link it relatively",
        "override/policy.md:1: 'override/../pictures/zzzzzzzz.png' is not there",
    ]
    policy = (folder / "policy.md").read_text().replace("pictures/", "../pictures/")
    (folder / "override" / "policy.md").write_text(policy)
    trained = example(1, images=["../pictures/1.png"])
    (folder / "override" / "examples.jsonl").write_text(json.dumps(trained))
    assert problems_of(folder) == [
        "override/examples.jsonl:1: a picture of this example is also in the training example of"
        " line 2",
        "override/policy.md: the same as policy.md: change a rule",
    ]


def test_profile_that_no_template_uses(tmp_path):
    task = TASK + '[prompt]\ntemplate = "$query"\n'
    lines = [example(0, profile={"age": 3}), example(1)]
    found = problems_of(write_folder(tmp_path / "desk", task=task, lines=lines))
    assert found == [
        "examples.jsonl:1: profile has no effect: the template of [prompt] has no $profile"
    ]


GRADING = """
def grade(answer, gold, example):
    if example["id"] == "e2":
        return 0.5
    if example["id"] == "e3":
        raise KeyError("no e3")
    return float(answer == gold)
"""


def test_a_function_must_call_every_gold_answer_right(tmp_path):
    task = "name='a'\n[answer]\nform='python'\nfile='grade.py'\n"
    folder = write_folder(tmp_path / "desk", task=task)
    (folder / "grade.py").write_text(GRADING)
    assert problems_of(folder) == [
        "examples.jsonl:3: grade.py on the gold answer 'No': scores it 0.5, not 1",
        "examples.jsonl:4: grade.py on the gold answer 'Yes': KeyError: 'no e3'",
    ]
    (folder / "grade.py").write_text("def grad(answer): pass")
    (found,) = problems_of(folder)
    assert "grading function 'grade' cannot be used: AttributeError" in found
