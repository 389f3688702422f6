"""Two processes of two devices each: each reads what its devices hold, together they save."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.rows import random_params, tiny_config
from trimpi_jax.models import hf_weights

PROGRAM = Path(__file__).parent / "weights_process.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_each_host_reads_its_own_part(tmp_path):
    config = tiny_config(tied=False)
    params = random_params(config)
    source, target = tmp_path / "source", tmp_path / "target"
    hf_weights.save_hf(source, config, params)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), port, str(source), str(target)],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=110) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][1] + said[1][1]
    reports = [json.loads(out.splitlines()[-1]) for out, _ in said]
    whole = (source / "model.safetensors").stat().st_size
    for report in reports:
        assert report["read"] == report["local"]
        assert report["read"] < 0.52 * whole  # a half, and the norms and biases that all hold
    assert sum(report["read"] for report in reports) > 0.99 * whole
    assert (target / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
