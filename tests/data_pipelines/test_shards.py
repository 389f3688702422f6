"""A dataset on disk is whole, or its reader says what is wrong with every shard."""

import dataclasses
import json

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from data_pipelines import shards
from data_pipelines.building import open_building, write_dataset
from data_pipelines.example import Example, encode_png
from data_pipelines.streaming import read_split


def make_examples(count, prefix="e"):
    return [
        Example(f"{prefix}{i}", (bytes([i]) * 9,), f"question {prefix}{i}", str(i))
        for i in range(count)
    ]


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    splits = {"train": make_examples(7), "test": make_examples(2, "t")}
    write_dataset(folder, splits, {"seed": 3}, shard_examples=3)
    return folder


def test_what_is_written_is_read_back_in_order(dataset):
    assert read_split(dataset, "train") == make_examples(7)
    assert read_split(dataset, "train", limit=4) == make_examples(4)
    assert read_split(dataset, "test", limit=99) == make_examples(2, "t")


def test_the_manifest_counts_what_is_there(dataset):
    manifest = shards.check_dataset(dataset)
    assert manifest["recipe"] == {"seed": 3}
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [3, 3, 1]
    assert shards.split_count(dataset, "train") == 7
    names = sorted(path.name for path in dataset.iterdir())
    assert names == [
        "README.md",
        "manifest.json",
        "test-00000-of-00001.array_record",
        "train-00000-of-00003.array_record",
        "train-00001-of-00003.array_record",
        "train-00002-of-00003.array_record",
    ]


def test_the_same_examples_give_the_same_bytes(dataset, tmp_path):
    splits = {"train": make_examples(7), "test": make_examples(2, "t")}
    again = write_dataset(tmp_path / "again", splits, {"seed": 3}, shard_examples=3)
    assert again == shards.read_manifest(dataset)


def test_every_broken_shard_is_listed_at_once(dataset):
    cut, flipped, missing = (dataset / f"train-0000{i}-of-00003.array_record" for i in range(3))
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(bytes(content))
    missing.unlink()
    with pytest.raises(ValueError, match="broken dataset") as error:
        shards.check_dataset(dataset)
    lines = str(error.value).splitlines()
    assert len(lines) == 5  # a title, three shards, what to do
    assert cut.name in lines[1] and "truncated" in lines[1]
    assert flipped.name in lines[2] and "sha256" in lines[2]
    assert missing.name in lines[3] and "missing" in lines[3]
    assert "rebuild" in lines[4]


def test_a_manifest_of_another_version_is_refused(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["version"] = 99
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has version 99, this code reads 1"):
        shards.check_dataset(dataset)


def test_a_cut_or_absent_manifest_is_refused(dataset):
    path = dataset / "manifest.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match="is not JSON"):
        shards.read_manifest(dataset)
    path.unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        shards.read_manifest(dataset)


def test_an_unknown_split_names_those_there_are(dataset):
    with pytest.raises(ValueError, match=r"no split 'cot'; it has \['test', 'train'\]"):
        shards.split_files(dataset, "cot")


def test_duplicate_ids_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="'e0' occurs twice in 'train'"):
        write_dataset(tmp_path / "data", {"train": make_examples(2) * 2}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_same_id_may_stand_in_two_splits(tmp_path):
    write_dataset(tmp_path / "data", {"a": make_examples(1), "b": make_examples(1)}, {})
    assert read_split(tmp_path / "data", "a") == read_split(tmp_path / "data", "b")


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_dies_leaves_nothing(tmp_path, kind):
    def dies():
        yield from make_examples(5)
        raise kind("in the middle")

    with pytest.raises(kind, match="in the middle"):
        write_dataset(tmp_path / "data", {"train": dies()}, {}, shard_examples=2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_kept(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match="not empty"):
        write_dataset(folder, {"train": make_examples(1)}, {})
    assert (folder / "thesis.txt").read_text() == "the only copy"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", {"train": make_examples(1)}, {})
    assert shards.check_dataset(tmp_path / "data")["splits"]["train"]["count"] == 1


def test_two_builds_of_one_folder_do_not_mix(tmp_path):
    with (
        open_building(tmp_path / "data"),
        pytest.raises(ValueError, match="being built by another process"),
    ):
        write_dataset(tmp_path / "data", {"train": make_examples(1)}, {})
    write_dataset(tmp_path / "data", {"train": make_examples(1)}, {})


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "data").write_text("the only copy")
    with pytest.raises(ValueError, match="not empty"):
        write_dataset(tmp_path / "data", {"train": make_examples(1)}, {})
    assert (tmp_path / "data").read_text() == "the only copy"


def test_what_a_killed_build_left_is_not_taken_over(tmp_path):
    left = tmp_path / ".data.building"
    left.mkdir()
    (left / "train-00000-of-00009.array_record").write_bytes(b"half")
    write_dataset(tmp_path / "data", {"train": make_examples(2)}, {})
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"README.md", "manifest.json", "train-00000-of-00001.array_record"}


def test_the_card_tells_what_is_there(tmp_path):
    picture = encode_png(np.zeros((4, 6, 3), np.uint8))
    policy = {"policy_name": "P", "policy_text": "rules | of <image> P"}
    train = [Example(str(i), (picture,), f"ask {i}", "ab"[i % 2], "so", **policy) for i in range(3)]
    test = [Example("t", (), "other", "c", meta={"scene_id": "s9"})]
    write_dataset(
        tmp_path / "data", {"train": train, "test": test}, {"seed": 7}, licence="CC0 here"
    )
    card = (tmp_path / "data/README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| train | 3 |"))
    assert row.endswith("| 1 | 0 | 2 |")  # policies, scenes, distinct answers
    assert "| train | 20 | 5 | 2 | 1.00 |" in card  # mean characters of policy, query, thought
    assert '"seed": 7' in card and "CC0 here" in card and "jaxlib" in card
    assert "    ask 0" in card
    assert (tmp_path / "data/samples/0.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "data/samples").glob("3*"))
    schema = [line.split("`")[1] for line in card.splitlines() if line.startswith("| `")]
    assert schema == [field.name for field in dataclasses.fields(Example)]


def test_shards_are_read_by_the_cards_own_words(dataset):
    # the snippet of the card: two packages, nothing of this project
    record = msgpack.unpackb(
        ArrayRecordDataSource([str(dataset / "train-00001-of-00003.array_record")])[0]
    )
    assert record["query"] == "question e3" and record["images"] == [b"\x03" * 9]
