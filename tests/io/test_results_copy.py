"""Results beside the checkpoints: what is copied, in which order, and back on a fresh machine."""

from trimpi_jax.io import results_copy
from trimpi_jax.io.results_copy import fetch_results, send_results

FILES = {
    "config.json": "{}",
    "data/train-00000": "built again",
    ".lock": "of this machine",
    "1_sft/metrics.jsonl": "{}",
    "1_sft/data/answers": "sampled",
    "1_sft/model/config.json": "{}",
    "1_sft/model/weights": "w",
    "1_sft/checkpoints/40/x": "x",
    "1_sft/evaluation.json": "{}",
    "2_rl/model.part/weights": "half",
}
COPIED = [
    "1_sft/data/answers",
    "1_sft/metrics.jsonl",
    "1_sft/model/weights",
    "1_sft/model/config.json",
    "1_sft/evaluation.json",
    "config.json",
]


def write_all(folder):
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_marks_a_thing_as_whole_is_copied_after_it(tmp_path):
    write_all(tmp_path / "run")
    assert send_results(tmp_path / "run", tmp_path / "bucket") == COPIED
    assert (tmp_path / "bucket/workdir/1_sft/model/weights").read_text() == "w"


def test_only_what_is_new_is_copied_again(tmp_path):
    write_all(tmp_path / "run")
    send_results(tmp_path / "run", tmp_path / "bucket")
    assert send_results(tmp_path / "run", tmp_path / "bucket") == []
    with (tmp_path / "run/1_sft/metrics.jsonl").open("a") as file:
        file.write("{}")
    assert send_results(tmp_path / "run", tmp_path / "bucket") == ["1_sft/metrics.jsonl"]
    assert (tmp_path / "bucket/workdir/1_sft/metrics.jsonl").read_text() == "{}{}"


def test_a_machine_without_a_disk_gets_them_back_and_copies_nothing_twice(tmp_path):
    write_all(tmp_path / "run")
    send_results(tmp_path / "run", tmp_path / "bucket")
    fresh = tmp_path / "fresh"
    assert fetch_results(fresh, tmp_path / "bucket") == COPIED
    found = {path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()}
    assert found == {*COPIED, results_copy.SENT}
    assert send_results(fresh, tmp_path / "bucket") == []
    assert fetch_results(fresh, tmp_path / "bucket") == []  # a workdir that is there stays


def test_a_copy_that_was_cut_short_is_no_run(tmp_path):
    write_all(tmp_path / "run")
    send_results(tmp_path / "run", tmp_path / "bucket")
    (tmp_path / "bucket/workdir/config.json").unlink()  # would have come last
    assert fetch_results(tmp_path / "fresh", tmp_path / "bucket") == []
    assert not (tmp_path / "fresh").exists()
