"""The whole run on a tiny random model: generate, three stages, stop, resume, evaluate, export."""

import json
import os
import signal
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from data_pipelines.streaming import read_split
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.stages import loop, pipeline
from trimpi_jax.stages.evaluate_folder import evaluate_folder
from trimpi_jax.stages.suites import PAPER_SUITES

STAGES = ("0_base", "1_vm_cpt", "2_cot_sft", "3_rl")


def quiet():
    return Progress(Console(record=True, width=160, file=open(os.devnull, "w")))


def assert_equal_weights(one, two):
    leaves_one, leaves_two = jax.tree.leaves(one), jax.tree.leaves(two)
    assert len(leaves_one) == len(leaves_two) > 0
    for a, b in zip(leaves_one, leaves_two, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_base):
    """A finished run: (workdir, what was said)."""
    from tests.end_to_end.conftest import OVERRIDES, load_config

    config = load_config("nano", "method=trimpi_poro_grpo")
    config.model_dir = str(tiny_base)
    config.update_from_flattened_dict(OVERRIDES)
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    progress = quiet()
    pipeline.run(config, workdir, progress)
    return workdir, progress.console.export_text()


def test_everything_is_there(unbroken):
    workdir, said = unbroken
    for stage in STAGES:
        evaluation = json.loads((workdir / stage / "evaluation.json").read_text())
        assert evaluation["policy_free"]["count"] == evaluation["policy_aware"]["count"] == 8
    assert (workdir / "final" / "model.safetensors").is_file()
    assert "+PoRo-GRPO" in said and "accuracy" in said
    page = (workdir / "report.html").read_text()
    assert page.count("<article ") == 8
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_evaluations_after_and_within_stages(unbroken):
    """Three suites after every stage, and with every_steps=2 in the middle of RL's three steps."""
    workdir, said = unbroken
    for stage in STAGES:
        folder = workdir / stage / "evaluation"
        override = json.loads((folder / "override.json").read_text())
        assert override["summary"]["count"] == 8
        follows = override["summary"]["follows"]
        asked = follows["prompt"]["count"]
        assert 0 < asked == sum(part["correct"] for part in follows.values())
        assert override["identity"]["model_sha256"] and override["versions"]["jax"]
        assert {path.name for path in folder.iterdir()} == {
            "main.json", "in_context.json", "override.json"
        }  # fmt: skip
    lines = read_metrics(workdir / "3_rl" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [2]
    assert lines[0]["evaluation/main_count"] == lines[0]["evaluation/override_count"] == 8
    middle = json.loads((workdir / "3_rl" / "evaluation-step2" / "main.json").read_text())
    assert (middle["identity"]["stage"], middle["identity"]["step"]) == ("3_rl", 2)
    assert not list(workdir.glob("[12]*/evaluations.jsonl"))  # two steps each
    assert said.count("3_rl step 2: without policy ") == 1


def test_the_door_knows_what_training_evaluated_and_compares_stages(unbroken):
    workdir, _ = unbroken
    progress = quiet()
    found = evaluate_folder(
        workdir / "3_rl", against=workdir / "2_cot_sft" / "evaluation", progress=progress
    )
    said = progress.console.export_text()
    assert said.count("evaluated before, skipped") == 3
    assert set(found["suites"]) == set(found["against"]["suites"]) == set(PAPER_SUITES)
    assert found["against"]["suites"]["main"]["count"] == 8
    assert "McNemar" in said
    on_disk = json.loads((workdir / "3_rl" / "evaluation" / "results.json").read_text())
    assert on_disk["identity"]["model_sha256"] == found["identity"]["model_sha256"]


def test_every_stage_trains_what_it_should(unbroken, tiny_base):
    workdir, _ = unbroken
    config, base = load_hf(tiny_base)
    _, after_cpt = load_hf(workdir / "1_vm_cpt" / "model")
    _, after_sft = load_hf(workdir / "2_cot_sft" / "model")
    assert config.text.depth == 2
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), base, after_cpt)
    assert min(jax.tree.leaves(moved)) > 0  # full parameters
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after_cpt, after_sft)
    assert max(jax.tree.leaves(moved["vision"])) == 0  # LoRA on the language model only
    assert max(jax.tree.leaves(moved["language"])) > 0


