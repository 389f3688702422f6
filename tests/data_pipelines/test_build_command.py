"""`python -m data_pipelines.build`: options from the settings, one message for what is wrong."""

import dataclasses

import pytest

from data_pipelines.build import DATASETS, main, make_parser
from data_pipelines.options import field_help
from data_pipelines.shards import check_dataset
from tests.data_pipelines.own_policy.folders import example, write_folder

SMALL = [
    *("clevr_policy", "--policies", "1", "--train-per-policy", "3", "--cot-per-policy", "2"),
    *("--test", "2", "--width", "56", "--height", "56", "--max-objects", "4", "--processes", "0"),
]


@pytest.mark.parametrize("name", DATASETS)
def test_every_field_is_an_option_with_its_default_and_its_help(name):
    settings = DATASETS[name].settings
    required = [
        word
        for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING
        for word in ("--" + field.name.replace("_", "-"), "x")
    ]
    options = vars(make_parser(name).parse_args(["--out", "x", *required]))
    told = field_help(settings)
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            assert options[field.name] == field.default
        assert len(told.get(field.name, "")) > 5, f"{settings.__name__}.{field.name} has no help"


def fail(capsys, *arguments):
    """What a wrong command line says; it exits with 2, prints nothing else, shows no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


def test_unknown_names_come_with_the_closest_one(capsys):
    assert "did you mean clevr_policy?" in fail(capsys, "clevr_polcy")
    err = fail(capsys, "clevr_policy", "--dept", "3", "--sed=4", "--out", "x")
    assert "unknown option --dept; did you mean --depth?" in err
    assert "unknown option --sed; did you mean --seed?" in err
    # no abbreviations: --poli would silently become another option when one is added
    assert "--poli; did you mean --policies?" in fail(capsys, "clevr_policy", "--poli", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "datasets:"),
        (("clevr_policy",), "required: --out"),
        (("clevr_policy", "--out", "x", "--depth", "two"), "--depth: invalid whole number"),
        (("clevr_policy", "--out", "x", "--depth", "12"), r"tree depth must be in 1..10, got 12"),
        (("clevr_policy", "--out", "x", "--crop-px", "84"), "have an effect in variant M only"),
        (("clevr_policy", "--out", "x", "--processes", "-1"), "--processes must be 0 or more"),
        (("clevr_policy", "--out", "x", "--clevr-dir", "/none"), "no scenes"),
        (("own", "--out", "x"), "needs its folder"),
        (("own", "--out", "x", "--source", "/none", "--processes", "2"), "unknown option"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, *arguments)
    assert not list(tmp_path.glob("*/*.array_record"))


def test_help_lists_datasets_and_options(capsys):
    for arguments, words in (
        (["--help"], ("clevr_policy", "own")),
        (["clevr_policy", "--help"], ("--train-per-policy", "[default: 2000]")),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


def test_a_dataset_by_command(tmp_path, capsys):
    main([*SMALL, "--out", str(tmp_path / "a")])
    out = capsys.readouterr().out
    assert "test: 1 policies of depth 2, 4 distinct responses each" in out
    manifest = check_dataset(tmp_path / "a")
    assert {name: split["count"] for name, split in manifest["splits"].items()} == {
        "train": 3,
        "cot": 2,
        "test": 2,
    }
    main([*SMALL, "--out", str(tmp_path / "b")])
    assert check_dataset(tmp_path / "b")["splits"] == manifest["splits"]  # names, sizes, sha256
    capsys.readouterr()
    assert "is not empty" in fail(capsys, *SMALL, "--out", str(tmp_path / "b"))


def test_own_policy_by_command(tmp_path, capsys):
    source = write_folder(tmp_path / "desk")
    main(["own", "--source", str(source), "--out", str(tmp_path / "out")])
    words = capsys.readouterr().out.split()
    assert words[:3] == ["train", "5", "examples"]
    assert check_dataset(tmp_path / "out")["recipe"]["policy"] == "Desk"


def test_a_bad_folder_is_one_message_and_no_output(tmp_path, capsys):
    source = write_folder(tmp_path / "desk", lines=[example(0), example(0, answer="Perhaps")])
    err = fail(capsys, "own", "--source", str(source), "--out", str(tmp_path / "out"))
    assert "2 problems in" in err and "examples.jsonl:2" in err
    assert not (tmp_path / "out").exists()
