"""The only training loop: evaluate, save, fetch, step, log; in that order, until the last step.

Metrics are fetched a step late: while the host waits for the numbers of one step, the device
already works on the next. Before a save they are fetched at once, so nothing that was not looked at
is ever saved.

The data iterator moves only after a save, so a checkpoint and the iterator's state always belong
together and a resumed run takes the identical next step. Ctrl-C and SIGTERM finish the step, save,
and end the program with status 75 and a line that says how to go on; a kill loses at most
`save_every` steps. Of several processes one that gets SIGTERM is enough: JAX's preemption service
tells the others, and all stop before the same step.

Next: trimpi_jax/stages/sft.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from trimpi_jax.io.checkpoints import (
    Keep,
    best_step,
    closing,
    finish_saves,
    open_checkpoints,
    restore_latest,
    restore_step,
    save_checkpoint,
)
from trimpi_jax.io.metrics import append_metrics
from trimpi_jax.io.progress import Progress


class Stopped(SystemExit):
    """The run was asked to stop and saved itself; the exit status says "start me again"."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; the last good checkpoint is kept."""


EXIT_STOPPED = 75  # EX_TEMPFAIL: a launcher may start the same command again
EVALUATION = "evaluation/"  # metrics that an evaluation finds, not a step
# JAX wants a number that goes up by one with every question, over all stages of a process
_QUESTIONS = itertools.count()


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """When to do what, in loop steps."""

    name: str
    folder: Path
    num_steps: int
    save_every: int
    log_every: int = 10
    evaluate_every: int = 0  # 0 = never; not at the start and the end, which the stage's owner does
    keep: Keep = dataclasses.field(default_factory=Keep)
    checkpoints: str = ""  # where they lie; "" = in the folder
    before_save: Callable[[], None] = lambda: None  # may raise: then nothing is saved


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the loop's examples come from: a stream with a saveable place."""

    fetch: Callable[[int], Any]  # step -> examples
    save_place: Callable[[], dict]
    restore_place: Callable[[dict], None]


StepFunction = Callable[[Any, int, Any], tuple[Any, Mapping[str, Any]]]


def run(
    settings: LoopSettings,
    state: Any,
    source: Source,
    take_step: StepFunction,
    progress: Progress,
    evaluate: Callable[[Any, int], Mapping[str, Any] | None] = lambda state, step: None,
    is_finished: Callable[[], bool] = lambda: False,
) -> Any:
    """Train to `num_steps` and return the last state, or the best; goes on from the newest one.

    Args:
        settings: see `LoopSettings`.
        state: the state of step 0; its shardings are used on restore.
        source: where examples come from.
        take_step: (state, step, examples) -> (state, metrics); metrics may be device arrays,
            "train/loss" is checked to be finite.
        progress: where bars and lines go.
        evaluate: called every `evaluate_every` steps with the state and the step, before a save;
            may return its metrics, one of which may be the score of a checkpoint.
        is_finished: asked after every step, and after a restore; True ends the stage early.

    Raises:
        NonFiniteLoss: naming the step and its examples.
        Stopped: after SIGINT or SIGTERM, when everything is saved.
        CheckpointFailed: the disk is full, or the store out of reach; what was saved is whole.
        ValueError: `keep.metric` is none that the stage has.
    """
    manager = open_checkpoints(
        settings.checkpoints or settings.folder / "checkpoints", settings.keep
    )
    first = 0
    restored = restore_latest(manager, state)
    if restored is not None:
        state, host, first = restored
        source.restore_place(host["source"])
        progress.say(f"{settings.name}: continuing at step {first} of {settings.num_steps}")
    score = _Score(settings.keep)
    scored_by_evaluation = settings.keep.metric.startswith(EVALUATION)

    def save(step: int) -> None:
        is_new = step not in manager.all_steps()
        if is_new:
            settings.before_save()
        started = time.perf_counter()
        save_checkpoint(manager, step, state, {"source": source.save_place()}, score.take())
        if (
            is_new and step == first
        ):  # a store that takes no checkpoint is told before the first step
            finish_saves(manager)
            seconds = time.perf_counter() - started
            progress.say(
                f"{settings.name}: checkpoint {step} written in {seconds:.1f} s; a stop (SIGTERM)"
                " takes as long, and the rest of a step"
            )

    with (
        closing(manager),
        _StopRequests() as stop,
        progress.task(settings.name, settings.num_steps) as bar,
    ):
        bar(first, {})
        late = _LateMetrics(settings, manager, progress, bar, score)
        last = first
        for step in range(first, settings.num_steps):
            if is_finished():
                progress.say(f"{settings.name}: ended early, at step {step}")
                break
            is_asked = stop.is_asked()
            is_scored = False
            if _is_due(step, settings.evaluate_every) and not is_asked:
                late.flush()
                is_scored = score.add_evaluation(evaluate(state, step))
            if step % settings.save_every == 0 or is_asked or is_scored:
                late.flush()
                save(step)
            if is_asked:
                finish_saves(manager)
                progress.say(
                    f"{settings.name}: stopped and saved at step {step}; start the same"
                    " command again to continue"
                )
                raise Stopped(EXIT_STOPPED)
            examples = source.fetch(step)
            late.start()
            state, metrics = take_step(state, step, examples)
            late.put(step, metrics, examples)
            last = step + 1
        late.flush()
        if scored_by_evaluation and last not in manager.all_steps():
            score.add_evaluation(evaluate(state, last))
        save(last)
        finish_saves(manager)
        if settings.keep.result == "best":
            best = best_step(manager)
            if best is None:
                raise ValueError(f"{settings.name}: no checkpoint has a {settings.keep.metric}")
            progress.say(
                f"{settings.name}: step {best} of {last} is handed on, with"
                f" {settings.keep.metric} {manager.metrics(best)['score']:.4g}"
            )
            if best != last:
                state, _ = restore_step(manager, best, state)
    return state


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