def test_a_lora_stage_leaves_its_adapter(unbroken):
    """The model before, and scale x B A of the adapter, are the model after."""
    workdir, _ = unbroken
    before, after = (
        load_file(workdir / stage / "model" / "model.safetensors") for stage in STAGES[1:3]
    )
    folder = workdir / "2_cot_sft" / "adapter"
    adapter = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(workdir / "1_vm_cpt" / "model")
    assert not (workdir / "1_vm_cpt" / "adapter").exists()
    scale, largest = fields["lora_alpha"] / fields["r"], 0.0
    for name in after:
        module = "base_model.model." + name.replace("model.", "model.language_model.", 1)
        a = adapter.get(module.replace(".weight", ".lora_A.weight"))
        b = adapter.get(module.replace(".weight", ".lora_B.weight"))
        update = np.zeros(1) if a is None or b is None else scale * (b @ a)
        np.testing.assert_allclose(after[name], before[name] + update, atol=1e-6, err_msg=name)
        largest = max(largest, np.abs(update).max())
    assert len(adapter) == 2 * 7 * 2 and largest > 1e-5


def test_second_start_skips_finished_stages(unbroken, tiny_config):
    workdir, _ = unbroken
    before = (workdir / "3_rl" / "model" / "model.safetensors").stat().st_mtime_ns
    progress = quiet()
    pipeline.run(tiny_config, workdir, progress)
    said = progress.console.export_text()
    assert said.count("finished before, skipped") == 3
    assert (workdir / "3_rl" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_stopped_run_continues_to_the_same_result(unbroken, tiny_config, tmp_path, monkeypatch):
    """SIGTERM in the middle of RL, then the same command again: bitwise the same model."""
    open_stream = pipeline.open_stream

    class StoppingStream(Iterator):
        """Asks the run to stop while the second batch is fetched."""

        def __init__(self, stream):
            self.stream, self.taken = stream, 0
            self.get_state, self.set_state = stream.get_state, stream.set_state

        def __next__(self):
            self.taken += 1
            if self.taken == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.stream)

    def stream_that_stops(this, split, batch, stage, *each):
        stream = open_stream(this, split, batch, stage, *each)
        return StoppingStream(stream) if stage == "rl" else stream

    monkeypatch.setattr(pipeline, "open_stream", stream_that_stops)
    with pytest.raises(loop.Stopped) as stopped:
        pipeline.run(tiny_config, tmp_path / "run", quiet())
    assert stopped.value.code == loop.EXIT_STOPPED
    monkeypatch.setattr(pipeline, "open_stream", open_stream)
    progress = quiet()
    pipeline.run(tiny_config, tmp_path / "run", progress)
    assert "rl: continuing at step 2 of 3" in progress.console.export_text()
    assert_equal_weights(load_hf(tmp_path / "run" / "final")[1], load_hf(unbroken[0] / "final")[1])


def test_flipped_bit_in_a_shard_is_refused(unbroken, tiny_config, tmp_path):
    workdir = tmp_path / "run"
    data = workdir / "data"
    data.mkdir(parents=True)
    for path in (unbroken[0] / "data").glob("*.*"):
        content = bytearray(path.read_bytes())
        if path.name.startswith("test"):
            content[len(content) // 2] ^= 1
        (data / path.name).write_bytes(content)
    (workdir / "config.json").write_bytes((unbroken[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"test-00000-of-00001.*sha256.*altered"):
        pipeline.run(tiny_config, workdir, quiet())


def test_evaluated_images_are_unseen(unbroken):
    data = unbroken[0] / "data"
    train = {example.images[0] for example in read_split(data, "train")}
    test = {example.images[0] for example in read_split(data, "test")}
    assert len(train) == 24 and len(test) == 8 and not train & test
