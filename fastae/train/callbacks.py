"""`EarlyStopping`: the callback that ends training in time."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastae.nn.arguments import nearest, whole_number
from fastae.train.run import Callback, Run

MONITORS = ("val_loss", "loss")


class EarlyStopping(Callback):
    """Stop when the monitored loss has not fallen for `patience` epochs.

    Args:
        patience: epochs without improvement to wait for, at least 1.
        restore_best: give the model the weights of its best epoch when training ends, unless by an error.
        min_delta: a smaller fall than this does not count.
        monitor: "val_loss" or "loss".

    Raises ValueError for a bad argument, and when training begins without the monitored quantity.
    """

    def __init__(
        self, patience: int = 10, restore_best: bool = True, min_delta: float = 0.0, monitor: str = "val_loss"
    ) -> None:
        patience = whole_number("EarlyStopping", "patience", patience, 1)
        if monitor not in MONITORS:
            raise ValueError(
                f"EarlyStopping: monitor must be one of {', '.join(MONITORS)}; "
                f"got {monitor!r}{nearest(monitor, MONITORS)}"
            )
        self.patience, self.restore_best, self.min_delta, self.monitor = patience, restore_best, min_delta, monitor
        self._reset()

    def _reset(self) -> None:
        self.best, self.best_epoch, self.wait = math.inf, 0, 0
        self._weights: dict[str, Tensor] = {}

    def on_train_begin(self, run: Run) -> None:
        if self.monitor == "val_loss" and not run.has_validation:
            raise ValueError(
                "EarlyStopping: monitor 'val_loss' needs validation data; got none (or use monitor='loss')"
            )
        self._reset()

    def on_epoch_end(self, run: Run) -> None:
        value = getattr(run.history, self.monitor)[-1]
        if value < self.best - self.min_delta:
            self.best, self.best_epoch, self.wait = value, run.history.epochs, 0
            if self.restore_best:
                self._weights = {k: v.detach().clone() for k, v in run.model.state_dict().items()}
        else:
            self.wait += 1
            if self.wait >= self.patience:
                run.stop("early stopping")

    def on_train_end(self, run: Run) -> None:
        if self._weights:
            run.model.load_state_dict(self._weights)
            run.history.best_epoch = self.best_epoch

    def state_dict(self) -> dict[str, Any]:
        scalars = {"best": self.best, "best_epoch": self.best_epoch, "wait": self.wait}
        return scalars | {f"weights.{k}": v for k, v in self._weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self.wait = state["best"], state["best_epoch"], state["wait"]
        self._weights = {k.removeprefix("weights."): v for k, v in state.items() if k.startswith("weights.")}
