"""Two jobs in one workdir: the second is told who is there; a kill leaves nothing behind."""

import signal
import subprocess
import sys

import pytest

from trimpi_jax.io import workdir_lock
from trimpi_jax.io.workdir_lock import lock_workdir

HOLD = """
import sys
from pathlib import Path
from trimpi_jax.io.workdir_lock import lock_workdir
with lock_workdir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_job(tmp_path):
    job = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout.readline() == "held\n"
    yield job
    job.kill()
    job.communicate()


def test_the_second_job_is_told_who_holds_the_folder(tmp_path, other_job):
    with pytest.raises(ValueError, match=rf"in use by another job \(process {other_job.pid} on "):  # noqa: SIM117
        with lock_workdir(tmp_path):
            raise AssertionError("two jobs in one folder")


def test_a_killed_job_holds_nothing(tmp_path, other_job):
    other_job.send_signal(signal.SIGKILL)
    other_job.wait()
    with lock_workdir(tmp_path):
        pass
    with lock_workdir(tmp_path):  # and a finished one neither
        pass


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(workdir_lock.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(workdir_lock.fcntl, "lockf", refuse)
    said = []
    with lock_workdir(tmp_path, said.append):
        pass
    assert "no locks" in said[0]
