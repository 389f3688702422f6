"""Builds in parts: any number of processes gives the same bytes, a killed one goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import parts as parts_module
from data_pipelines.parts import Part, build_parts, iter_splits
from data_pipelines.shards import check_dataset
from data_pipelines.streaming import read_split
from tests.data_pipelines.made_parts import make_parts, make_rows

ROOT = Path(__file__).resolve().parents[2]


def shard_hashes(folder):
    splits = check_dataset(folder)["splits"]
    return {shard["file"]: shard["sha256"] for s in splits.values() for shard in s["shards"]}


def test_parts_follow_each_other_whoever_makes_them(tmp_path):
    progress = []
    build_parts(
        tmp_path / "one", make_parts(3), {"seed": 1}, on_progress=lambda *p: progress.append(p)
    )
    build_parts(tmp_path / "two", make_parts(3), {"seed": 1}, processes=2)
    ids = [example.example_id for example in read_split(tmp_path / "two", "train")]
    assert ids == ["e0-0", "e0-1", "e1-0", "e1-1", "e2-0", "e2-1"]
    assert shard_hashes(tmp_path / "one") == shard_hashes(tmp_path / "two")
    assert progress == [(0, 9), (3, 9), (6, 9), (9, 9)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]  # no scratch is left


def test_workers_compute_as_every_server_does(tmp_path):
    build_parts(tmp_path / "data", make_parts(1), {}, processes=1)
    made_in = json.loads((tmp_path / "data/manifest.json").read_text())["built_with"]["made in"]
    assert "JAX_PLATFORMS=cpu" in made_in
    assert parts_module.WORKER_XLA_FLAGS in made_in


@pytest.mark.parametrize("processes", [0, 1])
def test_a_failed_build_keeps_its_finished_parts(tmp_path, processes):
    folder, log = tmp_path / "data", tmp_path / "log"
    with pytest.raises(ValueError, match="part 2 cannot be made"):
        build_parts(folder, make_parts(4, log, {2: "raise"}), {}, processes=processes)
    assert not folder.exists()
    progress = []
    build_parts(
        folder,
        make_parts(4, log),
        {},
        processes=processes,
        on_progress=lambda *p: progress.append(p),
    )
    assert progress[0][0] >= 6  # parts 0 and 1 at least were found
    assert log.read_text().split().count("0") == log.read_text().split().count("1") == 1
    build_parts(tmp_path / "whole", make_parts(4), {})
    assert shard_hashes(folder) == shard_hashes(tmp_path / "whole")


def test_a_killed_build_never_looks_whole_and_goes_on(tmp_path):
    folder, log = tmp_path / "data", tmp_path / "log"
    code = (
        "from data_pipelines.parts import build_parts\n"
        "from tests.data_pipelines.made_parts import make_parts\n"
        f"build_parts({str(folder)!r}, make_parts(3, {str(log)!r}, {{1: 'kill'}}), {{}})"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -9
    assert not folder.exists()
    building = tmp_path / ".data.building"
    assert (building / "part00000.json").is_file() and not (building / "manifest.json").exists()
    # half a shard of the next part, as a kill in the middle of writing leaves it
    (building / "train-part00001-00000.array_record").write_bytes(b"half")
    build_parts(folder, make_parts(3, log), {})
    assert log.read_text().split() == ["0", "1", "1", "2"]
    build_parts(tmp_path / "whole", make_parts(3), {})
    assert shard_hashes(folder) == shard_hashes(tmp_path / "whole")


def test_a_finished_part_that_was_damaged_is_made_again(tmp_path):
    folder, log = tmp_path / "data", tmp_path / "log"
    with pytest.raises(ValueError, match="cannot be made"):
        build_parts(folder, make_parts(3, log, {2: "raise"}), {})
    shard = tmp_path / ".data.building/train-part00001-00000.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(bytes(content))
    (tmp_path / ".data.building/part00000.json").write_text('{"train": [')  # cut
    build_parts(folder, make_parts(3, log), {})
    assert log.read_text().split() == ["0", "1", "2", "0", "1", "2"]


def test_parts_of_another_recipe_are_not_taken(tmp_path):
    folder, log = tmp_path / "data", tmp_path / "log"
    with pytest.raises(ValueError, match="cannot be made"):
        build_parts(folder, make_parts(2, log, {1: "raise"}), {"seed": 1})
    build_parts(folder, make_parts(2, log), {"seed": 2})
    assert log.read_text().split() == ["0", "1", "0", "1"]


def test_a_dead_worker_is_an_error_that_says_how_to_go_on(tmp_path):
    with pytest.raises(RuntimeError, match=r"worker process died.*same command goes on"):
        build_parts(tmp_path / "data", make_parts(1, faults={0: "die"}), {}, processes=1)
    assert not (tmp_path / "data").exists()


def test_a_part_that_makes_something_else_is_refused(tmp_path):
    wrong = Part("short", {"train": 3, "test": 1}, lambda: make_rows(0))
    with pytest.raises(ValueError, match=r"part short made .*'train': 2.* were due"):
        build_parts(tmp_path / "data", [wrong], {})
    with pytest.raises(ValueError, match="different names"):
        build_parts(tmp_path / "data", make_parts(1) * 2, {})


def test_splits_are_made_lazily_and_each_part_once(tmp_path):
    log, progress = tmp_path / "log", []
    splits = iter_splits(make_parts(2, log), lambda *p: progress.append(p))
    assert list(splits) == ["train", "test"] and not log.exists()
    assert next(splits["train"]).example_id == "e0-0"
    assert log.read_text().split() == ["0"]
    assert [e.example_id for e in splits["test"]] == ["t0", "t1"]
    assert [e.example_id for e in splits["train"]] == ["e0-1", "e1-0", "e1-1"]
    assert log.read_text().split() == ["0", "1"] and progress == [(3, 6), (6, 6)]
