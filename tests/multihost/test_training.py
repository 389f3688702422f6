"""Four, two and one process take turns at one job, two of them killed, and equal one alone."""

import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.build import build, make_settings
from tests.end_to_end.conftest import ASSETS, load_config, shrink_model
from tests.multihost.tiny_job import get_config
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.models import vlm
from trimpi_jax.models.hf_weights import load_hf, save_hf
from trimpi_jax.models.processor import copy_processor_files
from trimpi_jax.stages.nano_base import make_model_config

ROOT = Path(__file__).parents[2]
STAGES = ("0_base", "1_vm_cpt", "2_cot_sft", "3_rl")
EARLY = 50.0  # times the embedding of the end token: some answers end early, others late
METHOD = "trimpi_poro_dapo"
FAST_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# sums over rows are added up in another order; measured 2e-5 of a loss after all steps
NOISE = {"rtol": 1e-3, "atol": 1e-4}


def make_folder(folder: Path) -> None:
    """The base model and the data of the job."""
    shrunk = shrink_model(load_config("nano_base"))
    shrunk.model.update({"depth": 1, "vision_depth": 1, "full_attention_blocks": (0,)})
    config = make_model_config(shrunk)
    params = jax.device_get(vlm.init_params(config, jax.random.key(0)))
    table = np.array(params["language"]["embed"]["embedding"])
    table[list(config.eos_token_ids)] *= EARLY
    params["language"]["embed"]["embedding"] = table
    save_hf(folder / "base", config, params)
    copy_processor_files(ASSETS, folder / "base")
    options = get_config(f"{folder},{METHOD}").data.to_dict()
    dataset = options.pop("dataset")
    build(dataset, make_settings(dataset, options), folder / "data", lambda done, total: None)


def start(
    job: Path, workdir: Path, count: int, devices: int, method: str = METHOD
) -> list[subprocess.Popen]:
    """`count` processes of the job, with so many fake devices each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{FAST_COMPILES} --xla_force_host_platform_device_count={devices}",
        # one process alone compiles once in this test
        "JAX_COMPILATION_CACHE_DIR": str(job / "compiled") if count == 1 else "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    alone = [
        sys.executable, "-m", "trimpi_jax.train", "--workdir", str(workdir),
        "--config", f"tests/multihost/tiny_job.py:{job},{method}",
    ]  # fmt: skip
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", "--lost_after_s=20"]
    return [
        subprocess.Popen(
            [*alone, *together, f"--process_id={number}"] if count > 1 else alone,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit status, output) of all."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(one.returncode, output) for one, output in zip(processes, outputs, strict=True)]


def kill_in_rl(processes: list[subprocess.Popen], workdir: Path, steps: int, victim: int) -> None:
    """SIGKILL for one of them, once RL has told of so many more steps."""
    path = workdir / "3_rl" / "metrics.jsonl"
    before = len(read_metrics(path))
    while len(read_metrics(path)) < before + steps:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)


def same_metrics(expected: Path, found: Path) -> list[dict]:
    """The expected metrics of a stage, which those found equal."""
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (expected, found)]
    assert len(lines[0]) == len(lines[1]) > 2
    for theirs, ours in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.startswith("time/") or name == "rollouts/tokens_per_s":
                continue
            if isinstance(value, float):
                np.testing.assert_allclose(ours[name], value, **NOISE, err_msg=name)
            else:
                assert ours[name] == value, name
    return lines[0]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    make_folder(folder)
    return folder


@pytest.fixture(scope="module")
def alone(job):
    """The job as one process does it."""
    ((status, output),) = finish(start(job, job / "alone", 1, 1))
    assert status == 0, output
    return job / "alone"


@pytest.fixture(scope="module")
def turns(job):
    """The job as four, two and one process do it in turns; what those said that lost another."""
    workdir, seed = job / "turns", random.randrange(1000)
    chance = random.Random(seed)
    print(f"seed {seed}")  # shown when a test fails
    four = start(job, workdir, 4, 1)
    victim = chance.randrange(1, 4)
    kill_in_rl(four, workdir, chance.randint(1, 2), victim)
    said = [finish(four, timeout=60)]
    two = start(job, workdir, 2, 2)
    kill_in_rl(two, workdir, chance.randint(1, 2), 0)  # the one that holds the others together
    said.append(finish(two, timeout=60))
    said.append(finish(start(job, workdir, 1, 1)))
    return workdir, said, (victim, 0)


@pytest.mark.timeout(600)
def test_who_loses_another_ends_and_says_so(turns):
    _, (four, two, _), victims = turns
    for said, victim in zip((four, two), victims, strict=True):
        for number, (status, output) in enumerate(said):
            assert status == -signal.SIGKILL if number == victim else status, output
            assert f"process {number} of {len(said)}" in output
            assert "start the same command again on every host" in output
    assert all("unhealthy" in said for number, (_, said) in enumerate(four) if number != victims[0])


@pytest.mark.timeout(600)
def test_another_number_of_processes_goes_on(turns):
    _, (_, two, one), _ = turns
    assert "rl: continuing at step" in two[0][1]
    ((status, output),) = one
    assert status == 0, output
    assert "rl: continuing at step" in output
    for name in STAGES[1:3]:
        assert f"{name[2:]}: finished before, skipped" in two[0][1]


@pytest.mark.timeout(600)
def test_all_numbers_are_those_of_one_process(alone, turns):
    workdir, *_ = turns
    for stage in STAGES[1:]:
        expected = same_metrics(alone / stage, workdir / stage)
    trained = expected  # of RL
    assert sum(line["rollouts/groups"] for line in trained) > 8
    assert any(line["rollouts/attempts"] > 1 for line in trained)  # dynamic sampling had to ask
    weights = [jax.tree.leaves(load_hf(folder / "final")[1]) for folder in (alone, workdir)]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-4)


@pytest.mark.timeout(600)
def test_all_texts_are_those_of_one_process(alone, turns):
    workdir, *_ = turns

    def by_step(folder):
        found = collections.defaultdict(list)
        for line in (folder / "3_rl" / "rollouts.jsonl").read_text().splitlines():
            record = json.loads(line)
            record["reward"] = round(record["reward"], 4)
            found[record.pop("step")].append(record)
        return found

    expected, found = by_step(alone), by_step(workdir)
    assert found.keys() == expected.keys()
    for step, records in expected.items():
        starts = len(found[step]) // len(records)  # a step that was lost is told again
        assert found[step] == records * starts
    for stage in STAGES:
        for suite in ("main", "in_context"):
            ours, theirs = (
                json.loads((folder / stage / "evaluation" / f"{suite}.json").read_text())
                for folder in (workdir, alone)
            )
            assert ours["records"] == theirs["records"]


@pytest.mark.timeout(600)
def test_the_first_process_alone_writes(turns):
    workdir, *_ = turns
    for stage in STAGES[1:3]:  # of four processes that nothing stopped
        lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    for stage in STAGES:
        names = {path.name for path in (workdir / stage / "evaluation").iterdir()}
        assert names == {"main.json", "in_context.json"}
    assert (workdir / "report.html").is_file()
    assert not list(workdir.glob("*/*.part"))


@pytest.mark.timeout(600)
def test_grpo_with_its_reference_on_two_processes(job):
    """The KL anchor is cut over the processes as the weights are."""
    folders = [job / f"grpo_{count}" for count in (1, 2)]
    for count, folder in enumerate(folders, start=1):
        for status, output in finish(start(job, folder, count, 1, method="base_grpo")):
            assert status == 0, output
    trained = same_metrics(*(folder / "1_rl" for folder in folders))
    assert any(line["train/kl"] > 0 for line in trained)
