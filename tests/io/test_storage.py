"""Folders of checkpoints: can they be written to, have they room, whose are they."""

import errno
import json
import os
from pathlib import Path

import pytest

from trimpi_jax.io import storage
from trimpi_jax.io.storage import (
    claim_folder,
    claim_problem,
    free_bytes,
    is_remote,
    open_folder,
    probe_problem,
    space_problem,
)


def test_a_folder_that_can_be_written_to_is_made_and_left_clean(tmp_path):
    assert probe_problem(tmp_path / "deep" / "run") == ""
    assert list((tmp_path / "deep" / "run").iterdir()) == []


def test_a_path_that_cannot_be_a_folder_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    assert "not writable" in probe_problem(tmp_path / "file" / "run")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_read_only_forbidden_and_full_are_told_as_the_system_does(tmp_path, monkeypatch, code):
    def refuse(self, text):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(open_folder(tmp_path)), "write_text", refuse)
    assert os.strerror(code) in probe_problem(tmp_path)


def test_a_store_that_gives_back_something_else_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(type(open_folder(tmp_path)), "read_text", lambda self: "old")
    assert "something else than was written" in probe_problem(tmp_path)


def test_only_known_schemes_are_folders(monkeypatch):
    with pytest.raises(ValueError, match="'ftp://host/run': a folder is a path, or one of"):
        open_folder("ftp://host/run")
    monkeypatch.setitem(storage.STORES, "gs", ("no_such_module", "gcs"))
    with pytest.raises(ValueError, match=r"pip install 'trimpi_jax\[gcs\]'"):
        open_folder("gs://bucket/run")
    assert is_remote("gs://bucket/run") and not is_remote("/tmp/run")


def test_room_is_compared_with_everything_that_will_be_written(tmp_path):
    free = free_bytes(tmp_path)
    assert free is not None and free_bytes("gs://bucket/run") is None
    assert space_problem(tmp_path, {"checkpoints": free / 4, "models": free / 4}) == ""
    problem = space_problem(tmp_path, {"3 checkpoints of rl": 9 * free, "models of 2 stages": free})
    assert "GiB free, but the run will write" in problem
    assert f"3 checkpoints of rl {9 * free / 2**30:.2f}, models of 2 stages" in problem
    assert space_problem("gs://bucket/run", {"checkpoints": 2**80}) == ""  # buckets have no end


def test_the_last_claim_counts_and_the_one_before_finds_out(tmp_path):
    first, before = claim_folder(tmp_path, "config-a")
    assert before is None and claim_problem(tmp_path, first) == ""
    second, before = claim_folder(tmp_path, "config-a")
    assert before is not None and before["token"] == first
    assert claim_problem(tmp_path, second) == ""
    assert "was taken over by another start of this run" in claim_problem(tmp_path, first)
    with pytest.raises(ValueError, match="belongs to another run"):
        claim_folder(tmp_path, "config-b")
    assert claim_problem(tmp_path, second) == ""  # nothing was changed by the refusal


def test_a_claim_that_a_kill_cut_short_is_none(tmp_path):
    (tmp_path / storage.CLAIM).write_text('{"owner": "conf')
    token, before = claim_folder(tmp_path, "config-a")
    assert before is None
    assert json.loads((Path(tmp_path) / storage.CLAIM).read_text())["token"] == token
