"""A sweep that really trains: a tiny random model, two rows that share the base's evaluation."""

import json

from rich.console import Console

from configs import nano
from tests.end_to_end.conftest import OVERRIDES
from trimpi_jax.io.progress import Progress
from trimpi_jax.sweeps import runner
from trimpi_jax.sweeps.child import train
from trimpi_jax.sweeps.plan import AWARE, Column, Row, Sweep
from trimpi_jax.sweeps.runner import Options, run_sweep

SMALLER = {
    "data.override": 0,
    "eval.every_steps": 0,
    "eval.suites": ("main", "in_context"),
}


def test_two_rows_share_what_they_have_in_common(tiny_base, tmp_path, monkeypatch):
    def recipe(method):
        config = nano.get_config(f"method={method}")
        config.model_dir = str(tiny_base)
        known = dict.fromkeys(config.stages) | {"data": 0, "eval": 0, "mesh": 0}
        wanted = (OVERRIDES | SMALLER).items()
        changes = {k: v for k, v in wanted if "." not in k or k.split(".")[0] in known}
        config.update_from_flattened_dict(changes)
        return config

    rows = (
        Row("in_context", "in context", "in_context", shows=AWARE),
        Row("cot_sft", "CoT SFT", "cot_sft"),
    )
    column = Column("T2", "Clevr-T, depth 2", ("clevr_policy", "T", 2), recipe, 2)
    sweep = Sweep("tiny", rows, (column,), ("T2",), (0,), ())
    root, quiet = tmp_path / "sweep", Progress(Console(quiet=True))
    trained = []

    def start(job):  # in this process, whose programs are compiled already
        train(job)
        trained.append(job.name)
        return 0

    monkeypatch.setattr(runner, "write_page", lambda *given: None)
    assert run_sweep(sweep, root, Options(), quiet, start) == 0
    lines = [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]
    base, sft = lines
    assert [stage["trained_by"] for stage in sft["stages"]] == ["T2-s0-in_context", "T2-s0-cot_sft"]
    assert base["stages"][0]["key"] == sft["stages"][0]["key"]
    assert base["data_sha256"] == sft["data_sha256"] and base["steps"] == 0 < sft["steps"]
    asked = sft["answers"]["main"]
    assert asked["questions_sha256"] == base["answers"]["in_context"]["questions_sha256"]
    assert len(asked["scores"]) == 8
    assert len(list((root / "stages" / "T2-s0").glob("0_base-*"))) == 1
    run = next((root / "runs").glob("T2-s0-cot_sft-*"))
    assert (run / "1_cot_sft" / "model" / "config.json").is_file()
    assert (run / "report.html").is_file() and not (run / "final").exists()
    # moved as a whole, it is still a whole
    (root).rename(tmp_path / "moved")
    assert run_sweep(sweep, tmp_path / "moved", Options(), quiet, start) == 0
    assert trained == ["T2-s0-in_context", "T2-s0-cot_sft"]
