"""Call a user's Python function on answers, in a process of its own, with a time limit each.

    parent   {"answer": ..., "gold": ..., "example": {...}}   one JSON line a call
    child    {"score": 0.5, "details": {...}}  or  {"error": "ZeroDivisionError: ..."}

The function is code of the user and runs with the user's rights: it is taken from the one file that
task.toml names, inside the task's folder, and only when the file still has the checksum that the
build saw. A process of its own keeps an endless loop, a crash, an `exit()` or a print from harming
a training run; it is no sandbox against a hostile file.

Next: data_pipelines/own_policy/dataset.py
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

START_LIMIT_S = 120.0  # importing the user's file, which may import anything
CALL = "from data_pipelines.own_policy.user_function import serve; serve()"
MAX_REASON_LETTERS = 400


class Verdict(NamedTuple):
    """What the function said of one answer. `error` is "" unless it raised or broke its promise."""

    score: float
    details: dict[str, float]
    error: str


def call_user_function(
    file: str,
    function: str,
    time_limit_s: float,
    calls: Sequence[Mapping[str, Any]],
    *,
    sha256: str = "",
) -> list[Verdict]:
    """One Verdict per call, in order; an error scores 0 and is said, never raised.

    Args:
        file: the Python file.
        function: its function `function(answer, gold, example) -> float or dict`.
        time_limit_s: of each call; a call over it ends the process, the next call starts another.
        calls: {"answer", "gold", "example"} each.
        sha256: what the file must hash to; "" = not checked.

    Raises:
        ValueError: the file is not there or was changed, or it cannot be imported, or has no such
            function.
    """
    check_file(file, sha256)
    verdicts: list[Verdict] = []
    child: _Child | None = None
    try:
        for call in calls:
            if child is None:
                child = _Child(file, function)
            verdict = child.call(call, time_limit_s)
            if verdict is None:
                child.stop()
                child = None
                verdict = Verdict(
                    0.0, {}, f"no answer within {time_limit_s} s, or it ended the process"
                )
            verdicts.append(verdict)
    finally:
        if child is not None:
            child.stop()
    return verdicts


def check_file(file: str, sha256: str) -> None:
    """Whether the file is the one that the build saw.

    Raises:
        ValueError: it is not.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"the grading function's file {file} is gone; put it back, or rebuild")
    found = file_sha256(path)
    if sha256 and found != sha256:
        raise ValueError(
            f"{file} was changed since the dataset was built (sha256 {found[:12]}..., then"
            f" {sha256[:12]}...); rebuild the dataset, so that its checks run again"
        )


def file_sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_verdict(answer: Any) -> Verdict:
    """What a function's return value means: a number in [0, 1], or {"score": it, other: number}."""
    parts = answer if isinstance(answer, Mapping) else {"score": answer}
    if "score" not in parts:
        return Verdict(0.0, {}, f"returned a dict without 'score': {sorted(map(str, parts))}")
    numbers: dict[str, float] = {}
    for name, value in parts.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            return Verdict(0.0, {}, f"'{name}' is {value!r:.80}, not a number")
        if not math.isfinite(numbers[str(name)]):
            return Verdict(0.0, {}, f"'{name}' is {value!r:.80}")
    score = numbers.pop("score")
    if not 0.0 <= score <= 1.0:
        return Verdict(0.0, {}, f"the score {score:g} is not in [0, 1]")
    return Verdict(score, numbers, "")


def serve() -> None:
    """The child: import the file, then answer one line per line; prints go to stderr."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the user's code reads and prints elsewhere
    os.dup2(2, 1)
    file, name = sys.argv[1:3]
    try:
        sys.path.insert(0, str(Path(file).parent))  # it may import its neighbours
        spec = importlib.util.spec_from_file_location("user_grading", file)
        assert spec is not None and spec.loader is not None, f"{file} is no Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        if not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    except BaseException as error:
        _reply(replies, {"error": _reason(error)})
        return
    _reply(replies, {"ready": True})
    for line in requests:
        call = json.loads(line)
        try:
            verdict = read_verdict(function(call["answer"], call["gold"], call["example"]))
        except Exception as error:
            verdict = Verdict(0.0, {}, _reason(error))
        _reply(replies, verdict._asdict())


class _Child:
    """The process that runs the function."""

    def __init__(self, file: str, function: str):
        root = str(Path(__file__).parents[2])  # where data_pipelines is
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALL, str(Path(file).resolve()), function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.pending = b""
        first = self._read(START_LIMIT_S)
        if first is None or "error" in first:
            self.stop()
            why = (
                first["error"] if first else f"no answer within {START_LIMIT_S:.0f} s of importing"
            )
            raise ValueError(f"{file}: the grading function '{function}' cannot be used: {why}")

    def call(self, call: Mapping[str, Any], limit_s: float) -> Verdict | None:
        """None = it took too long, or the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(dict(call)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        reply = self._read(limit_s)
        return None if reply is None else Verdict(**reply)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self, limit_s: float) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        end = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(max(end - time.monotonic(), 0.0)):
                    return None
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    return None  # the process ended
                self.pending += piece
        line, self.pending = self.pending.split(b"\n", 1)
        return json.loads(line)


def _reply(replies: Any, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON_LETTERS]
