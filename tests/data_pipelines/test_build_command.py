"""`python -m data_pipelines.build`: options from the settings, one message for what is wrong."""

import dataclasses

import pytest

from data_pipelines.build import DATASETS, main, make_parser
from data_pipelines.shards import check_dataset
from tests.data_pipelines.own_policy.folders import example, write_folder


def test_every_field_of_every_dataset_is_an_option():
    for name, dataset in DATASETS.items():
        required = [
            option
            for field in dataclasses.fields(dataset.settings)
            if field.default is dataclasses.MISSING
            for option in ("--" + field.name.replace("_", "-"), "x")
        ]
        options = vars(make_parser().parse_args([name, "--out", "x", *required]))
        for field in dataclasses.fields(dataset.settings):
            if field.default is not dataclasses.MISSING:
                assert options[field.name] == field.default


def test_own_policy_by_command(tmp_path, capsys):
    source = write_folder(tmp_path / "desk")
    main(["own", "--source", str(source), "--out", str(tmp_path / "out")])
    assert "train 5, cot 0, test 1 examples" in capsys.readouterr().out
    assert check_dataset(tmp_path / "out")["recipe"]["policy"] == "Desk"


def test_a_bad_folder_is_one_message_and_no_output(tmp_path):
    source = write_folder(tmp_path / "desk", lines=[example(0), example(0, answer="Perhaps")])
    with pytest.raises(SystemExit) as caught:
        main(["own", "--source", str(source), "--out", str(tmp_path / "out")])
    assert "2 problems in" in caught.value.code and "examples.jsonl:2" in caught.value.code
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="needs its folder"):
        main(["own", "--out", str(tmp_path / "out")])
