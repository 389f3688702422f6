"""Fields become options: types, help, defaults."""

import argparse
import dataclasses

import pytest

from data_pipelines.options import add_options, field_help, summary, unknown_options


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is made.

    More about it.

    Attributes:
        name: what it is called.
        count: how many, at most
            100 % of them.
        sizes: pixels.
        fast: at any price.

    Raises:
        nothing: at all.
    """

    name: str
    count: int = 3
    share: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    fast: bool = False


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser, Settings)
    return Settings(**vars(parser.parse_args(arguments))), parser.format_help()


def test_values_have_their_types():
    settings, _ = parse("--name", "x")
    assert settings == Settings("x")
    settings, _ = parse(
        *("--name", "x", "--count", "-4", "--share", "1e-2", "--sizes", "7,8,9", "--fast")
    )
    assert settings == Settings("x", -4, 0.01, (7, 8, 9), True)
    assert parse("--name", "x", "--no-fast", "--sizes", "")[0].sizes == ()


@pytest.mark.parametrize(
    "arguments", [(), ("--name", "x", "--count", "1.5"), ("--name", "x", "--sizes", "1,b")]
)
def test_wrong_values_are_refused(arguments):
    with pytest.raises(SystemExit):
        parse(*arguments)


def test_help_is_the_attributes_section():
    assert summary(Settings) == "What is made."
    assert field_help(Settings) == {
        "name": "what it is called.",
        "count": "how many, at most 100 % of them.",
        "sizes": "pixels.",
        "fast": "at any price.",
    }
    told = " ".join(parse("--name", "x")[1].split())
    assert "how many, at most 100 % of them. [default: 3]" in told
    assert "what it is called. [required]" in told
    assert "pixels. [default: 1,2]" in told


def test_unknown_options_are_all_told():
    known = ["--count", "--share"]
    lines = unknown_options(["--cuont", "3", "--share=2", "-7", "--zzz", "x"], known)
    assert lines == ["unknown option --cuont; did you mean --count?", "unknown option --zzz"]
