"""The base model's own run, in the small: repeatable, resumable, and it refuses what is not its.

Everything goes through the door of training; the legs and their files are found on disk.
"""

import hashlib
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from data_pipelines.nano_base.mixture import TASKS
from tests.end_to_end.conftest import load_config, shrink_model
from tests.end_to_end.test_main_job import quiet
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.stages import loop, pipeline

STEPS = 3


def small_config():
    """Two pictures a step, policies of depth 1, three steps a leg, two legs."""
    config = shrink_model(load_config("nano_base"))
    config.scenes.count, config.lone.count = 8, 16
    config.model.tokenizer_documents = 200
    config.perception.update({"steps": STEPS, "scenes": 2, "lone": 2, "warmup_steps": 1})
    config.save_every = 1
    shares = tuple(float(task == "policy") for task in TASKS)
    policies = {"until": 1.0, "shares": shares, "depths": (1,), "shown": 1.0, "shuffled": 0.5}
    config.reading.update({"steps": STEPS, "warmup_steps": 1})
    config.reading.phases = (type(config)(policies),)
    config.joint.steps = 0  # the third leg runs as the second does
    _, _, *room = config.shapes.policy_1
    config.shapes.policy_1 = (2, 2, *room)
    return config


def losses(workdir: Path) -> dict[str, list[float]]:
    """The loss curve of every leg."""
    found = {
        path.parent.name: [line["train/loss"] for line in read_metrics(path)]
        for path in sorted(workdir.glob("*/metrics.jsonl"))
    }
    assert len(found) >= 2 and all(len(curve) == STEPS for curve in found.values())
    return found


def contents(workdir: Path) -> dict[str, str]:
    """Digest of every file, the lock aside."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in workdir.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Every start makes the same programs: the second and third take those of the first."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "unbroken"
    pipeline.run(small_config(), workdir, quiet())
    return workdir


def test_the_same_seed_gives_the_same_curve_also_when_stopped(unbroken, tmp_path, monkeypatch):
    """A second run from the same seed, stopped in the middle of its second leg and started again.

    What comes before the stop is a rerun, what comes after it a resume; float noise is allowed.
    """
    run_leg, legs = loop.run, []

    def stopping(settings, state, source, take_step, *arguments, **more):
        legs.append(settings.name)

        def step(state, number, batch):
            if len(legs) == 2 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(state, number, batch)

        return run_leg(settings, state, source, step, *arguments, **more)

    monkeypatch.setattr(loop, "run", stopping)
    with pytest.raises(loop.Stopped):
        pipeline.run(small_config(), tmp_path / "run", quiet())
    assert not (tmp_path / "run" / "final").exists()
    monkeypatch.setattr(loop, "run", run_leg)
    progress = quiet()
    pipeline.run(small_config(), tmp_path / "run", progress)
    assert f"{legs[1]}: continuing at step 2 of {STEPS}" in progress.console.export_text()
    expected, found = losses(unbroken), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    for leg, curve in expected.items():
        np.testing.assert_allclose(found[leg], curve, rtol=1e-5, err_msg=leg)
        assert len(set(curve)) == STEPS
    one, two = (load_hf(folder / "final")[1] for folder in (unbroken, tmp_path / "run"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


def test_another_seed_gives_another_curve(unbroken, tmp_path):
    config = small_config()
    config.seed = 1
    config.reading.steps = 0
    pipeline.run(config, tmp_path / "run", quiet())
    (curve,) = (read_metrics(path) for path in (tmp_path / "run").glob("*/metrics.jsonl"))
    assert [line["train/loss"] for line in curve] != losses(unbroken)["perception"]


def test_another_config_is_refused_and_changes_nothing(unbroken):
    before = contents(unbroken)
    config = small_config()
    config.reading.learning_rate *= 2
    config.model.vocab_size += 8
    with pytest.raises(ValueError) as told:
        pipeline.run(config, unbroken, quiet())
    assert "belongs to another config" in str(told.value)
    rate = config.reading.learning_rate
    assert f"config.reading.learning_rate: {rate / 2} -> {rate}" in str(told.value)
    assert "config.model.vocab_size: " in str(told.value)
    assert contents(unbroken) == before


def test_another_tokenizer_is_refused_and_changes_nothing(unbroken, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    file = workdir / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("Case", "Caze"))
    before = contents(workdir)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the one that this run was begun"):
        pipeline.run(small_config(), workdir, quiet())
    assert contents(workdir) == before != contents(unbroken)


def test_the_base_in_transformers(unbroken):
    """Model, tokenizer and template as exported: the same logits as ours, on text and images."""
    pytest.importorskip("torch")
    from tests.parity.hf_folder import assert_same_logits, load_reference

    assert_same_logits(load_reference(unbroken / "final"), unbroken / "final")
