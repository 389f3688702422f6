"""Two processes start together, by the doors that a user opens."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_both(
    module: str, *arguments: str, second: tuple[str, ...] = (), apart: bool = False
) -> list[tuple[int, str]]:
    """(exit status, output) of two processes of a module.

    Args:
        module: to run.
        arguments: for both.
        second: for process 1 only.
        apart: they look for each other at different places.
    """
    port = free_port()
    ports = (port, free_port() if apart else port)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    started = [
        subprocess.Popen(
            [
                sys.executable, "-m", module, *arguments, *extra, "--num_processes=2",
                f"--coordinator=127.0.0.1:{ports[number]}", f"--process_id={number}",
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
def test_a_process_that_does_not_come_is_an_error_after_a_stated_time():
    first, second = start_both("trimpi_jax.doctor", "--start_timeout_s=2", apart=True)
    for status, output in (first, second):
        assert status == 1, output
        assert "waiting up to 2 s" in output
        assert "TimeoutError: after 2 s" in output
    assert "process 0 waits for 1 others and has heard from nobody" in first[1]
    assert "process 0 does not answer" in second[1]


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

    batch = "--config.cot_sft.batch=6"  # of two processes of two devices
    for status, output in start_both("trimpi_jax.train", *config, batch):
        assert status == 1, output
        assert "--config.cot_sft.batch=6 is not a multiple of 4; the nearest are 4 and 8" in output
        assert "Traceback" not in output
    assert list((tmp_path / "run").iterdir()) == []  # nothing was begun
