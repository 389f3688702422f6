"""A user's folder from its files to a trained model and a report, on a tiny random model."""

import json

import pytest

from tests.data_pipelines.own_policy.folders import example, write_folder
from tests.end_to_end.conftest import load_config
from tests.end_to_end.test_main_job import quiet
from trimpi_jax.stages import pipeline

GRADING = """
def grade(answer, gold, example):
    if example["id"] == "e0":
        raise RuntimeError("on purpose")
    return {"score": 1.0 if answer == gold else 0.25, "length": len(answer)}
"""


@pytest.mark.timeout(600)
def test_three_stages_on_a_folder_graded_by_a_function(tmp_path, tiny_base):
    lines = [
        example(
            i,
            cot="I see a grey picture." if i < 8 else "",
            split="train" if i < 8 else "test",
            profile={"age": 20 + i},
        )
        for i in range(10)
    ]
    task = 'name = "Desk"\n[answer]\nform = "python"\nfile = "grade.py"\n'
    source = write_folder(tmp_path / "desk", task=task, lines=lines, count=10)
    config = load_config("own_policy", "method=trimpi_poro_grpo")
    config.model_dir = str(tiny_base)
    config.update_from_flattened_dict(
        {
            "data.source": str(source),
            "max_new_tokens": "8",
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "eval.rows": 8,
            "vm_cpt.epochs": 1.0,
            "vm_cpt.batch": 8,
            "vm_cpt.micro_batches": 1,  # a row for each of the eight fake devices
            "cot_sft.epochs": 1,
            "rl.steps": 1,
            "rl.prompts": 8,
            "rl.update_prompts": 8,
            "rl.group_size": 1,
        }
    )
    (source / "grade.py").write_text(GRADING)
    with pytest.raises(ValueError, match=r"examples.jsonl:1: grade.py .* on purpose"):
        pipeline.run(config, tmp_path / "run", quiet())
    assert not (tmp_path / "run" / "data").exists()
    (source / "grade.py").write_text(GRADING.replace('"e0"', '"none"'))
    progress = quiet()
    pipeline.run(config, tmp_path / "run", progress)
    said = progress.console.export_text()
    assert "sizes from the data: prompts of" in said and "8 new tokens" in said
    for stage in ("0_base", "1_vm_cpt", "2_cot_sft", "3_rl"):
        evaluation = json.loads((tmp_path / "run" / stage / "evaluation.json").read_text())
        assert evaluation["policy_free"]["count"] == evaluation["policy_aware"]["count"] == 2
        records = evaluation["policy_free_records"] + evaluation["policy_aware_records"]
        # what was boxed was graded by the function, what was not is a counted reason
        assert all({"length"} <= r["details"].keys() or "problem" in r["details"] for r in records)
    assert "data:image/png" in (tmp_path / "run" / "report.html").read_text()
