"""A folder belongs to one config: another is refused with its differences, and nothing is lost."""

import json

import pytest
from ml_collections import ConfigDict

from trimpi_jax.stages.workdir import claim_workdir, list_differences


def make_config(**changes):
    return ConfigDict(
        {"name": "toy", "seed": 0, "stages": ("a", "b"), "rl": {"beta": 0.1}} | changes
    )


def test_a_new_folder_is_claimed_and_can_be_claimed_again(tmp_path):
    workdir = tmp_path / "deep" / "run"
    claim_workdir(make_config(), workdir)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved == {"name": "toy", "seed": 0, "stages": ["a", "b"], "rl": {"beta": 0.1}}
    assert [path.name for path in workdir.iterdir()] == ["config.json"]  # no probe is left
    (workdir / "data").mkdir()
    claim_workdir(make_config(), workdir)


def test_another_config_is_refused_with_every_difference(tmp_path):
    claim_workdir(make_config(), tmp_path)
    other = make_config(seed=1, rl={"beta": 0.1, "extra": True}, stages=("a",))
    with pytest.raises(ValueError, match="belongs to another config") as error:
        claim_workdir(other, tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  config.rl.extra: '(absent)' -> True",
        "  config.seed: 0 -> 1",
        "  config.stages: ['a', 'b'] -> ['a']",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        claim_workdir(make_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    # works for every user: a file where a folder should be
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="is not writable"):
            claim_workdir(make_config(), workdir)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises(OSError, match=r"is not writable .*Permission denied"):
        claim_workdir(make_config(), tmp_path)


@pytest.mark.parametrize(
    ("saved", "current", "lines"),
    [
        ({}, {}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 2}}, []),
        (
            {"a": {"b": 1, "c": 2}},
            {"a": {"b": 9, "c": 8}},
            ["config.a.b: 1 -> 9", "config.a.c: 2 -> 8"],
        ),
        ({"a": 1}, {"b": 1}, ["config.a: 1 -> '(absent)'", "config.b: '(absent)' -> 1"]),
        ({"a": {"b": 1}}, {"a": 1}, ["config.a: {'b': 1} -> 1"]),
        ({"a": 1}, {"a": 1.5}, ["config.a: 1 -> 1.5"]),
    ],
)
def test_differences_are_told_leaf_by_leaf(saved, current, lines):
    assert list_differences(saved, current) == lines
