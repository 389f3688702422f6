"""A notice to one of two processes: both save the same step, end with 75, and go on from there."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trimpi_jax.io.checkpoints import saved_steps

PROGRAM = Path(__file__).parent / "stop_process.py"
ROOT = Path(__file__).parents[2]


def run_both(folder: Path, stops_at: int) -> list[tuple[int, str]]:
    """(exit status, output) of both processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port, str(folder), str(stops_at)],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.timeout(420)
def test_one_notice_stops_both_at_one_step_and_the_next_start_goes_on(tmp_path):
    # the notice comes after a save whose number is far from the step that JAX knows
    both = run_both(tmp_path, stops_at=155)
    assert [status for status, _ in both] == [75, 75], both[0][1] + both[1][1]
    steps = [re.search(r"stopped and saved at step (\d+)", text) for _, text in both]
    assert steps[0] and steps[1] and steps[0][1] == steps[1][1]
    at = int(steps[0][1])
    assert 155 < at < 1000
    assert saved_steps(tmp_path / "checkpoints")[-1] == at

    again = run_both(tmp_path, stops_at=-1)
    assert [status for status, _ in again] == [0, 0], again[0][1] + again[1][1]
    for rank, (_, text) in enumerate(again):
        assert f"continuing at step {at} of 1000" in text
        found = json.loads(text.splitlines()[-1])
        total = rank
        for number in range(1, 1001):
            total = (3 * total + number + rank) % 1009
        assert found == {"place": 1000, "total": [float(total)]}
