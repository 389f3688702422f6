"""The scripts against programs that record what they were asked: exact commands, and failures."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.tpu_scripts.stand_in import SCRIPTS, StandIns

SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch"])
DOORS = [path for path in SHELL_FILES if path.name != "settings.sh"]
ALWAYS = 10**6
GONE = {"err": "ERROR: (gcloud) NOT_FOUND: Resource was not found", "status": 1}


@pytest.fixture
def programs(tmp_path):
    return lambda *answers: StandIns(tmp_path / "stand_ins", list(answers))


def state(value: str, kind: str = "tpu-vm", times: int = 1) -> dict:
    return {"match": f"gcloud compute tpus {kind} describe", "out": f"{value}\n", "times": times}


def gone(kind: str = "tpu-vm", times: int = 1) -> dict:
    return {"match": f"gcloud compute tpus {kind} describe", "times": times, **GONE}


def worker(*states: str, times: int = 1) -> dict:
    out = "".join(f"host{number}: train {one}\n" for number, one in enumerate(states))
    return {"match": r"tpu-vm ssh .*worker\.sh status", "out": out, "times": times}


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).parent / "shellcheck"
    if not checker.exists():
        found = shutil.which("shellcheck")
        if found is None:
            pytest.skip("shellcheck is not installed (the test extra brings it)")
        checker = Path(found)
    result = subprocess.run(
        [checker, "-x", f"--source-path={SCRIPTS.parent}", *SHELL_FILES],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", DOORS, ids=lambda path: path.name)
def test_every_script_is_strict_and_started_with_nothing_harms_nobody(path, programs):
    assert "set -euo pipefail" in path.read_text()
    stand_ins = programs()
    result = stand_ins.run(path.name)
    if path.name == "slurm.sbatch":  # no zone, no hosts: it may run
        assert stand_ins.calls() == [
            "srun --kill-on-bad-exit=1 .venv/bin/python -u -m trimpi_jax.train"
        ]
        return
    assert result.returncode != 0
    assert result.stderr
    assert stand_ins.calls() == []


HELPED = [path for path in DOORS if path.name != "worker.sh"]  # its arguments are positional


@pytest.mark.parametrize("path", HELPED, ids=lambda path: path.name)
def test_help_is_the_comment_at_the_top(path, programs):
    result = programs().run(path.name, "--help")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] in path.read_text().splitlines()[1]


def test_nothing_names_a_zone_a_project_or_a_secret():
    zone = re.compile(r"\b(us|europe|asia|me)-(central|east|west|south|north)[a-z]*\d+-[a-f]\b")
    for path in SCRIPTS.iterdir():
        assert not zone.search(path.read_text()), path.name


DRY_RUNS = {
    "create.sh": ((), {}),
    "setup.sh": ((), {"NFS_SHARE": "10.0.0.2:/share"}),
    "launch.sh": (("--", "--workdir", "/mnt/trimpi/a b"), {}),
    "logs.sh": ((), {}),
    "status.sh": ((), {}),
    "watch.sh": (("--", "--workdir", "/mnt/trimpi/a"), {"PROVISIONING": "queued-spot"}),
    "delete.sh": ((), {}),
    "smoke.sh": ((), {}),
    "ssh_hosts.sh": (("start", "--", "--workdir", "/a"), {"HOSTS": "one two"}),
    "gke.sh": (("start", "--", "--workdir", "/mnt/trimpi/a"), {"IMAGE": "i:1", "CLAIM": "c"}),
    "slurm.sbatch": (("--workdir", "/a"), {}),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_asks_nobody_and_prints_what_would_be_asked(name, programs):
    arguments, settings = DRY_RUNS[name]
    stand_ins = programs()
    result = stand_ins.run(name, "--dry-run", *arguments, ZONE="here-a", **settings)
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls() == []
    first = shlex.split(result.stdout.splitlines()[0])
    assert first[0] in ("gcloud", "git", "ssh", "kubectl", "srun")


def test_what_a_dry_run_prints_is_what_is_asked(programs):
    stand_ins = programs()
    arguments = ("--", "--config", "configs/nano.py", "--workdir", "/mnt/trimpi/it's $HOME")
    dry = stand_ins.run("launch.sh", "--dry-run", *arguments, ZONE="here-a", PROJECT="p")
    wet = stand_ins.run("launch.sh", *arguments, ZONE="here-a", PROJECT="p")
    assert wet.returncode == 0, wet.stderr
    assert [" ".join(shlex.split(dry.stdout))] == stand_ins.calls()


@pytest.mark.parametrize(
    ("provisioning", "accelerator", "expected"),
    [
        ("on-demand", "v6e-8", "tpu-vm create t --zone=z --accelerator-type=v6e-8"
         " --version=v2-alpha-tpuv6e"),
        ("spot", "v5p-8", "tpu-vm create t --zone=z --accelerator-type=v5p-8"
         " --version=v2-alpha-tpuv5 --spot"),
        ("queued", "v5litepod-8", "queued-resources create t-queued --node-id=t --zone=z"
         " --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite"),
        ("queued-spot", "v4-8", "queued-resources create t-queued --node-id=t --zone=z"
         " --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base --spot"),
    ],
)  # fmt: skip
def test_create_asks_for_what_was_wanted(programs, provisioning, accelerator, expected):
    stand_ins = programs(
        gone("queued-resources"),
        state("WAITING_FOR_RESOURCES", "queued-resources"),
        state("PROVISIONING", "queued-resources"),
        state("ACTIVE", "queued-resources"),
    )
    settings = {"PROVISIONING": provisioning, "ACCELERATOR_TYPE": accelerator}
    result = stand_ins.run("create.sh", ZONE="z", TPU_NAME="t", **settings)
    assert result.returncode == 0, result.stderr
    created = [call for call in stand_ins.calls() if " create " in call]
    assert created == [f"gcloud compute tpus {expected}"]
    if provisioning.startswith("queued"):
        assert "PROVISIONING" in result.stderr


def test_create_reports_a_request_that_failed(programs):
    stand_ins = programs(gone("queued-resources"), state("FAILED", "queued-resources"))
    result = stand_ins.run("create.sh", ZONE="z", PROVISIONING="queued")
    assert result.returncode == 1
    assert "trimpi-queued is FAILED" in result.stderr


def test_create_asks_again_for_what_a_preemption_left(programs):
    stand_ins = programs(
        state("SUSPENDED", "queued-resources"), state("ACTIVE", "queued-resources")
    )
    result = stand_ins.run("create.sh", ZONE="z", PROVISIONING="queued-spot")
    assert result.returncode == 0, result.stderr
    verbs = [call.split()[4] for call in stand_ins.calls()]
    assert verbs == ["describe", "delete", "create", "describe"]


def test_create_stops_waiting_after_a_stated_time(programs):
    waiting = state("WAITING_FOR_RESOURCES", "queued-resources", times=ALWAYS)
    stand_ins = programs(gone("queued-resources"), waiting)
    result = stand_ins.run("create.sh", ZONE="z", PROVISIONING="queued", WAIT_S="60", POLL_S="30")
    assert result.returncode == 1
    assert "still WAITING_FOR_RESOURCES after 60 s" in result.stderr


def test_create_passes_a_refusal_on(programs):
    stand_ins = programs({"match": "tpu-vm create", "err": "ERROR: Quota exceeded\n", "status": 1})
    result = stand_ins.run("create.sh", ZONE="z")
    assert result.returncode == 1
    assert "Quota exceeded" in result.stderr


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"ZONE": ""}, "ZONE is not set"),
        ({"PROVISIONING": "cheap"}, "got 'cheap'"),
        ({"ACCELERATOR_TYPE": "h100"}, "set RUNTIME_VERSION"),
    ],
)
def test_create_refuses_what_it_does_not_know(programs, settings, problem):
    stand_ins = programs()
    result = stand_ins.run("create.sh", **({"ZONE": "z"} | settings))
    assert result.returncode == 2
    assert problem in result.stderr
    assert stand_ins.calls() == []


def test_setup_installs_the_commit_everywhere_in_order(programs):
    stand_ins = programs()
    result = stand_ins.run(
        "setup.sh", ZONE="z", ALLOW_UNCOMMITTED="1", NFS_SHARE="1.2.3.4:/s", EXTRAS="tpu,gta"
    )
    assert result.returncode == 0, result.stderr
    calls = stand_ins.calls()
    commit = subprocess.check_output(
        ["git", "-C", SCRIPTS.parent, "rev-parse", "HEAD"], text=True
    ).strip()
    assert all("--worker=all" in call for call in calls)
    assert "scp" in calls[1] and calls[1].endswith("--worker=all")
    assert f"echo {commit} > source.new/COMMIT" in calls[2]
    assert "source[tpu,gta]" in calls[3]
    assert "mount -t nfs -o hard,noatime,nolock 1.2.3.4:/s /mnt/trimpi" in calls[4]


def test_setup_stops_at_the_first_failure(programs):
    stand_ins = programs({"match": "tpu-vm scp", "err": "connection reset\n", "status": 1})
    result = stand_ins.run("setup.sh", ZONE="z", ALLOW_UNCOMMITTED="1")
    assert result.returncode == 1
    assert len(stand_ins.calls()) == 2
    assert "is installed" not in result.stderr


def test_launch_wants_a_workdir(programs):
    result = programs().run("launch.sh", "--", "--config", "configs/nano.py", ZONE="z")
    assert result.returncode == 2
    assert "--workdir" in result.stderr


def test_delete_asks_first_and_takes_the_queued_resource_with_it(programs):
    stand_ins = programs(state("ACTIVE", "queued-resources"))
    settings = {"ZONE": "z", "PROVISIONING": "queued"}
    assert stand_ins.run("delete.sh", **settings).returncode == 1  # nobody says yes
    assert stand_ins.calls() == []
    assert stand_ins.run("delete.sh", "--yes", **settings).returncode == 0
    assert stand_ins.calls()[-1] == (
        "gcloud compute tpus queued-resources delete trimpi-queued --zone=z --force --quiet"
    )


def test_delete_of_what_is_not_there_is_no_failure(programs):
    stand_ins = programs(gone())
    result = stand_ins.run("delete.sh", "--yes", ZONE="z")
    assert result.returncode == 0
    assert "is not there" in result.stderr
    assert len(stand_ins.calls()) == 1


def test_a_network_that_is_down_is_no_tpu_that_is_gone(programs):
    stand_ins = programs(
        {"match": "describe", "err": "Could not reach the server\n", "status": 1, "times": ALWAYS}
    )
    result = stand_ins.run("delete.sh", "--yes", ZONE="z")
    assert result.returncode == 1
    assert "Could not reach the server" in result.stderr
    watched = stand_ins.run("watch.sh", "--", "--workdir=/w", ZONE="z", MAX_UNKNOWN="3")
    assert watched.returncode == 1
    assert "nothing was changed" in watched.stderr
    assert all("describe" in call for call in stand_ins.calls())


def watch(stand_ins, **settings):
    return stand_ins.run(
        "watch.sh", "--", "--workdir", "/mnt/trimpi/w", ZONE="z", ALLOW_UNCOMMITTED="1", **settings
    )


def done(calls: list[str]) -> list[str]:
    """The story of a watch in words."""
    words = {
        "create": " create ", "delete": " delete ", "setup": " scp ", "launch": "worker.sh start"
    }  # fmt: skip
    return [word for call in calls for word, mark in words.items() if mark in call]


def test_watch_starts_again_what_stopped_itself_and_ends_when_it_is_finished(programs):
    stand_ins = programs(
        state("READY", times=ALWAYS),
        worker("absent", "absent"),
        worker("running 7", "running 8"),
        worker("exit 75", "running 8"),  # not before all have stopped
        worker("exit 75", "exit 75"),
        worker("running 9", "running 9"),
        worker("exit 0", "exit 0"),
    )
    result = watch(stand_ins)
    assert result.returncode == 0, result.stderr
    assert done(stand_ins.calls()) == ["launch", "launch"]
    assert "start 1 of at most 100" in result.stderr


def test_watch_rents_anew_after_a_preemption(programs):
    stand_ins = programs(
        state("READY"),
        worker("running 7"),
        state("PREEMPTED", times=2),  # watch, then delete
        state("READY", times=ALWAYS),
        worker("exit 0"),
    )
    result = watch(stand_ins, PROVISIONING="spot")
    assert result.returncode == 0, result.stderr
    assert done(stand_ins.calls()) == ["delete", "create", "setup", "launch"]


def test_watch_sets_up_again_after_a_machine_restarted(programs):
    stand_ins = programs(
        state("READY", times=ALWAYS), worker("lost", "exit 75"), worker("exit 0", "exit 0")
    )
    assert watch(stand_ins).returncode == 0
    assert done(stand_ins.calls()) == ["setup", "launch"]


def test_watch_starts_again_what_a_signal_ended(programs):
    stand_ins = programs(
        state("READY", times=ALWAYS), worker("exit 137", "exit 134"), worker("exit 0", "exit 0")
    )
    assert watch(stand_ins).returncode == 0
    assert done(stand_ins.calls()) == ["launch"]


@pytest.mark.parametrize("status", ["1", "2", "127", "76"])
def test_watch_does_not_repeat_a_failure(programs, status):
    stand_ins = programs(
        state("READY", times=ALWAYS),
        worker(f"exit {status}", "running 7"),
        {"match": "worker.sh log", "out": "ValueError: the mesh does not fit\n"},
    )
    result = watch(stand_ins)
    assert result.returncode == 1
    assert done(stand_ins.calls()) == []
    assert f"ended with exit {status};" in result.stderr
    assert "the mesh does not fit" in result.stdout


def test_watch_gives_up_after_so_many_restarts(programs):
    stand_ins = programs(state("READY", times=ALWAYS), worker("exit 75", times=ALWAYS))
    result = watch(stand_ins, MAX_RESTARTS="2")
    assert result.returncode == 1
    assert "MAX_RESTARTS=2 is used up" in result.stderr
    assert done(stand_ins.calls()) == ["launch", "launch"]


def test_watch_tries_again_when_there_is_no_capacity(programs):
    stand_ins = programs(
        gone(times=2),
        state("READY", times=ALWAYS),
        {"match": "tpu-vm create", "err": "no more capacity\n", "status": 1},
        worker("exit 0"),
    )
    result = watch(stand_ins, PROVISIONING="spot")
    assert result.returncode == 0, result.stderr
    assert done(stand_ins.calls()) == ["create", "create", "setup", "launch"]


def test_watch_refuses_a_workdir_that_dies_with_a_spot_vm(programs):
    stand_ins = programs()
    result = stand_ins.run("watch.sh", "--", "--workdir", "/home/w", ZONE="z", PROVISIONING="spot")
    assert result.returncode == 2
    assert "--workdir under MOUNT_DIR" in result.stderr
    assert stand_ins.calls() == []


@pytest.mark.parametrize("failing", ["", "tpu-vm create", "trimpi_jax.doctor"])
def test_smoke_gives_everything_back_whatever_happens(programs, failing):
    answers = [gone(), state("READY", times=ALWAYS)]
    if failing:
        answers.append({"match": failing, "err": "it failed\n", "status": 1})
    stand_ins = programs(*answers)
    result = stand_ins.run("smoke.sh", ZONE="z", ALLOW_UNCOMMITTED="1")
    assert (result.returncode != 0) == bool(failing)
    assert stand_ins.calls()[-1] == (
        "gcloud compute tpus tpu-vm delete trimpi-smoke --zone=z --quiet"
    )
    trained = any("trimpi_jax.train" in call for call in stand_ins.calls())
    assert trained != bool(failing)


def test_smoke_leaves_a_tpu_alone_that_it_did_not_make(programs):
    stand_ins = programs(state("READY", times=ALWAYS))
    result = stand_ins.run("smoke.sh", ZONE="z", TPU_NAME="mine")
    assert result.returncode == 1
    assert done(stand_ins.calls()) == []


def test_ssh_hosts_tell_each_host_who_it_is(programs):
    stand_ins = programs()
    result = stand_ins.run(
        "ssh_hosts.sh", "start", "--", "--workdir", "/shared/a b", HOSTS="me@one two"
    )
    assert result.returncode == 0, result.stderr
    first, second = stand_ins.calls(of="ssh")
    assert " me@one " in first and " two " in second
    for number, call in enumerate((first, second)):
        flags = f"--coordinator=one:8476 --num_processes=2 --process_id={number}"
        assert call.endswith(f"trimpi_jax.train --workdir '/shared/a b' {flags}")


def test_ssh_hosts_stop_the_others_when_one_cannot_start(programs):
    stand_ins = programs({"match": "^ssh .* two ", "err": "no route to host\n", "status": 255})
    result = stand_ins.run("ssh_hosts.sh", "start", "--", "--workdir", "/w", HOSTS="one two three")
    assert result.returncode == 1
    assert "two could not be started" in result.stderr
    calls = stand_ins.calls(of="ssh")
    assert len(calls) == 3
    assert " one " in calls[2] and "worker.sh stop train" in calls[2]


def test_slurm_puts_a_run_back_that_stopped_itself(programs):
    stand_ins = programs(
        {"match": "^srun", "status": 75, "times": 2}, {"match": "^srun", "status": 1}
    )
    settings = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}
    result = stand_ins.run("slurm.sbatch", "--workdir", "/w", **settings)
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls()[-1] == "scontrol requeue 12"
    last = stand_ins.run("slurm.sbatch", "--workdir", "/w", **settings, MAX_RESTARTS="3")
    assert last.returncode == 1
    assert "MAX_RESTARTS=3 is used up" in last.stderr
    failed = stand_ins.run("slurm.sbatch", "--workdir", "/w", **settings)
    assert failed.returncode == 1
    assert stand_ins.calls().count("scontrol requeue 12") == 1


GKE = {"IMAGE": "registry/trimpi:1", "CLAIM": "runs", "RUN_NAME": "clevr", "MAX_RESTARTS": "7"}


def test_the_jobset_restarts_what_may_be_restarted_and_only_that(programs):
    yaml = pytest.importorskip("yaml")
    stand_ins = programs({"match": "kubectl create", "does": 'cat > "$STAND_IN/manifest.yaml"'})
    arguments = ("--config", 'a "quoted" \\ word', "--workdir", "/mnt/trimpi/w")
    result = stand_ins.run(
        "gke.sh", "start", "--", *arguments, HOSTS_PER_SLICE="4", GKE_TOPOLOGY="2x2x4", **GKE
    )
    assert result.returncode == 0, result.stderr
    text = (stand_ins.folder / "manifest.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert "@" not in "".join(line.split("#")[0] for line in text.splitlines())
    spec = manifest["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    codes = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]
             if rule["action"] == "FailJob"]  # fmt: skip
    assert codes == [[1, 2]]  # 75 and signals start again
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
    [container] = pod["containers"]
    assert container["args"] == ["-u", "-m", "trimpi_jax.train", *arguments]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_gke_passes_failures_and_other_questions_on(programs):
    stand_ins = programs({"match": "create", "err": "AlreadyExists\n", "status": 1})
    failed = stand_ins.run("gke.sh", "start", "--", "--workdir", "/mnt/trimpi/w", **GKE)
    assert failed.returncode == 1
    assert "AlreadyExists" in failed.stderr
    assert stand_ins.run("gke.sh", "log", **GKE).returncode == 0
    assert "jobset-name=clevr" in stand_ins.calls()[-1]
    assert stand_ins.run("gke.sh", "delete", **GKE).returncode == 0
    assert stand_ins.calls()[-1] == "kubectl delete jobset clevr --namespace=default"
    away = stand_ins.run("gke.sh", "start", "--", "--workdir", "/tmp/w", **GKE)
    assert away.returncode == 2
    assert "--workdir under MOUNT_DIR" in away.stderr


def test_xpk_is_told_which_status_means_start_me_again(programs):
    stand_ins = programs()
    result = stand_ins.run(
        "gke.sh", "xpk", "--", "--workdir", "/w", CLUSTER="c", ZONE="z", **GKE
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    [call] = stand_ins.calls()
    assert call.startswith("xpk workload create --cluster=c --workload=clevr --tpu-type=v5p-8")
    assert "--restart-on-exit-codes=75" in call


@pytest.fixture
def work(tmp_path):
    """worker.sh for real, on this machine."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", SCRIPTS / "worker.sh", *arguments],
            env={"PATH": "/usr/bin:/bin", "RUNS_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def wait_for(look, expected: str) -> None:
    """Until a look shows what is expected; the test's own limit ends a wait for nothing."""
    while expected not in look():
        time.sleep(0.02)


@pytest.mark.timeout(60)
def test_a_worker_keeps_status_and_log_of_a_run(work):
    assert work("status", "r").stdout.endswith("r absent\n")
    assert work("start", "r", "bash", "-c", "echo 'a  b'; exit 75").returncode == 0
    wait_for(lambda: work("status", "r").stdout, "exit 75")
    assert "a  b" in work("log", "r", "5").stdout


@pytest.mark.timeout(60)
def test_a_worker_is_started_once_and_stops_by_saving(work):
    save = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    assert work("start", "r", "bash", "-c", save).returncode == 0
    wait_for(lambda: work("log", "r", "5").stdout, "ready")
    second = work("start", "r", "true")
    assert second.returncode == 3
    assert "running" in second.stderr
    assert work("stop", "r").returncode == 0
    wait_for(lambda: work("status", "r").stdout, "exit 75")
    assert "saved" in work("log", "r", "5").stdout


@pytest.mark.timeout(60)
def test_a_run_that_was_killed_is_lost_and_can_be_started_again(work, tmp_path):
    assert work("start", "r", "sleep", "600").returncode == 0
    wrapper = int((tmp_path / "r.pid").read_text().split()[0])
    os.killpg(wrapper, signal.SIGKILL)
    wait_for(lambda: work("status", "r").stdout, "lost")
    assert work("start", "r", "true").returncode == 0
    wait_for(lambda: work("status", "r").stdout, "exit 0")


def test_the_dockerfile_installs_extras_that_exist():
    text = (SCRIPTS / "Dockerfile").read_text()
    extras = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"ACCELERATOR=(\w+)", text))
    assert named == {"cuda13", "tpu"}
    assert named <= extras["optional-dependencies"].keys()
    for folder in re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE):
        assert (SCRIPTS.parent / folder).is_dir()


