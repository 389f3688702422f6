"""Parts for the tests of builds, in a module that a worker process can import. No JAX."""

import functools
import os
import signal
from pathlib import Path

from data_pipelines.example import Example
from data_pipelines.parts import Part


def make_rows(number, log="", fault=""):
    """Part `number`: two training rows and one test row; writes its number to `log`."""
    if log:
        with Path(log).open("a") as file:
            file.write(f"{number}\n")
    if fault == "raise":
        raise ValueError(f"part {number} cannot be made")
    if fault == "die":
        os._exit(3)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    train = [
        Example(f"e{number}-{i}", (bytes([number, i]),), f"q{number}-{i}", "a") for i in (0, 1)
    ]
    return {"train": train, "test": [Example(f"t{number}", (), f"test {number}", "b")]}


def make_parts(count, log="", faults=()):
    """`count` parts; `faults` maps a part's number to what goes wrong with it."""
    faults = dict(faults)
    return [
        Part(
            f"part {i}",
            {"train": 2, "test": 1},
            functools.partial(make_rows, i, str(log), faults.get(i, "")),
        )
        for i in range(count)
    ]
