"""Which runs a sweep has, whose budgets are equal, and who runs which."""

import dataclasses

import pytest

from configs import nano
from configs.sweeps import paper_tables
from tests.sweeps.made_sweep import CLAIMS, CODE, ROWS, make_recipe, make_sweep
from trimpi_jax.sweeps.identity import code_digest, data_key, run_key, stage_folders
from trimpi_jax.sweeps.plan import (
    Claim,
    Row,
    choose_shard,
    load_sweep,
    make_runs,
    parse_changes,
    rollout_budget,
    select,
)


def test_runs_go_by_column_seed_and_row_with_a_config_each():
    runs = make_runs(make_sweep())
    names = [run.name for run in runs]
    assert names[:5] == [
        *("T4-s0-in_context", "T4-s0-cot_sft", "T4-s0-cot_sft_grpo", "T4-s0-trimpi_poro_grpo"),
        "T4-s1-in_context",
    ]
    assert len(names) == 2 * 4
    last = runs[-1].config
    assert (last.seed, last.data.seed, last.data.depth, last.method) == (
        1,
        1,
        4,
        "trimpi_poro_grpo",
    )


def test_rows_override_and_set_changes_what_is_there():
    rows = (*ROWS, Row("hot", "hot", "cot_sft", {"cot_sft.learning_rate": 0.5}))
    runs = make_runs(make_sweep((0,), rows=rows), parse_changes(["rl.steps=7", "name=x"]))
    by_row = {run.row.name: run.config for run in runs}
    assert by_row["hot"].cot_sft.learning_rate == 0.5
    assert by_row["trimpi_poro_grpo"].rl.steps == 7 and "rl" not in by_row["cot_sft"]
    with pytest.raises(
        ValueError, match=r"has no cot_sft.learning_rat; did you mean learning_rate"
    ):
        bad = (Row("bad", "bad", "cot_sft", {"cot_sft.learning_rat": 0.5}),)
        make_runs(make_sweep(rows=bad, claims=()))
    with pytest.raises(ValueError, match="did you mean steps"):
        make_runs(make_sweep(), {"rl.step": 7})
    with pytest.raises(ValueError, match=r"--set rm.steps: no run of made has such a section"):
        make_runs(make_sweep(), {"rm.steps": 7})
    with pytest.raises(ValueError, match=r"rl.steps='many'"):
        make_runs(make_sweep(), {"rl.steps": "many"})
    for texts in (["rl.steps"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="--set is PATH=VALUE"):
            parse_changes(texts)


def test_dynamic_sampling_and_distillation_get_the_rollouts_of_the_other_rows():
    rows = (
        *ROWS,
        Row("dapo", "DAPO", "trimpi_poro_dapo"),
        Row("distillation", "distillation", "distillation"),
    )
    runs = make_runs(make_sweep((0,), rows=rows), {"rl.steps": 5, "rl.prompts": 4})
    budgets = {run.row.name: rollout_budget(run.config) for run in runs}
    assert budgets == {
        **dict.fromkeys(("in_context", "cot_sft"), 0),
        **dict.fromkeys(("cot_sft_grpo", "trimpi_poro_grpo", "dapo", "distillation"), 5 * 4 * 16),
    }
    dapo = next(run.config for run in runs if run.row.name == "dapo")
    assert dapo.rl.max_rollouts == 320


def test_rows_that_cannot_be_compared_are_refused_all_at_once():
    rows = (
        *ROWS,
        Row("more", "more", "trimpi_grpo", {"rl.steps": 200}),
        Row("other", "other", "cot_sft", {"data.train_per_policy": 500}),
    )
    with pytest.raises(ValueError) as error:
        make_runs(make_sweep((0,), rows=rows))
    assert "T4-s0-other: its data differs from that of T4-s0-in_context" in str(error.value)
    assert "'more': 25600" in str(error.value) and "'cot_sft_grpo': 12800" in str(error.value)


def test_checkpoints_elsewhere_are_refused():
    with pytest.raises(ValueError, match="checkpoint_dir must be empty"):
        make_runs(make_sweep(), {"checkpoint_dir": "gs://bucket/run"})


def test_names_are_checked():
    rows = (*ROWS, ROWS[0], Row("a b", "x", "cot_sft"))
    claims = (*CLAIMS, Claim("bad", "x", "nobody", grows=True))
    with pytest.raises(ValueError) as error:
        make_runs(make_sweep((1, 1), rows=rows, claims=claims, chosen=("T8",)))
    for text in (
        *("row 'in_context' occurs twice", "row name 'a b'", "seeds must be distinct"),
        *(
            "claim bad: no row 'nobody'",
            "claim bad: a trend needs two rows",
            "chosen columns ['T8']",
        ),
    ):
        assert text in str(error.value)


def test_groups_stay_together_and_shards_are_a_partition():
    runs = make_runs(make_sweep((0, 1, 2)))
    seconds = {"T4-s0": 5.0, "T4-s1": 3.0, "T4-s2": 2.5}
    parts = [choose_shard(runs, f"{i}/2", seconds) for i in (1, 2)]
    assert {run.group for run in parts[0]} == {"T4-s0"}
    assert {run.group for run in parts[1]} == {"T4-s1", "T4-s2"}
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    with pytest.raises(ValueError, match=r"take at most 3 machines"):
        choose_shard(runs, "1/4", seconds)
    for text in ("0/2", "3/2", "1", "1/2/3"):
        with pytest.raises(ValueError, match="--shard is i/n"):
            choose_shard(runs, text, seconds)


def test_only_selects_by_name():
    runs = make_runs(make_sweep())
    assert [run.name for run in select(runs, "s1-cot_sft$")] == ["T4-s1-cot_sft"]
    with pytest.raises(ValueError, match="matches no run; names are like T4-s0-in_context"):
        select(runs, "T8")
    with pytest.raises(ValueError, match="no regular expression"):
        select(runs, "(")


def test_equal_beginnings_have_equal_keys_and_nothing_else_has():
    config = {row.method: make_recipe(row.method, 4) for row in ROWS}
    folders = {method: stage_folders(one, CODE) for method, one in config.items()}
    poro, grpo = folders["trimpi_poro_grpo"], folders["cot_sft_grpo"]
    assert list(poro) == ["0_base", "1_vm_cpt", "2_cot_sft", "3_rl"]
    assert grpo["1_cot_sft"] == folders["cot_sft"]["1_cot_sft"] != poro["2_cot_sft"]
    assert poro["0_base"] == grpo["0_base"] == folders["in_context"]["0_base"]
    direct = stage_folders(make_recipe("direct_sft", 4), CODE)
    assert direct["0_base"] != poro["0_base"]  # its answers need no thoughts

    def changed(path, value):
        other = make_recipe("trimpi_poro_grpo", 4)
        other.update_from_flattened_dict({path: value})
        found = stage_folders(other, CODE)
        return [name for name in poro if poro[name] != found[name]]

    assert changed("rl.steps", 7) == ["3_rl"]
    assert changed("cot_sft.epochs", 7) == ["2_cot_sft", "3_rl"]
    assert changed("data.test", 301) == changed("seed", 1) == list(poro)
    assert changed("name", "x") == []
    other = dataclasses.replace(CODE, sha256="e" * 64)
    assert not set(stage_folders(config["cot_sft"], other).values()) & set(grpo.values())
    assert run_key(config["cot_sft"], CODE) != run_key(config["cot_sft"], other)
    assert data_key(config["cot_sft"], CODE) == data_key(config["cot_sft_grpo"], CODE)


def test_the_code_digest_knows_what_only_shows_results(tmp_path):
    for name in ("trimpi_jax/io/report.py", "trimpi_jax/stages/rl.py", "data_pipelines/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    before = code_digest(tmp_path)
    (tmp_path / "trimpi_jax/io/report.py").write_text("two")
    (tmp_path / "trimpi_jax/sweeps").mkdir()
    (tmp_path / "trimpi_jax/sweeps/page.py").write_text("two")
    assert code_digest(tmp_path) == before
    (tmp_path / "trimpi_jax/stages/rl.py").write_text("two")
    assert code_digest(tmp_path) != before


@pytest.mark.parametrize("argument", ["small", "medium", "full", "full,split=validation,seeds=5"])
def test_the_papers_tables_can_be_run(argument):
    sweep = load_sweep(f"configs/sweeps/paper_tables.py:{argument}")
    runs = make_runs(sweep)
    assert len(runs) == len(sweep.rows) * len(sweep.chosen) * len(sweep.seeds)
    assert len(sweep.seeds) >= 3
    assert ("validation" in sweep.name) == ("validation" in argument)
    splits = {run.config.eval.split for run in runs}
    assert splits == {"validation" if "validation" in argument else "test"}
    assert set(nano.METHODS) >= {row.method for row in sweep.rows}


def test_an_argument_that_is_none_names_the_closest():
    with pytest.raises(ValueError, match=r"unknown 'smal' .*did you mean small"):
        paper_tables.get_sweep("smal")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_sweep("configs/sweeps/nothing.py")
