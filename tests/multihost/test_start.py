"""Two processes start together, by the doors that a user opens."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start_both(module: str, *arguments: str, second: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """(exit status, output) of two processes of a module; `second` goes to process 1 only."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", module, *arguments, *extra, "--num_processes=2",
                f"--coordinator=127.0.0.1:{port}", f"--process_id={number}",
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, extra in enumerate(((), second))
    ]  # fmt: skip
    try:
        outputs = [one.communicate(timeout=100)[0] for one in started]
        return [(one.returncode, output) for one, output in zip(started, outputs, strict=True)]
    finally:
        for one in started:
            one.kill()


@pytest.mark.timeout(240)
def test_two_processes_agree_or_name_the_difference(tmp_path):
    config = ("--config", "configs/nano.py:method=cot_sft", "--workdir", str(tmp_path / "run"))
    for status, output in start_both("trimpi_jax.doctor", *config):
        assert status == 0, output
        assert "2 x cpu (cpu) here, 4 in all" in output
        assert "data=4 fsdp=1 tensor=1" in output
        assert "2 processes agree" in output
        assert "all is well" in output

    differing = ("--config.seed=5", "--config.mesh.fsdp=2", "--workdir", str(tmp_path / "other"))
    for status, output in start_both("trimpi_jax.train", *config, second=differing):
        assert status == 1, output
        assert "nothing was started" in output
        assert "config.seed: process 0" in output
        assert "config.mesh.fsdp: process 0" in output
        assert "Traceback" not in output

    for status, output in start_both("trimpi_jax.train", *config):
        assert status == 1, output
        assert "2 processes have found each other" in output
        assert "Traceback" not in output
    assert list((tmp_path / "run").iterdir()) == []  # nothing was begun