class _LateMetrics:
    """Holds the metrics of one step until the next has been dispatched, then tells them."""

    def __init__(self, settings: LoopSettings, manager: Any, progress: Progress, bar: Any, score):
        self.settings, self.manager, self.progress, self.bar = settings, manager, progress, bar
        self.score = score
        self.waiting: tuple[int, Mapping[str, Any], Any] | None = None
        self.since: float | None = None  # when the time of the waiting step began to count

    def start(self) -> None:
        """A step is about to be dispatched."""
        if self.since is None:
            self.since = time.perf_counter()

    def put(self, step: int, metrics: Mapping[str, Any], examples: Any) -> None:
        """A step has been dispatched; the one before is told now."""
        self._tell()
        self.waiting = step, metrics, examples

    def flush(self) -> None:
        """Tell the last step now; time until the next step does not count."""
        self._tell()
        self.since = None

    def _tell(self) -> None:
        if self.waiting is None:
            return
        step, metrics, examples = self.waiting
        self.waiting = None
        metrics = {name: jax.device_get(value) for name, value in metrics.items()}
        now = time.perf_counter()
        # a step that waits for its own end knows its time better
        metrics.setdefault("time/step_s", now - (self.since or now))
        self.since = now
        settings = self.settings
        _check_finite(settings, self.manager, step, metrics, examples)
        line = append_metrics(settings.folder / "metrics.jsonl", step, metrics)
        self.score.add_step(line)
        if dropped := line.get("inputs/dropped_too_long"):
            self.progress.say(
                f"{settings.name} step {step}: {dropped} examples fit no bucket and were left out"
                " (nothing is cut)"
            )
        self.bar(step + 1, line)
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.num_steps:
            self.progress.line(settings.name, step + 1, settings.num_steps, line)


def _check_finite(settings, manager, step: int, metrics: Mapping[str, Any], examples: Any) -> None:
    bad = {
        name: float(metrics[name])
        for name in ("train/loss", "train/grad_norm")
        if name in metrics and not math.isfinite(float(metrics[name]))
    }
    if bad:
        manager.wait_until_finished()
        names = [getattr(example, "example_id", "?") for example in examples][:16]
        raise NonFiniteLoss(
            f"{settings.name} step {step}: {bad}. Nothing of this step was saved; the last good"
            f" checkpoint is step {manager.latest_step()} in {settings.folder}/checkpoints. The"
            f" batch: {names}. Lower the learning rate, or look at these examples."
        )


class _Score:
    """What the next checkpoint is judged by: of an evaluation, or the mean of the steps before."""

    def __init__(self, keep: Keep):
        self.keep, self.seen = keep, []

    def add_step(self, line: Mapping[str, Any]) -> None:
        """The numbers of a step."""
        metric = self.keep.metric
        if not metric or metric.startswith(EVALUATION):
            return
        _check_metric(metric, line)
        self.seen.append(float(line[metric]))

    def add_evaluation(self, found: Mapping[str, Any] | None) -> bool:
        """The numbers of an evaluation; whether they make a score."""
        metric = self.keep.metric
        if not metric.startswith(EVALUATION):
            return False
        _check_metric(metric, found or {})
        self.seen = [float((found or {})[metric])]
        return True

    def take(self) -> float | None:
        """The score of a checkpoint that is saved now."""
        seen, self.seen = self.seen, []
        return sum(seen) / len(seen) if seen else None


def _check_metric(metric: str, found: Mapping[str, Any]) -> None:
    if not isinstance(found.get(metric), int | float):
        numbers = sorted(name for name, value in found.items() if isinstance(value, int | float))
        raise ValueError(
            f"there is no metric '{metric}' to choose the best by; there are {numbers}"
        )


class _StopRequests:
    """Notices SIGINT and SIGTERM while it is open; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequests:
        def note(signum: int, frame: Any) -> None:
            if self.received and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self.received.append(signum)
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)  # to JAX's own handler, which tells the others

        # of several processes JAX's preemption service has SIGTERM already
        several = jax.process_count() > 1
        with contextlib.suppress(ValueError):  # not in the main thread (tests): no handlers
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def is_asked(self) -> bool:
        """Whether to stop before the coming step: the same answer on all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_QUESTIONS))
        return bool(self.received)
