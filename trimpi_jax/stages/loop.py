"""The only training loop: evaluate, save, fetch, step, log; in that order, until the last step.

Metrics are fetched a step late: while the host waits for the numbers of one step, the device
already works on the next. Before a save they are fetched at once, so nothing that was not looked at
is ever saved.

The data iterator moves only after a save, so a checkpoint and the iterator's state always belong
together and a resumed run takes the identical next step. Ctrl-C and SIGTERM finish the step, save,
and end the program with a line that says how to go on; a kill loses at most `save_every` steps.

Next: trimpi_jax/stages/sft.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from trimpi_jax.io.checkpoints import open_checkpoints, restore_latest, save_checkpoint
from trimpi_jax.io.metrics import append_metrics
from trimpi_jax.io.progress import Progress


class Stopped(SystemExit):
    """The run was asked to stop and saved itself; the exit status says "start me again"."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; the last good checkpoint is kept."""


EXIT_STOPPED = 75  # EX_TEMPFAIL: a launcher may start the same command again


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """When to do what, in loop steps."""

    name: str
    folder: Path
    num_steps: int
    save_every: int
    log_every: int = 10
    evaluate_every: int = 0  # 0 = never; not at the start and the end, which the stage's owner does


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
    evaluate: Callable[[Any, int], None] = lambda state, step: None,
    is_finished: Callable[[], bool] = lambda: False,
) -> Any:
    """Train to `num_steps` and return the last state; continues from the newest checkpoint.

    Args:
        settings: see `LoopSettings`.
        state: the state of step 0; its shardings are used on restore.
        source: where examples come from.
        take_step: (state, step, examples) -> (state, metrics); metrics may be device arrays,
            "train/loss" is checked to be finite.
        progress: where bars and lines go.
        evaluate: called every `evaluate_every` steps with the state and the step, before a save.
        is_finished: asked after every step, and after a restore; True ends the stage early.

    Raises:
        NonFiniteLoss: naming the step and its examples.
        Stopped: after SIGINT or SIGTERM, when everything is saved.
    """
    manager = open_checkpoints(settings.folder / "checkpoints")
    first = 0
    restored = restore_latest(manager, state)
    if restored is not None:
        state, host, first = restored
        source.restore_place(host["source"])
        progress.say(f"{settings.name}: continuing at step {first} of {settings.num_steps}")
    try:
        with _stop_requests() as stop, progress.task(settings.name, settings.num_steps) as bar:
            bar(first, {})
            late = _LateMetrics(settings, manager, progress, bar)
            last = first
            for step in range(first, settings.num_steps):
                if is_finished():
                    progress.say(f"{settings.name}: ended early, at step {step}")
                    break
                if _is_due(step, settings.evaluate_every) and not stop:
                    late.flush()
                    evaluate(state, step)
                if step % settings.save_every == 0 or stop:
                    late.flush()
                    save_checkpoint(manager, step, state, {"source": source.save_place()})
                if stop:
                    manager.wait_until_finished()
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
            save_checkpoint(manager, last, state, {"source": source.save_place()})
            manager.wait_until_finished()
    finally:
        manager.close()
    return state


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step > 0 and step % every == 0


class _LateMetrics:
    """Holds the metrics of one step until the next has been dispatched, then tells them."""

    def __init__(self, settings: LoopSettings, manager: Any, progress: Progress, bar: Any):
        self.settings, self.manager, self.progress, self.bar = settings, manager, progress, bar
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


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second SIGINT stops at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    previous = {}
    with contextlib.suppress(ValueError):  # not in the main thread (tests): no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
