"""One job a workdir: a lock that lasts as long as the process that holds it.

A POSIX record lock: the system lets go of it when the process ends, even by `kill -9`, forked
children do not inherit it, and NFS passes it between hosts. Where a file system knows no locks
(some object stores behind FUSE), there is none, and the caller is told.

Next: trimpi_jax/io/checkpoints.py
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_workdir(workdir: Path, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Holds a workdir while the body runs.

    Args:
        workdir: exists.
        say: told when the file system has no locks.

    Raises:
        ValueError: another process holds it, named with host and start.
        OSError: the lock file cannot be written.
    """
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                say(f"{workdir}: its file system has no locks; start no second job there")
                yield
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(
                f"workdir {workdir} is in use by another job ({_holder(file)}); wait for it, stop"
                " it, or choose another folder. If that host is gone (NFS version 3 keeps the locks"
                f" of a machine that was taken away), delete {workdir / LOCK}"
            ) from None
        file.seek(0)
        file.truncate()
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def _holder(file) -> str:
    try:
        file.seek(0)
        holder = json.load(file)
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, OSError):
        return "it has just started"
