"""What a person watches: one bar with an ETA, one line per group of steps, tables.

Next: trimpi_jax/io/report.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

# metric -> (short name, format), in the order of the log line; absent metrics are left out
SHOWN = {
    "train/loss": ("loss", ".4f"),
    "rollouts/accuracy_free": ("free", ".2f"),
    "rollouts/accuracy_aware": ("aware", ".2f"),
    "rollouts/reward_mean": ("reward", ".3f"),
    "train/kl": ("kl", ".4f"),
    "train/grad_norm": ("grad", ".2f"),
    "time/step_s": ("s/step", ".2f"),
}


class Progress:
    """A thin shell around rich: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(soft_wrap=True)

    @classmethod
    def of_process(cls) -> Progress:
        """Speaks on the first process of a run; the others are silent."""
        return cls(Console(soft_wrap=True, quiet=jax.process_index() > 0))

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, highlight=False, markup=False)

    def line(self, name: str, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """One line of numbers."""
        parts = [
            f"{short} {metrics[key]:{form}}"
            for key, (short, form) in SHOWN.items()
            if isinstance(metrics.get(key), float | int)
        ]
        self.say(f"{name:<10} {step:>6}/{steps}  " + "  ".join(parts))

    def table(self, table: Table) -> None:
        """A rich table."""
        self.console.print(table)

    @contextlib.contextmanager
    def task(self, name: str, total: int | None) -> Iterator[Callable[..., None]]:
        """A bar with count, elapsed time and ETA; yields `update(done, metrics, total=None)`.

        `total` None: not known yet, the updates bring it.
        """
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(name, total=total, note="")

            def update(done: int, metrics: Mapping[str, Any], total: int | None = None) -> None:
                loss = metrics.get("train/loss")
                note = f"loss {loss:.3f}" if isinstance(loss, float) else ""
                bar.update(task, completed=done, note=note, total=total)

            yield update
