"""What is said about saving before anything is trained: options, folders, room."""

import os

import jax
import pytest

from tests.tiny_model import tiny_config as tiny_model
from trimpi_jax.io import storage
from trimpi_jax.io.checkpoints import Keep
from trimpi_jax.stages import saving
from trimpi_jax.stages.saving import (
    check_saving,
    checkpoint_bytes,
    checkpoint_folder,
    claim_checkpoints,
    delete_checkpoints,
    keep_settings,
)


@pytest.fixture
def config():
    from configs import nano

    return nano.get_config("method=trimpi_poro_grpo")


def test_what_the_options_mean(config):
    assert keep_settings(config, "rl") == Keep(2, 0, "", True, "last")
    config.keep_last, config.eval.every_steps = 1, 5
    config.rl.keep_best, config.rl.best_metric = 3, "lowest evaluation/main_accuracy"
    config.rl.result = "best"
    assert keep_settings(config, "rl") == Keep(1, 3, "evaluation/main_accuracy", False, "best")
    assert keep_settings(config, "rl").count == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_last": 0}, "keep_last is at least 1"),
        ({"rl.keep_best": 1}, "belong together"),
        ({"rl.best_metric": "lowest train/loss"}, "belong together"),
        (
            {"rl.keep_best": 1, "rl.best_metric": "best train/loss"},
            "'highest NAME' or 'lowest NAME'",
        ),
        ({"rl.result": "best"}, "needs --config.rl.keep_best"),
        ({"rl.result": "first"}, "'last' or 'best', got 'first'"),
        (
            {"rl.keep_best": 1, "rl.best_metric": "highest evaluation/main_accuracy"},
            "set --config.eval.every_steps",
        ),
    ],
)
def test_options_without_effect_are_errors(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        keep_settings(config, "rl")


def test_the_size_of_a_checkpoint_is_what_the_state_has(config):
    from trimpi_jax.models import vlm
    from trimpi_jax.stages.run_settings import optimizer_settings
    from trimpi_jax.stages.train_state import init_train_state, make_optimizer

    model = tiny_model()
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), vlm.param_shapes(model))
    optimizer = make_optimizer(optimizer_settings(config.rl, 10))
    state = init_train_state(params, optimizer, "all")
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert checkpoint_bytes(config, model, "rl") == found
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert 3 * weights <= found < 3.01 * weights + 1000  # weights and two moments, float32
    assert weights < checkpoint_bytes(config, model, "cot_sft") < 2 * weights  # LoRA's moments


def test_too_little_room_is_an_error_before_training(config, tmp_path, monkeypatch):
    model = tiny_model()
    one = checkpoint_bytes(config, model, "rl")
    models = 3 * one // 3  # of three stages, each a third of a checkpoint with its moments
    exact = 3 * one + models  # two that stay, one that is written
    monkeypatch.setattr(storage, "free_bytes", lambda folder: exact + 10_000)
    check_saving(config, model, tmp_path)
    monkeypatch.setattr(storage, "free_bytes", lambda folder: exact - one // 2)
    with pytest.raises(OSError, match=r"models of 3 stages .*3 checkpoints of \w+") as error:
        check_saving(config, model, tmp_path)
    assert "--config.keep_last" in str(error.value)
    config.keep_last = 1
    check_saving(config, model, tmp_path)  # what it advises helps
    config.keep_last = 2
    for stage in ("1_vm_cpt", "2_cot_sft"):  # finished: their models are written
        (tmp_path / stage / "model").mkdir(parents=True)
        (tmp_path / stage / "model" / "config.json").write_text("{}")
    (tmp_path / "3_rl" / "checkpoints").mkdir(parents=True)
    (tmp_path / "3_rl" / "checkpoints" / "old").write_bytes(b"\0" * (one // 2))
    check_saving(config, model, tmp_path)  # what lies there already needs no more room


def test_checkpoints_elsewhere_are_counted_there(config, tmp_path, monkeypatch):
    model = tiny_model()
    config.checkpoint_dir = str(tmp_path / "disk")
    room = {str(tmp_path / "run"): checkpoint_bytes(config, model, "rl") + 10_000}
    monkeypatch.setattr(storage, "free_bytes", lambda folder: room.get(str(folder), 0))
    real = os.stat

    def another_disk(path, **more):
        found = real(path, **more)
        if str(path) == config.checkpoint_dir:
            found = os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))
        return found

    monkeypatch.setattr(saving.os, "stat", another_disk)
    (tmp_path / "run").mkdir()
    with pytest.raises(OSError, match=r"disk has 0\.00 GiB free"):
        check_saving(config, model, tmp_path / "run")
    room[config.checkpoint_dir] = 2**40
    check_saving(config, model, tmp_path / "run")


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.checkpoint_dir = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"checkpoint_dir: .*not writable"):
        check_saving(config, tiny_model(), tmp_path)


def test_where_checkpoints_lie_and_that_they_go(config, tmp_path):
    folder = tmp_path / "run" / "3_rl"
    assert checkpoint_folder(config, folder) == str(folder / "checkpoints")
    config.checkpoint_dir = str(tmp_path / "elsewhere")
    place = tmp_path / "elsewhere" / "3_rl"
    assert checkpoint_folder(config.to_dict(), folder) == str(place)
    (place / "40").mkdir(parents=True)
    delete_checkpoints(config, folder)
    assert not place.exists() and (tmp_path / "elsewhere").exists()
    delete_checkpoints(config, folder)  # once more is no error


def test_two_starts_into_one_workdir_that_no_lock_protects(config, tmp_path, monkeypatch):
    said = []
    first = claim_checkpoints(config, tmp_path, said.append)
    again = claim_checkpoints(config, tmp_path, said.append)  # a restart here, as always
    assert said == []
    with pytest.raises(ValueError, match="was taken over by another start"):
        first()
    monkeypatch.setattr(saving.socket, "gethostname", lambda: "another-host")
    claim_checkpoints(config, tmp_path, said.append)
    assert "should that still run, it will stop at its next save" in said[0]
    with pytest.raises(ValueError, match="was taken over by another start"):
        again()


def test_two_starts_into_one_folder_of_checkpoints(config, tmp_path):
    config.checkpoint_dir = str(tmp_path)
    said = []
    first = claim_checkpoints(config, tmp_path / "run", said.append)
    first()
    second = claim_checkpoints(config, tmp_path / "run", said.append)
    assert "should that still run, it will stop at its next save" in said[0]
    second()
    with pytest.raises(ValueError, match="was taken over by another start"):
        first()
    config.seed = 7
    with pytest.raises(ValueError, match="belongs to another run"):
        claim_checkpoints(config, tmp_path / "run", said.append)
