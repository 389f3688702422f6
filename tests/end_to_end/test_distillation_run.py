"""A run of method=distillation: sampled, written, trained, evaluated; its answers are scripted.

The tiny random base never says anything right, so what it "says" is put in its mouth; everything
else is the run's own.
"""

import json

import jax
import numpy as np
import pytest

from data_pipelines.example import completion_text
from data_pipelines.shards import check_dataset
from data_pipelines.streaming import read_split
from tests.end_to_end.conftest import load_config
from tests.end_to_end.test_main_job import quiet
from trimpi_jax.io.metrics import read_metrics
from trimpi_jax.models.hf_weights import load_hf
from trimpi_jax.models.processor import encode_completion
from trimpi_jax.rollouts.engine import Questions
from trimpi_jax.stages import distillation, pipeline
from trimpi_jax.types import Rollouts

OVERRIDES = {
    "data.train_per_policy": 6,
    "data.cot_per_policy": 3,
    "data.test": 2,
    "eval.examples": 2,
    "eval.rows": 8,
    "max_new_tokens": 16,
    "row_buckets": (192,),
    "mesh.data": 1,
    "mesh.fsdp": -1,  # all fake devices of the test session
    "distillation.rollouts": 16,
    "distillation.samples": 2,
    "distillation.epochs": 2,
    "distillation.batch": 8,
}


@pytest.fixture
def config(tiny_base):
    config = load_config("nano", "method=distillation")
    config.model_dir = str(tiny_base)
    config.update_from_flattened_dict(OVERRIDES)
    return config


def test_a_run_imitates_its_right_answers(config, tiny_base, tmp_path, monkeypatch):
    batches = []

    def ask(engine, weights, examples, sampler, key, *, aware, num_rows, max_chunk):
        assert aware
        batches.append([example.example_id for example in examples])
        shape = (len(examples), sampler.completions, sampler.max_new_tokens)
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
        for q, example in enumerate(examples):
            for g, answer in enumerate((example.answer, "Case 77")):  # one right, one wrong
                said = encode_completion(engine.processor, completion_text("so", answer))[:-1]
                tokens[q, g, : len(said)], lengths[q, g] = said, len(said)
        rollouts = Rollouts(tokens, np.zeros(shape, np.float32), lengths, np.ones(shape[:2], bool))
        return Questions(list(examples), [], [], [], []), rollouts

    monkeypatch.setattr(distillation, "ask", ask)
    progress = quiet()
    pipeline.run(config, tmp_path / "run", progress)
    stage = tmp_path / "run" / "1_distillation"
    facts = check_dataset(stage / "data")["recipe"]["distillation"]
    assert (facts["rollouts"], facts["kept"], facts["rejected"]) == (16, 8, {"wrong_answer": 8})
    asked = {name for batch in batches for name in batch}
    train = {example.example_id for example in read_split(tmp_path / "run" / "data", "train")}
    assert len(asked) == 8 and asked <= train
    kept = read_split(stage / "data", "cot")
    assert {row.cot for row in kept} == {"so"} and all(row.policy_text for row in kept)
    losses = [line["train/loss"] for line in read_metrics(stage / "metrics.jsonl")]
    assert len(losses) == 2 and losses[1] < losses[0]  # two epochs of eight in batches of eight
    before, after = load_hf(tiny_base)[1], load_hf(stage / "model")[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert min(jax.tree.leaves(moved["language"])) > 0
    evaluation = json.loads((stage / "evaluation.json").read_text())
    assert evaluation["policy_free"]["count"] == 2
    said = progress.console.export_text()
    assert "16 answers to 8 questions, 8 right (50.0 %)" in said and "+Distil" in said
    assert not (stage / "checkpoints").exists()
