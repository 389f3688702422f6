"""A run's data: built, reused, or given, with other chains of thought but no other settings."""

import dataclasses
import io

import pytest
from ml_collections import ConfigDict
from rich.console import Console

from data_pipelines.building import write_dataset
from data_pipelines.shards import read_manifest
from data_pipelines.streaming import read_split
from tests.data_pipelines.own_policy.folders import write_folder
from trimpi_jax.io.progress import Progress
from trimpi_jax.stages.workdir import prepare_data


@pytest.fixture
def built(tmp_path):
    """(config, a dataset built with it)."""
    source = write_folder(tmp_path / "desk")
    config = ConfigDict({"data": {"dataset": "own", "source": str(source)}, "data_dir": ""})
    prepare_data(config, tmp_path / "data", Progress(Console(file=io.StringIO())))
    return config, tmp_path / "data"


def with_thoughts(folder, out, **recipe):
    """The dataset again, with thoughts and a note about them in its manifest."""
    rows = [dataclasses.replace(e, cot="seen") for e in read_split(folder, "train")]
    splits = {"train": read_split(folder, "train"), "cot": rows, "test": read_split(folder, "test")}
    facts = {"model": "m", "mode": "forward", "accepted": len(rows), "asked": 9}
    write_dataset(out, splits, read_manifest(folder)["recipe"] | {"cot": facts} | recipe)
    return out


def test_a_given_dataset_is_used_where_it_lies(built, tmp_path):
    config, folder = built
    given = with_thoughts(folder, tmp_path / "given")
    config.data_dir = str(given)
    said = io.StringIO()
    for _ in range(2):  # a second start finds the same
        prepare_data(config, tmp_path / "run", Progress(Console(file=said, width=200)))
        assert (tmp_path / "run").resolve() == given
        assert [e.cot for e in read_split(tmp_path / "run", "cot")] == ["seen"] * 5
    assert said.getvalue().count("chains of thought by m, forward, 5/9 accepted") == 2


def test_a_given_dataset_of_other_settings_is_refused(built, tmp_path):
    config, folder = built
    config.data_dir = str(with_thoughts(folder, tmp_path / "given", policy="Another"))
    with pytest.raises(ValueError, match=r"recipe\.policy: 'Another' -> 'Desk'"):
        prepare_data(config, tmp_path / "run", Progress(Console(file=io.StringIO())))


def test_what_is_no_dataset_is_refused_and_leaves_nothing(built, tmp_path):
    config, _ = built
    config.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        prepare_data(config, tmp_path / "run", Progress(Console(file=io.StringIO())))
    assert not (tmp_path / "run").is_symlink()
