"""What the export door writes, transformers and peft load: the same logits on text and images.

A run's folder is made by hand (config.json, a checkpoint of moved weights): what training leaves,
without the training.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny_model import ASSETS
from trimpi_jax.io.checkpoints import open_checkpoints, save_checkpoint
from trimpi_jax.models import hf_weights, lora, vlm
from trimpi_jax.models.processor import copy_processor_files
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.export_model import export
from trimpi_jax.stages.model_files import write_adapter, write_model
from trimpi_jax.stages.open_model import find_model, load_model
from trimpi_jax.stages.train_state import OptimizerSettings, init_train_state, make_optimizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from tests.parity.hf_reference import hf_inputs  # noqa: E402

APPLY = jax.jit(vlm.apply, static_argnums=1)
RANK, ALPHA = 3, 6


def load_reference(folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def assert_same_logits(model, pair, config, params):
    ours = np.asarray(APPLY(params, config, pair.batch))
    for row, mine in zip(pair.rows, ours, strict=True):
        with torch.no_grad():
            theirs = model(**hf_inputs(row)).logits[0].numpy()
        np.testing.assert_allclose(mine[: len(theirs)], theirs, atol=1e-5, rtol=0)
    return ours


def moved(params, seed, where=lambda path: True):
    """Weights after a little training: those of `where` are not what they were."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if not where(path):
            return leaf
        return leaf + 0.03 * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.fixture(scope="module")
def base(tied_pair, tmp_path_factory):
    """The tied reference model in bfloat16, as the hub stores its models."""
    folder = tmp_path_factory.mktemp("base")
    hf_weights.save_hf(folder, tied_pair.config, tied_pair.params, "bfloat16")
    fields = json.loads((folder / "config.json").read_text())
    fields["a_word_of_its_own"] = "kept"
    (folder / "config.json").write_text(json.dumps(fields))
    copy_processor_files(ASSETS, folder)
    # the nano tokenizer, but with the placeholder that the reference model has
    config = dataclasses.replace(tied_pair.config)
    params = hf_weights.load_hf(folder)[1]
    return folder, config, jax.device_put(params)


def make_run(folder, base, trainable):
    """A run of one stage."""
    stage = {"trainable": trainable}
    if trainable == "lora":
        stage |= {"lora_rank": RANK, "lora_alpha": ALPHA}
    config = {"model_dir": str(base), "stages": ["cot_sft"], "cot_sft": stage}
    (folder / "1_cot_sft").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "1_cot_sft"


def save_state(stage, params, trainable, step=7):
    optimizer = make_optimizer(OptimizerSettings(1e-3, 10))
    with open_checkpoints(stage / "checkpoints") as manager:
        save_checkpoint(manager, step, init_train_state(params, optimizer, trainable), {})
        manager.wait_until_finished()


@pytest.fixture(scope="module")
def adapted(base):
    """(config with its scale, weights with trained LoRA leaves)."""
    _, config, params = base
    scaled = dataclasses.replace(
        config, text=dataclasses.replace(config.text, lora_scale=ALPHA / RANK)
    )
    params = lora.add_lora(params, scaled, jax.random.key(0), RANK)
    return scaled, moved(params, 1, lora.is_lora_leaf)


@pytest.fixture(autouse=True)
def no_processor(monkeypatch):
    """The reference's ids are not those of the nano tokenizer: its processor is not opened."""
    monkeypatch.setattr("trimpi_jax.stages.export_model.load_processor", lambda *a, **k: None)


def test_a_finished_stage(tied_pair, base, tmp_path):
    folder, config, params = base
    stage = make_run(tmp_path / "run", folder, "all_but_vision")
    trained = moved(params, 0, lambda path: path[0].key != "vision")
    write_model(stage / "model", folder, config, trained, None)
    said = export(tmp_path / "run", tmp_path / "out", dtype="float32", max_shard_bytes=400_000)
    assert said.endswith("float32")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    ours = assert_same_logits(load_reference(tmp_path / "out"), tied_pair, config, trained)
    before = np.asarray(APPLY(params, config, tied_pair.batch))
    assert np.abs(ours - before).max() > 0.1, "the trained weights must show"
    for name in ("generation_config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).is_file()
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["a_word_of_its_own"] == "kept" and fields["dtype"] == "float32"


def test_untouched_tensors_keep_their_bytes(base, tmp_path):
    """The base is bfloat16, training is float32, the default of the export is the base's dtype."""
    folder, _, params = base
    stage = make_run(tmp_path / "run", folder, "all_but_vision")
    save_state(stage, moved(params, 0, lambda path: path[0].key != "vision"), "all_but_vision")
    assert export(tmp_path / "run", tmp_path / "out").endswith("bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = tensor.tobytes() == after[name].tobytes()
        assert tensor.dtype == after[name].dtype == jnp.bfloat16
        assert same == name.startswith("visual."), name
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["dtype"] == fields["torch_dtype"] == fields["text_config"]["dtype"] == "bfloat16"


def test_a_running_lora_stage_is_merged(tied_pair, base, adapted, tmp_path):
    folder, config, _ = base
    scaled, params = adapted
    stage = make_run(tmp_path / "run", folder, "lora")
    save_state(stage, params, "lora")
    export(stage / "checkpoints" / "7", tmp_path / "out", dtype="float32")
    merged = lora.merge_lora(params, scaled.text.lora_scale)
    source = find_model(stage)  # what an evaluation opens: the newest checkpoint, merged as well
    assert source.files == stage / "checkpoints" / "7" and source.run == stage.parent
    opened = load_model(source, hf_weights.read_config(folder), make_mesh(data=1, fsdp=-1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), opened, merged)
    assert_same_logits(load_reference(tmp_path / "out"), tied_pair, config, merged)


@pytest.mark.parametrize("source", ["checkpoint", "finished"])
def test_an_adapter_in_peft(tied_pair, base, adapted, tmp_path, source):
    folder, _, plain = base
    scaled, params = adapted
    stage = make_run(tmp_path / "run", folder, "lora")
    if source == "checkpoint":
        save_state(stage, params, "lora")
    else:
        write_adapter(stage / "adapter", folder, scaled, params)
        merged = lora.merge_lora(params, scaled.text.lora_scale)
        write_model(stage / "model", folder, scaled, merged, None)
    export(tmp_path / "run", tmp_path / "out", adapter=True)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (RANK, ALPHA)
    assert fields["base_model_name_or_path"] == str(folder)
    model = peft.PeftModel.from_pretrained(
        load_reference(fields["base_model_name_or_path"]), tmp_path / "out"
    ).eval()
    loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * 7 * scaled.text.depth and not any("visual" in n for n in loaded)
    ours = assert_same_logits(model, tied_pair, scaled, params)
    assert np.abs(ours - np.asarray(APPLY(plain, scaled, tied_pair.batch))).max() > 0.1
    with model.disable_adapter():
        assert_same_logits(model, tied_pair, scaled, plain)


def test_peft_writes_what_we_write(base, adapted, tmp_path):
    """The same names and shapes as PEFT gives an adapter of its own."""
    folder, *_ = base
    scaled, params = adapted
    write_adapter(tmp_path / "ours", folder, scaled, params)
    model = peft.PeftModel.from_pretrained(load_reference(folder), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
