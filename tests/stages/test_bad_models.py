"""A model that cannot be trained or exported is told before anything is written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import nano
from tests.tiny_model import ASSETS
from trimpi_jax.models import hf_weights
from trimpi_jax.models.hf_files import INDEX_FILE, SINGLE_FILE
from trimpi_jax.stages import pipeline
from trimpi_jax.stages.export_model import export, find_stage


@pytest.fixture
def model(tmp_path):
    """A copy of the nano model."""
    return shutil.copytree(ASSETS, tmp_path / "model")


def edit_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))


def truncate(folder):
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[: len(content) // 2])


def shard_and_lose_one(folder):
    config, params = hf_weights.load_hf(folder)
    hf_weights.save_hf(folder, config, params, max_shard_bytes=3_000_000)
    assert (folder / INDEX_FILE).is_file()
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def drop_tower(folder):
    stored = load_file(folder / SINGLE_FILE)
    kept = {name: value for name, value in stored.items() if not name.startswith("visual.")}
    save_file(kept, folder / SINGLE_FILE)


def widen_one(folder):
    stored = load_file(folder / SINGLE_FILE)
    stored["model.norm.weight"] = np.ones(7, np.float32)
    save_file(stored, folder / SINGLE_FILE)


def pickle_only(folder):
    (folder / SINGLE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


BAD_MODELS = [
    (truncate, r"model/model\.safetensors is damaged or cut short"),
    (shard_and_lose_one, r"index\.json names files that are not there: \['model-00002"),
    (drop_tower, "a text-only checkpoint"),
    (widen_one, r"model\.norm\.weight is \[7\].*the config says \[128\]"),
    (pickle_only, "never opened"),
    (lambda folder: edit_config(folder, model_type="llama"), r"config\.json: .*'llama'"),
    (lambda folder: edit_config(folder, vision_config=None), r"config\.json: .*text-only"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is no JSON object"),
    (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks \['tokenizer\.json'\]"),
    (shutil.rmtree, "is not a folder"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_MODELS)
def test_nothing_is_written_for_a_model_that_cannot_be_used(model, tmp_path, damage, message):
    damage(model)
    config = nano.get_config()
    config.model_dir = str(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.run(config, tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [BAD_MODELS[0], BAD_MODELS[1], BAD_MODELS[2], BAD_MODELS[5], BAD_MODELS[9]],
)
def test_nothing_is_exported_from_it_either(model, tmp_path, damage, message):
    damage(model)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_folder_is_exported_in_another_dtype_and_back(model, tmp_path):
    assert export(model, tmp_path / "half", dtype="float16").endswith("float16")
    export(model, tmp_path / "shards", max_shard_bytes=3_000_000)
    assert (tmp_path / "shards" / INDEX_FILE).is_file()
    before, half = load_file(model / SINGLE_FILE), load_file(tmp_path / "half" / SINGLE_FILE)
    shards = {}
    for file in sorted((tmp_path / "shards").glob("model-*.safetensors")):
        shards |= load_file(file)
    assert before.keys() == half.keys() == shards.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(half[name], value.astype(np.float16))
        np.testing.assert_array_equal(shards[name], value)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"
    assert (tmp_path / "half" / "generation_config.json").is_file()


def make_run(folder, stages, **sections):
    config = {"model_dir": "assets/nano", "stages": stages, **sections}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_which_stage_a_folder_means(tmp_path):
    run = make_run(tmp_path / "run", ["vm_cpt", "cot_sft"])
    with pytest.raises(ValueError, match="none of its stages has saved anything"):
        find_stage(run)
    model = run / "1_vm_cpt" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (run / "2_cot_sft" / "checkpoints").mkdir(parents=True)
    for folder in (run, run / "1_vm_cpt", model):
        stage = find_stage(folder)
        assert stage is not None and (stage.name, stage.step) == ("vm_cpt", None)
    with pytest.raises(ValueError, match="neither a model nor a checkpoint yet"):
        find_stage(run / "2_cot_sft")
    for step in (20, 40):
        made = run / "2_cot_sft" / "checkpoints" / str(step)
        made.mkdir()
        (made / "_CHECKPOINT_METADATA").touch()
    (run / "2_cot_sft" / "checkpoints" / "60").mkdir()  # being written
    for folder, step in (
        (run, None),  # the newest is found when it is read
        (run / "2_cot_sft" / "checkpoints", 40),
        (run / "2_cot_sft" / "checkpoints" / "20", 20),
    ):
        stage = find_stage(folder)
        assert stage is not None and (stage.name, stage.step) == ("cot_sft", step)
    with pytest.raises(ValueError, match=r"no checkpoint 60; it has \[20, 40\]"):
        find_stage(run / "2_cot_sft" / "checkpoints" / "60")
    assert find_stage(ASSETS) is None
    with pytest.raises(ValueError, match="neither a run's folder"):
        find_stage(tmp_path)


def test_exports_that_cannot_be(model, tmp_path):
    run = make_run(
        tmp_path / "run",
        ["cot_sft", "rl"],
        cot_sft={"trainable": "lora"},
        rl={"trainable": "all"},
    )
    done = run / "2_rl" / "model"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"no adapter. With LoRA: .*1_cot_sft"):
        export(run, out, adapter=True)
    with pytest.raises(ValueError, match="--adapter needs a LoRA stage"):
        export(model, out, adapter=True)
    with pytest.raises(ValueError, match="dtype must be one of"):
        export(model, out, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        export(model, out, max_shard_bytes=0)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        export(tmp_path / "nowhere", out)
    assert not out.exists()
    with pytest.raises(ValueError, match="not an empty folder"):
        export(model, run)
