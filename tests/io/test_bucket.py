"""Checkpoints in a bucket: Orbax, TensorStore and gcsfs themselves, the server on this machine.

What a real bucket adds, logins, quotas, other regions, is not tried here.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "bucket_process.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("gcsfs", reason="the extra gcs")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="the test extra brings it")
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def with_generation(request, response, storage):
        """The header that the emulator forgets, and TensorStore wants of what it reads twice."""
        with contextlib.suppress(Exception):  # no such object: the emulator's to tell
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]
        return download(request, response, storage)

    monkeypatch.setattr(objects, "download", with_generation)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = emulator.create_server(
        "127.0.0.1", port, in_memory=True, default_bucket="runs-bucket"
    )
    started.start()
    yield f"http://127.0.0.1:{port}"
    started.stop()


@pytest.mark.timeout(240)
def test_a_run_in_a_bucket_is_stopped_resumed_and_keeps_its_best(server, tmp_path):
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), "gs://runs-bucket"],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "STORAGE_EMULATOR_HOST": server,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": server,
            "GOOGLE_CLOUD_PROJECT": "none",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["probe"] == ""
    assert found["stopped"] == 75
    assert found["after the stop"] == [2, 3]
    assert found["said"][0] == "toy: continuing at step 3 of 6"
    assert found["at the end"] == [4, 6]
    assert found["total"] == 58  # the best of the bucket, as on a disk
    assert "step 4 of 6 is handed on" in found["said"][-1]
    assert found["claim"] == ""
    assert "not writable" in found["no bucket"]
    assert not (tmp_path / "checkpoints").exists()