TOY = """
import sys, time
from pathlib import Path
from tests.stages.test_loop import Toy

class Slow(Toy):
    def take_step(self, state, step, examples):
        if step == 3 and not (folder / "stopped").exists():  # until it is told to stop
            (folder / "ready").touch()
            while not (folder / "stopped").exists():
                time.sleep(0.02)
        return Toy.take_step(self, state, step, examples)

folder = Path(sys.argv[sys.argv.index("--workdir") + 1])
folder.mkdir(exist_ok=True)
total = Slow(folder).run()["total"]
(folder / "total").write_text(str(float(total)))
"""


@pytest.mark.timeout(240)
def test_a_preempted_run_is_saved_and_started_again_by_watch(programs, tmp_path):
    """watch.sh and worker.sh for real, gcloud's ssh a shell here, training a loop of numbers."""
    stand_ins = programs(
        state("READY", times=ALWAYS),
        {
            "match": "gcloud compute tpus tpu-vm ssh",
            "times": ALWAYS,
            "does": 'cd "$HOME"; eval "${1#--command=}"',
        },
        {"match": "^sleep", "times": ALWAYS, "does": "/bin/sleep 0.2"},
    )
    home = stand_ins.folder / "trimpi"
    (home / "venv" / "bin").mkdir(parents=True)
    (home / "source").mkdir()
    (home / "source" / "tpu_scripts").symlink_to(SCRIPTS)
    (home / "toy.py").write_text(TOY)
    python = home / "venv" / "bin" / "python"
    root = SCRIPTS.parent
    python.write_text(
        f"#!/bin/sh\nshift 3\nJAX_PLATFORMS=cpu PYTHONPATH={root} exec"
        f' {sys.executable} {home}/toy.py "$@"\n'  # after -u -m MODULE
    )
    python.chmod(0o755)
    workdir = tmp_path / "run"
    watching = subprocess.Popen(
        ["bash", str(SCRIPTS / "watch.sh"), "--", "--workdir", str(workdir)],
        env={
            "PATH": f"{stand_ins.bin}:{os.environ['PATH']}",
            "HOME": str(stand_ins.folder),
            "STAND_IN": str(stand_ins.folder),
            "ZONE": "z",
            "RUNS_DIR": str(home / "runs"),
        },
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not (workdir / "ready").exists() and watching.poll() is None:
            time.sleep(0.05)
        assert watching.poll() is None, watching.stdout.read()
        stopped = subprocess.run(
            ["bash", str(SCRIPTS / "worker.sh"), "stop", "train"],
            env={"PATH": "/usr/bin:/bin", "RUNS_DIR": str(home / "runs")},
            capture_output=True,
            text=True,
        )
        assert "was asked to save and stop" in stopped.stdout
        time.sleep(0.5)
        (workdir / "stopped").touch()
        said = watching.communicate(timeout=200)[0]
    finally:
        watching.kill()
    assert watching.returncode == 0, said
    assert "exit 75: start 1 of at most" in said
    assert "train is finished" in said
    log = (home / "runs" / "train.log").read_text()
    assert (workdir / "total").read_text() == "543.0"  # as without the stop, see test_loop.py
    assert log.count("start: ") == 2
