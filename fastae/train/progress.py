"""The progress of `fit`: a live bar on a terminal, about ten lines elsewhere. Writes to stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from fastae.train.history import History


class Progress:
    """`step` is called every step and `epoch` every epoch; neither waits for a device."""

    def __init__(self, epochs: int, steps: int, done: int, enabled: bool) -> None:
        self._epochs, self._steps, self._done = epochs, steps, done
        self._every = -(-epochs // 10)
        self._bar: Any = None
        self._task: Any = None
        self._enabled, self._next = enabled, 0.0

    def __enter__(self) -> Progress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=Console(stderr=True))
            total = self._epochs * self._steps
            self._task = self._bar.add_task(
                "", total=total, completed=self._done * self._steps, epoch=f"{self._done}/{self._epochs}", figures=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        if self._bar is not None and (now := time.monotonic()) >= self._next:  # rich costs more than a small step
            self._next = now + 0.1
            self._bar.update(self._task, completed=self._done * self._steps + step + 1)

    def epoch(self, history: History) -> None:
        self._done = history.epochs
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done * self._steps,
                epoch=f"{self._done}/{self._epochs}",
                figures=_figures(history),
            )
        elif self._enabled and (self._done % self._every == 0 or self._done == self._epochs or history.stopped):
            print(f"epoch {self._done}/{self._epochs}  {_figures(history)}", file=sys.stderr, flush=True)


def _figures(history: History) -> str:
    val_loss = f"  val_loss {history.val_loss[-1]:.6f}" if history.val_loss else ""
    return f"loss {history.loss[-1]:.6f}{val_loss}  {history.rows_per_s[-1]:,.0f} rows/s"
