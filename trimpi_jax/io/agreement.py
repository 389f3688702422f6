"""What the processes of a run tell each other beside the arrays: small things, in lockstep.

    gather(x)        x of every process, on every process
    largest(xs)      the largest of each number: which bucket holds everybody's rows
    of_first(make)   what process 0 makes or reads, or its error, on every process

Every process calls the same function at the same place of the program. Small messages travel
through the key-value store of JAX's coordination service: process 0 collects, and tells all. No
device is asked, so nothing waits for the step that a device is busy with. Large ones (groups that
move, texts) travel over the devices. Alone, each of these returns its input.

Source: jax.distributed, jax.experimental.multihost_utils.
Next: trimpi_jax/io/workdir_lock.py
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import msgpack
import numpy as np
from jax.experimental import multihost_utils

KEYS = "trimpi_jax/agree"
LARGE_BYTES = 2**18  # messages above this travel over the devices
PATIENCE_S = 300  # a wait this long is told, and goes on: process 0 may be building the data
KINDS = {"ValueError": ValueError, "OSError": OSError, "FileNotFoundError": FileNotFoundError}
_rounds = itertools.count()  # the same on all processes, since all take part in every round


def is_first() -> bool:
    """Whether this process is the one that writes metrics, results, reports."""
    return jax.process_index() == 0


def gather(value: Any, what: str) -> list[Any]:
    """What every process says, in the order of the processes.

    Args:
        value: of numbers, texts, bytes, lists and dicts; tuples come back as lists.
        what: names the place in the program; processes that are at different places are an error.

    Raises:
        RuntimeError: the processes are not at the same place.
    """
    if jax.process_count() == 1:
        return [value]
    packed = msgpack.packb(value)
    assert packed is not None
    small = packed if len(packed) <= LARGE_BYTES else b""
    told = _exchange(msgpack.packb([what, len(packed), small]), what)
    places = [place for place, _, _ in told]
    if len(set(places)) > 1:
        raise RuntimeError(f"the processes have come apart; they are at {places}")
    sizes = [size for _, size, _ in told]
    if max(sizes) <= LARGE_BYTES:
        return [_unpack(part) for _, _, part in told]
    rows = np.zeros(2 ** (max(sizes) - 1).bit_length(), np.uint8)  # few sizes: few programs
    rows[: len(packed)] = np.frombuffer(packed, np.uint8)
    gathered = multihost_utils.process_allgather(rows)
    return [_unpack(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]


def largest(numbers: Sequence[int], what: str) -> list[int]:
    """The largest of each number over all processes."""
    told = gather([int(number) for number in numbers], what)
    return [max(column) for column in zip(*told, strict=True)]


def of_first(make: Callable[[], Any], what: str) -> Any:
    """What `make` returns on process 0, where alone it is called, or its ValueError or OSError.

    Args:
        make: returns what `gather` can carry.
        what: see `gather`.
    """
    if jax.process_count() == 1:
        return make()
    if not is_first():
        kind, found = gather(None, what)[0]
        if kind:
            raise KINDS.get(kind, OSError)(found)
        return found
    try:
        found = make()
    except (ValueError, OSError) as error:
        name = next((one.__name__ for one in type(error).__mro__ if one.__name__ in KINDS), "")
        gather([name, str(error)], what)
        raise
    return gather(["", found], what)[0][1]


def _exchange(packed: bytes | None, what: str) -> list[Any]:
    """Every process's message, through process 0."""
    number, count = next(_rounds), jax.process_count()
    store, place = _store(), f"{KEYS}/{number}"
    store.key_value_set_bytes(f"{place}/{jax.process_index()}", packed)
    if is_first():
        told = [_wait(f"{place}/{process}", what) for process in range(count)]
        store.key_value_set_bytes(f"{place}/all", msgpack.packb(told))
        # all have told, so all have read what was told the time before
        with contextlib.suppress(Exception):
            store.key_value_delete(f"{KEYS}/{number - 1}/")
    else:
        told = msgpack.unpackb(_wait(f"{place}/all", what))
    return [msgpack.unpackb(one) for one in told]


def _wait(key: str, what: str) -> bytes:
    """The value of a key, however long it takes; a process that ends is noticed by JAX."""
    started = time.monotonic()
    while True:
        try:
            return _store().blocking_key_value_get_bytes(key, 1000 * PATIENCE_S)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        process = key.rpartition("/")[2].replace("all", "0")
        print(
            f"process {jax.process_index()} has waited {time.monotonic() - started:.0f} s for"
            f" process {process} ({what})",
            file=sys.stderr,
            flush=True,
        )


def _unpack(packed: bytes) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)


def _store() -> Any:
    from jax._src import distributed  # the store has no public name; Orbax reaches it the same way

    return distributed.global_state.client
