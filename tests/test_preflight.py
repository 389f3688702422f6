"""The door of preflight as a user runs it: this machine, a TPU that is not here, exit statuses."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest


def preflight(*flags):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "trimpi_jax.preflight", "--config", "configs/nano.py", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"}
    )


def test_this_machine(tmp_path):
    path = tmp_path / "figures.json"
    ran = preflight("--only", "evaluate/free prefill 56", "--examples", "2", "--json", str(path))
    assert ran.returncode == 0, ran.stderr
    assert "evaluate/free prefill 56" in ran.stdout and "1 programs" in ran.stdout
    padding = re.search(
        r"padding, policy-free prompts: (\d+) to (\d+) tokens; 2 in 56; (\d+) % padding", ran.stdout
    )
    assert padding, ran.stdout
    shortest, longest, padded = map(int, padding.groups())
    assert 100 * (56 - longest) / 56 - 1 < padded < 100 * (56 - shortest) / 56 + 1
    (program,) = json.loads(path.read_text())["programs"]
    assert program["total_bytes"] > 4 * 1_900_000 and program["flops"] > 1e9


def test_what_cannot_be_is_one_line():
    ran = preflight("--only", "no such program")
    assert ran.returncode == 1 and "matches no program" in ran.stderr.splitlines()[-1]
    ran = preflight("--topology", "v5p-8")
    assert ran.returncode == 1 and "GENERATION:CHIPS" in ran.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    and "TRIMPI_JAX_MUST_COMPILE_FOR_TPU" not in os.environ,
    reason="libtpu (extra tpu) is not installed",
)
def test_a_training_step_compiles_for_a_tpu_that_is_not_here(tmp_path):
    path = tmp_path / "figures.json"
    ran = preflight(
        *("--topology", "v5e:2x2", "--only", "vm_cpt/step 144", "--examples", "0"),
        *("--config.dtype=bfloat16", "--config.layer_loop=scan", "--config.mesh.fsdp=2"),
        *("--json", str(path)),
    )
    assert ran.returncode == 0, ran.stderr
    assert "4 x v5e, 15.8 GiB each" in ran.stdout and "attention splash" in ran.stdout
    (program,) = json.loads(path.read_text())["programs"]
    assert program["temporary_bytes"] > 0 and program["floor_s"] > 0
