"""The loop on a toy: its order, exact resume, a loss that is no number, a request to stop."""

import json
import os
import signal
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from rich.console import Console

from trimpi_jax.io.checkpoints import Keep, saved_steps
from trimpi_jax.io.metrics import append_metrics, read_metrics
from trimpi_jax.io.progress import Progress
from trimpi_jax.stages import loop


class Item(NamedTuple):
    """A toy example."""

    example_id: str
    value: float


class Toy:
    """A stream of numbers, a state that depends on all of them in order, and a list of events."""

    def __init__(self, folder, num_steps=6, save_every=2, breaks_at=None, stops_at=None, **more):
        self.settings = loop.LoopSettings(
            "toy", folder, num_steps, save_every, log_every=3, evaluate_every=2, **more
        )
        self.measured = {}  # step -> what an evaluation finds
        self.place, self.events = 0, []
        self.breaks_at, self.stops_at = breaks_at, stops_at
        self.said = []

    def fetch(self, step):
        self.events.append(f"fetch {step}")
        self.place += 1
        return [Item(f"item-{self.place}", float(self.place))]

    def save_place(self):
        self.events.append(f"save {self.place}")
        return {"place": self.place}

    def restore_place(self, saved):
        self.place = saved["place"]

    def take_step(self, state, step, examples):
        self.events.append(f"step {step}")
        if step == self.stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = float("nan") if step == self.breaks_at else 1.0 / (step + 1)
        # not commutative: another order or a repeated example gives another number
        total = 3 * state["total"] + examples[0].value
        return {"total": total}, {"train/loss": jnp.asarray(loss), "toy/name": "x"}

    def evaluate(self, state, step):
        self.events.append(f"evaluate {step}")
        return {"evaluation/main_accuracy": self.measured.get(step, 0.0)}

    def is_finished(self):
        return False

    def run(self):
        progress = Progress(Console(quiet=True))
        progress.say = self.said.append
        progress.line = lambda name, step, *rest: self.events.append(f"log {step}")
        return loop.run(
            self.settings,
            {"total": jnp.zeros((), jnp.float32)},
            loop.Source(self.fetch, self.save_place, self.restore_place),
            self.take_step,
            progress,
            self.evaluate,
            self.is_finished,
        )


def read_losses(folder):
    return [(line["step"], line["train/loss"]) for line in read_metrics(folder / "metrics.jsonl")]


UNBROKEN = [(step, pytest.approx(1 / (step + 1))) for step in range(6)]


def test_the_order_is_evaluate_save_fetch_step_log(tmp_path):
    toy = Toy(tmp_path, num_steps=4)
    toy.run()
    assert toy.events == [
        *("save 0", "fetch 0", "step 0", "fetch 1", "step 1"),
        # the numbers of step 2 are looked at when step 3 is under way
        *("evaluate 2", "save 2", "fetch 2", "step 2", "fetch 3", "step 3", "log 3", "log 4"),
        "save 4",
    ]
    assert [step for step, _ in read_losses(tmp_path)] == [0, 1, 2, 3]


def test_a_stop_request_saves_and_the_resumed_run_equals_the_unbroken_one(tmp_path):
    expected = Toy(tmp_path / "unbroken").run()
    stopped = Toy(tmp_path / "broken", stops_at=2)
    with pytest.raises(loop.Stopped) as stop:
        stopped.run()
    assert stop.value.code == loop.EXIT_STOPPED == 75
    # the step was finished, then everything saved at once though step 3 is no multiple of 2
    assert stopped.events[-4:] == ["fetch 2", "step 2", "log 3", "save 3"]
    assert "stopped and saved at step 3" in stopped.said[-1]

    resumed = Toy(tmp_path / "broken")
    state = resumed.run()
    assert resumed.said[0] == "toy: continuing at step 3 of 6"
    assert [event for event in resumed.events if "step" in event] == ["step 3", "step 4", "step 5"]
    # 3 (3 (3 (3 (3 (1) + 2) + 3) + 4) + 5) + 6 = 543
    assert float(state["total"]) == float(expected["total"]) == 543
    assert read_losses(tmp_path / "broken") == UNBROKEN


def test_a_stage_that_has_enough_ends_early_and_stays_ended(tmp_path):
    toy = Toy(tmp_path)
    toy.is_finished = lambda: toy.place >= 3
    assert float(toy.run()["total"]) == 18  # 3 (3 (1) + 2) + 3
    assert toy.events[-1:] == ["save 3"]
    assert "ended early, at step 3" in toy.said[-1]
    again = Toy(tmp_path)
    again.is_finished = lambda: again.place >= 3
    assert float(again.run()["total"]) == 18
    assert not [event for event in again.events if event.startswith("step")]
    assert [step for step, _ in read_losses(tmp_path)] == [0, 1, 2]


