"""A sweep as a user meets it: run, killed, continued, with failures and with other code."""

import dataclasses
import json

import pytest

from tests.sweeps.made_sweep import CODE, FakeStart, make_sweep
from trimpi_jax.io.progress import Progress
from trimpi_jax.sweeps import runner
from trimpi_jax.sweeps.runner import Options, Stopped, run_sweep, start_process


class Said(Progress):
    """Remembers the lines."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def table(self, table) -> None:
        cells = zip(*(column.cells for column in table.columns), strict=True)
        self.lines += [" ".join(map(str, row)) for row in cells]


def go(root, start, sweep=None, code=CODE, **options):
    said = Said()
    failed = run_sweep(sweep or make_sweep(), root, Options(**options), said, start, code)
    return failed, said.lines


def read(root):
    lines = (root / "results.jsonl").read_text().splitlines()
    return {record["run"]: record for record in map(json.loads, lines)}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The sweep's folder; its page is left out, test_page.py looks at it."""
    monkeypatch.setattr(runner, "write_page", lambda *given: given[-1].joinpath("report.html"))
    return tmp_path / "sweep"


def test_shared_stages_are_trained_once(root):
    start = FakeStart(root, cot_sft=2, cot_sft_grpo=3)
    failed, _ = go(root, start, make_sweep((0,)))
    assert failed == 0
    assert start.trained == [
        *("T4-s0/0_base", "T4-s0/1_cot_sft", "T4-s0/2_rl"),
        *("T4-s0/1_vm_cpt", "T4-s0/2_cot_sft", "T4-s0/3_rl"),
    ]
    grpo = read(root)["T4-s0-cot_sft_grpo"]
    assert [stage["trained_by"] for stage in grpo["stages"]] == [
        *("T4-s0-in_context", "T4-s0-cot_sft", "T4-s0-cot_sft_grpo")
    ]
    assert (grpo["steps"], grpo["train_s"], grpo["rollouts"]) == (8, 4.0, 24)
    assert grpo["answers"]["main"]["scores"] == [1.0, 1.0, 1.0, 0.0]
    assert grpo["code_sha256"] == CODE.sha256 and grpo["status"] == "done"


def test_a_stopped_sweep_goes_on_where_it_was(root):
    start = FakeStart(root)
    start.stops = {"T4-s0-cot_sft_grpo"}
    with pytest.raises(Stopped) as stopped:
        go(root, start, make_sweep((0,)))
    assert stopped.value.code == 75
    assert sorted(read(root)) == ["T4-s0-cot_sft", "T4-s0-in_context"]
    again = FakeStart(root)
    failed, lines = go(root, again, make_sweep((0,)))
    assert failed == 0 and len(read(root)) == 4
    assert again.started == ["T4-s0-cot_sft_grpo", "T4-s0-trimpi_poro_grpo"]
    assert "T4-s0/1_cot_sft" not in again.trained
    assert any("4 of 4 chosen runs are done, 0 failed" in line for line in lines)
    third = FakeStart(root)
    go(root, third, make_sweep((0,)))
    assert third.started == []


def test_a_failed_run_is_told_and_the_rest_goes_on(root):
    start = FakeStart(root)
    start.fails = {"T4-s0-cot_sft": "NonFiniteLoss: cot_sft step 3"}
    failed, lines = go(root, start, make_sweep((0,)))
    assert failed == 2
    results = read(root)
    assert results["T4-s0-cot_sft"]["reason"] == "NonFiniteLoss: cot_sft step 3"
    # the row that needs the same stage is not tried, and says why
    assert "T4-s0-cot_sft_grpo" not in start.started
    reason = results["T4-s0-cot_sft_grpo"]["reason"]
    assert "failed in T4-s0-cot_sft: NonFiniteLoss" in reason
    assert results["T4-s0-trimpi_poro_grpo"]["status"] == "done"
    assert "failed: T4-s0-cot_sft: NonFiniteLoss: cot_sft step 3" in lines
    again = FakeStart(root)  # mended: only what failed is made
    assert go(root, again, make_sweep((0,)))[0] == 0
    assert again.started == ["T4-s0-cot_sft", "T4-s0-cot_sft_grpo"]


