"""Starting together: what is compared, how it is told, and who is alone; no second process here."""

import dataclasses
import re
import socket
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from trimpi_jax.io import hosts
from trimpi_jax.io.hosts import (
    Hosts,
    StartFlags,
    check_start_flags,
    commit,
    compare_hosts,
    connected_to,
    describe_clocks,
    describe_differences,
    find_cluster,
    flatten,
    gather_facts,
    look_at_folder,
    source_digest,
    start_hosts,
    visible_devices,
    write_problem,
)

NAMES = ["a", "b", "c", "d"]


def test_equal_facts_are_no_difference():
    assert describe_differences([{"jax": "1", "commit": "x"}] * 4, NAMES) == []


def test_the_odd_one_out_is_named():
    facts = [{"jax": "1"}, {"jax": "1"}, {"jax": "2"}, {"jax": "1"}]
    assert describe_differences(facts, NAMES) == ["jax: process 2 (c) has 2; the other 3 have 1"]


def test_of_two_nobody_is_right():
    assert describe_differences([{"jax": "1"}, {"jax": "2"}], NAMES) == [
        "jax: process 0 (a) has 1; process 1 (b) has 2"
    ]


def test_a_fact_that_only_some_have_differs():
    facts = [{"jax": "1", "libtpu": "3"}, {"jax": "1"}, {"jax": "1"}]
    assert describe_differences(facts, NAMES) == [
        "libtpu: process 0 (a) has 3; the other 2 have absent"
    ]


def test_several_groups_and_all_facts_are_told_at_once():
    facts = [{"x": "1", "y": "0"}, {"x": "2", "y": "0"}, {"x": "3", "y": "9"}, {"x": "1", "y": "0"}]
    assert describe_differences(facts, NAMES) == [
        "x: process 1 (b) has 2; process 2 (c) has 3; the other 2 have 1",
        "y: process 2 (c) has 9; the other 3 have 0",
    ]


def test_clocks_are_compared_with_the_middle_one():
    assert describe_clocks([100.0, 100.5, 101.0, 159.0], NAMES) == []
    [line] = describe_clocks([100.0, 100.5, 4000.0, 101.0], NAMES)
    assert line.startswith("clock: process 2 (c) is +3900 s off") or "+3899" in line


def test_a_config_is_compared_key_by_key(tmp_path):
    config = ConfigDict({"seed": 0, "mesh": {"data": -1}, "data_dir": "", "stages": ("rl",)})
    facts = gather_facts(config, tmp_path)
    assert facts["config.mesh.data"] == "-1"
    assert facts["config.stages"] == '["rl"]'
    assert facts["devices"].startswith(f"{jax.local_device_count()} x ")
    assert "data manifest" not in facts
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    first = gather_facts(config, tmp_path)["data manifest"]
    (tmp_path / "data" / "manifest.json").write_text("{ }")
    assert gather_facts(config, tmp_path)["data manifest"] != first


def test_flatten_keeps_every_leaf():
    assert flatten({"a": {"b": [1], "c": {}}}, "x") == {"x.a.b": "[1]", "x.a.c": "{}"}


def test_the_source_is_compared_where_no_commit_can_tell(tmp_path):
    (tmp_path / "trimpi_jax").mkdir()
    (tmp_path / "trimpi_jax" / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "trimpi_jax" / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("abc\n")
    assert commit(tmp_path) == "abc"


def test_a_commit_with_edits_says_so(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words],
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-qm", "one")
    clean = commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a.py").write_text("2\n")
    assert commit(tmp_path) == f"{clean}-changed"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"process_id": None}, "missing: --process_id"),
        ({"coordinator": None, "num_processes": None}, "--coordinator, --num_processes"),
        ({"process_id": 2}, "numbered 0 to 1"),
        ({"process_id": -1}, "numbered 0 to 1"),
        ({"coordinator": "host"}, "HOST:PORT"),
    ],
)
def test_flags_that_do_not_belong_together(changes, problem):
    start = dataclasses.replace(StartFlags("host:1", 2, 0), **changes)
    with pytest.raises(ValueError, match=problem):
        check_start_flags(start)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_a_laptop_is_alone_and_a_slurm_step_is_not(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    assert find_cluster({}) == ""
    assert start_hosts(StartFlags()) == Hosts(0, 1, "alone")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_cluster(SLURM) == "slurm"
    assert find_cluster(SLURM | {"SLURM_NTASKS": "1"}) == ""


def test_a_pod_of_its_own_is_alone(monkeypatch, recwarn):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert find_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == ""
    assert not recwarn.list


def test_one_slurm_task_a_node_drives_all_of_its_gpus():
    node = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}
    assert visible_devices(node) == list(range(8))
    assert visible_devices(node | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}) is None
    assert visible_devices(node | {"SLURM_STEP_TASKS_PER_NODE": "1,8"}) is None
    assert visible_devices(node | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) is None
    assert visible_devices({}) is None


def test_one_process_has_nobody_to_agree_with():
    assert compare_hosts(Hosts(0, 1, "alone"), {}, None, 1.0) == [socket.gethostname()]


def test_a_folder_must_be_the_one_that_process_0_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "SHARED_FOLDER_WAIT_S", 0.0)
    (tmp_path / "marker").touch()
    assert look_at_folder(tmp_path, "marker") == ""
    assert "not the folder that process 0 sees" in look_at_folder(tmp_path / "other", "marker")
    assert "process 0 could not write" in look_at_folder(tmp_path, "")
    (tmp_path / "file").touch()
    assert "not writable" in look_at_folder(tmp_path / "file" / "below", "marker")
    assert write_problem(tmp_path) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "marker", "other"]


def test_the_coordinator_knows_who_has_connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert connected_to(port) == []
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert connected_to(port) == []  # its own connection does not count
            with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
                assert connected_to(port) == ["127.0.0.1"]


def test_a_wait_that_nothing_can_leave_ends_with_a_message():
    program = (
        "import threading\n"
        "from trimpi_jax.io.hosts import deadline\n"
        "with deadline(0.1, lambda: 'nobody came'):\n"
        "    threading.Event().wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "TimeoutError: after 0.1 s nobody came"