def test_metrics_are_fetched_a_step_late_but_before_every_save(tmp_path):
    toy = Toy(tmp_path, num_steps=4)
    seen = []
    plain = toy.take_step

    def take_step(state, step, examples):
        seen.append([line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")])
        return plain(state, step, examples)

    toy.take_step = take_step
    toy.run()
    # before step 1 nothing has been fetched; before step 2 there was a save
    assert seen == [[], [], [0, 1], [0, 1]]
    times = [line["time/step_s"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert all(seconds > 0 for seconds in times)


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(loop.Stopped):
        Toy(tmp_path, stops_at=0).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_crash_loses_the_steps_since_the_last_save_and_nothing_else(tmp_path):
    crashing = Toy(tmp_path)

    def fetch(step):
        if step == 5:
            raise KeyError("disk gone")
        return Toy.fetch(crashing, step)

    crashing.fetch = fetch
    with pytest.raises(KeyError):
        crashing.run()
    resumed = Toy(tmp_path)
    assert float(resumed.run()["total"]) == 543
    assert resumed.events[0] == "evaluate 4"  # saved at 4; step 4 is taken again
    assert read_losses(tmp_path) == UNBROKEN  # and its line is not counted twice


def test_a_finished_stage_is_not_trained_again(tmp_path):
    Toy(tmp_path).run()
    again = Toy(tmp_path)
    assert float(again.run()["total"]) == 543
    assert not [event for event in again.events if event.startswith("step")]


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint_and_names_the_batch(tmp_path):
    with pytest.raises(loop.NonFiniteLoss) as error:
        Toy(tmp_path, breaks_at=3).run()
    message = str(error.value)
    assert "toy step 3" in message
    assert "'train/loss': nan" in message
    assert "checkpoint is step 2" in message
    assert "item-4" in message  # the fourth example is that of step 3
    assert [step for step, _ in read_losses(tmp_path)] == [0, 1, 2]
    assert float(Toy(tmp_path).run()["total"]) == 543  # the good checkpoint goes on


def test_dropped_examples_are_said(tmp_path):
    toy = Toy(tmp_path, num_steps=1)
    plain = toy.take_step
    toy.take_step = lambda *args: (plain(*args)[0], {"inputs/dropped_too_long": 2})
    toy.run()
    assert any("2 examples fit no bucket" in text for text in toy.said)


def test_metrics_survive_a_last_line_that_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_metrics(path, step, {"train/loss": jnp.asarray(float(step))})
    path.write_text(path.read_text()[:-9])
    assert read_losses(tmp_path) == [(0, 0.0), (1, 1.0)]
    append_metrics(path, 2, {"train/loss": 7.0})  # the resumed run writes on
    append_metrics(path, 3, {"train/loss": 8.0})
    assert read_losses(tmp_path) == [(0, 0.0), (1, 1.0), (2, 7.0), (3, 8.0)]


def test_metrics_are_plain_json_even_where_a_number_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = append_metrics(path, 0, {"a/x": float("inf"), "a/y": jnp.ones(()), "a/z": {"k": 1}})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == line
    assert line == {"step": 0, "a/x": "inf", "a/y": 1.0, "a/z": {"k": 1}}


def test_no_metrics_yet_is_an_empty_list(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


BY_EVALUATION = Keep(last=1, best=1, metric="evaluation/main_accuracy", result="best")


def test_the_best_evaluation_is_kept_and_handed_on(tmp_path):
    toy = Toy(tmp_path, save_every=6, keep=BY_EVALUATION)
    toy.measured = {2: 0.5, 4: 0.75, 6: 0.25}
    state = toy.run()
    # saved where it was evaluated, though save_every is 6; the last step is a candidate, too
    assert [event for event in toy.events if event[:2] in ("ev", "sa")] == [
        *("save 0", "evaluate 2", "save 2", "evaluate 4", "save 4", "evaluate 6", "save 6")
    ]
    assert saved_steps(tmp_path / "checkpoints") == [4, 6]
    assert float(state["total"]) == 58  # 3 (3 (3 (1) + 2) + 3) + 4: the state before step 4
    assert "step 4 of 6 is handed on, with evaluation/main_accuracy 0.75" in toy.said[-1]
    again = Toy(tmp_path, save_every=6, keep=BY_EVALUATION)
    assert float(again.run()["total"]) == 58  # a start after the end finds the same
    assert not [event for event in again.events if event[:2] in ("ev", "st")]


def test_the_last_is_handed_on_unless_the_best_is_asked_for(tmp_path):
    keep = Keep(last=1, best=1, metric="evaluation/main_accuracy")
    toy = Toy(tmp_path, keep=keep)
    toy.measured = {2: 1.0}
    assert float(toy.run()["total"]) == 543
    assert saved_steps(tmp_path / "checkpoints") == [2, 6]


def test_a_metric_of_steps_is_judged_by_its_mean_since_the_last_checkpoint(tmp_path):
    # losses 1, 1/2 before step 2; 1/3, 1/4 before 4; 1/5, 1/6 before 6: the first mean is highest
    keep = Keep(last=1, best=1, metric="train/loss", highest=True, result="best")
    toy = Toy(tmp_path, keep=keep)
    assert float(toy.run()["total"]) == 5  # 3 (1) + 2
    assert "step 2 of 6 is handed on, with train/loss 0.75" in toy.said[-1]


def test_an_unknown_metric_is_told_at_the_first_step_with_those_that_are_there(tmp_path):
    toy = Toy(tmp_path / "a", keep=Keep(best=1, metric="train/los"))
    with pytest.raises(ValueError, match=r"no metric 'train/los' .*'train/loss'"):
        toy.run()
    assert "step 2" not in toy.events
    toy = Toy(tmp_path / "b", keep=Keep(best=1, metric="evaluation/main_acuracy"))
    with pytest.raises(ValueError, match=r"'evaluation/main_acuracy' .*'evaluation/main_accuracy'"):
        toy.run()


def test_checkpoints_may_lie_elsewhere(tmp_path):
    Toy(tmp_path / "run", checkpoints=str(tmp_path / "elsewhere")).run()
    assert saved_steps(tmp_path / "elsewhere") == [4, 6]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_start_that_lost_its_folder_saves_no_more(tmp_path):
    calls = []

    def lost():
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("was taken over")

    toy = Toy(tmp_path, before_save=lost)
    with pytest.raises(ValueError, match="was taken over"):
        toy.run()
    assert saved_steps(tmp_path / "checkpoints") == [0, 2]