def test_a_process_that_dies_has_the_signal_as_its_reason(root):
    assert go(root, lambda job: -9, make_sweep((0,)), only="s0-in_context")[0] == 1
    assert "SIGKILL (out of memory?)" in read(root)["T4-s0-in_context"]["reason"]


def test_results_of_other_code_or_config_are_stale_never_counted(root):
    go(root, FakeStart(root), make_sweep((0,)))
    other = dataclasses.replace(CODE, sha256="e" * 64)
    _, lines = go(root, FakeStart(root), make_sweep((0,)), other, page_only=True)
    assert any("4 results of other code (4) or configs are stale" in line for line in lines)
    assert read(root) == {}
    # the same code, another setting: only the runs that have it are others
    again = FakeStart(root)
    go(root, again, make_sweep((0,)), changes={"rl.steps": 7})
    assert again.started == ["T4-s0-cot_sft_grpo", "T4-s0-trimpi_poro_grpo"]
    assert {name.partition("/")[2] for name in again.trained} == {"2_rl", "3_rl"}


def test_a_stage_of_other_data_is_refused(root):
    go(root, FakeStart(root), make_sweep((0,)), only="cot_sft$")
    start = FakeStart(root)
    start.data = "e" * 64
    with pytest.raises(ValueError, match="belongs to another data_sha256"):
        go(root, start, make_sweep((0,)), only="cot_sft_grpo")


def test_results_about_other_questions_are_refused(root):
    go(root, FakeStart(root), make_sweep((0,)))
    path = next((root / "results").glob("T4-s0-cot_sft-*.json"))
    record = json.loads(path.read_text())
    record["answers"]["main"]["questions_sha256"] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="T4-s0: other data or questions in these results"):
        go(root, FakeStart(root), make_sweep((0,)), page_only=True)


def test_a_dry_run_writes_nothing_and_counts_shared_stages_once(root):
    _, lines = go(root, FakeStart(root), dry_run=True)
    assert not root.exists()
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["T4-s0-in_context"] == "T4-s0-in_context to do 0_base 25"
    assert by_name["T4-s0-cot_sft"] == "T4-s0-cot_sft to do 1_cot_sft 45"
    assert by_name["T4-s0-cot_sft_grpo"] == "T4-s0-cot_sft_grpo to do 2_rl 125"
    assert lines[-1].startswith("8 of 8 runs to make, 12 stages to train or evaluate for the 20")


def test_estimates_are_what_was_measured_before(root):
    go(root, FakeStart(root), make_sweep((0,)), only="s0-cot_sft_grpo")
    _, lines = go(root, FakeStart(root), make_sweep((0, 1)), dry_run=True)
    by_name = {line.split()[0]: line for line in lines}
    # four steps of 0.5 s and two suites of 2 s, and 15 s for the process
    assert by_name["T4-s1-cot_sft_grpo"].split()[-1] == "21"
    assert by_name["T4-s0-cot_sft_grpo"].split()[1] == "done"


def test_folders_of_others_are_refused(root):
    root.mkdir()
    (root / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not a sweep's folder"):
        go(root, FakeStart(root))
    (root / "thesis.tex").unlink()
    go(root, FakeStart(root), only="s0-in_context")
    with pytest.raises(ValueError, match="belongs to the sweep 'made', this is 'other'"):
        go(root, FakeStart(root), make_sweep(name="other"))


def test_a_broken_result_is_told_and_made_again(root):
    go(root, FakeStart(root), make_sweep((0,)), only="in_context")
    next((root / "results").glob("*.json")).write_text('{"run": ')
    start = FakeStart(root)
    _, lines = go(root, start, make_sweep((0,)), only="in_context")
    assert any(line.startswith("no result: T4-s0-in_context") for line in lines)
    assert start.started == ["T4-s0-in_context"]


def test_a_child_process_tells_why_it_failed(root):
    """A real process, whose base model is not there."""
    sweep = make_sweep((0,))
    failed, _ = go(root, start_process, sweep, only="in_context")
    assert failed == 1
    reason = read(root)["T4-s0-in_context"]["reason"]
    assert "the code was changed while the sweep ran" in reason  # CODE is nobody's code
