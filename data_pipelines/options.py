"""Settings as command-line options: every field of a frozen dataclass, with its help and default.

    @dataclass(frozen=True)
    class Settings:
        '''What is made.                         -> description of the subcommand

        Attributes:
            test_size: images of the test.       -> --test-size INT   images of the test. [10]
        '''
        test_size: int = 10

Next: data_pipelines/build.py
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

_FIELD = re.compile(r"^    (\w+): (.*)$")
_CONTINUED = re.compile(r"^ {8}(.*)$")


def field_help(settings: type) -> dict[str, str]:
    """Field -> what the `Attributes:` section of the docstring says about it."""
    _, _, section = (inspect.getdoc(settings) or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := _FIELD.match(line):
            name = match[1]
            found[name] = match[2]
        elif name and (match := _CONTINUED.match(line)):
            found[name] += f" {match[1]}"
        elif line.strip():
            break  # another section
    return found


def summary(settings: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(settings) or settings.__name__).partition("\n")[0]


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option a field: `--test-size`; a bool has `--no-` too, a tuple is given with commas."""
    told, types = field_help(settings), typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind, flag = types[field.name], option_name(field.name)
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        default = None if required else _default(field)
        note = "required" if required else f"default: {_shown(default)}"
        shared: dict[str, Any] = {"required": required, "default": default}
        shared["help"] = f"{told.get(field.name, '')} [{note}]".strip().replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
            continue
        parser.add_argument(flag, type=_make_reader(kind), metavar=_metavar(kind), **shared)


def option_name(field: str) -> str:
    """`test_size` -> `--test-size`."""
    return "--" + field.replace("_", "-")


def unknown_options(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """A line for every option that does not exist, with the closest one that does."""
    lines = []
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in known:
            lines.append(f"unknown option {flag}{closest(flag, known)}")
    return lines


def closest(word: str, known: Collection[str]) -> str:
    """`; did you mean X?`, or nothing when nothing is like it."""
    found = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else '""'


def _make_reader(kind: Any) -> Callable[[str], Any]:
    """text -> a value of this type; argparse puts the reader's name into its errors."""
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    one = inner or kind
    one = one if one in (int, float) else str

    def read(text: str) -> Any:
        return one(text) if inner is None else tuple(one(part) for part in text.split(",") if part)

    read.__name__ = {int: "whole number", float: "number"}.get(one, "text")
    read.__name__ += "" if inner is None else "s with commas between"
    return read


def _metavar(kind: Any) -> str:
    is_tuple = typing.get_origin(kind) is tuple
    word = {int: "N", float: "X"}.get(typing.get_args(kind)[0] if is_tuple else kind, "TEXT")
    return f"{word},{word}" if is_tuple else word
