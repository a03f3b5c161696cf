"""Metrics of a training run: one number per epoch of each quantity."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from fastae.train.plots import plot_losses


@dataclass
class History:
    """One list entry per finished epoch.

    loss: the objective trained, the mean over the epoch's steps; val_loss: the objective of the held-out rows, clean,
    with the mean of a variational code and beta in full (empty without validation data);
    nll, kl: of a variational code, the two parts of the loss in nats a row, without beta; active_units: the latents
    whose mean varies over the rows (by more than 0.01); empty for other models;
    penalty: what a bottleneck `L1`, `KLSparse` or `Contractive` raised the loss by; empty for other models;
    rows_per_s: training rows per second;
    stopped: why training ended before the last epoch ("early stopping", "interrupted"), or None;
    best_epoch: that whose weights `EarlyStopping` gave the model back, counted from 1; None: it has the last ones.
    """

    loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    rows_per_s: list[float] = field(default_factory=list)
    stopped: str | None = None
    best_epoch: int | None = None
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    active_units: list[int] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """The number of finished epochs."""
        return len(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, ready for JSON; `History(**d)` gives it back."""
        return {
            "loss": list(self.loss),
            "val_loss": list(self.val_loss),
            "rows_per_s": list(self.rows_per_s),
            "stopped": self.stopped,
            "best_epoch": self.best_epoch,
        } | {name: list(values) for name in ("nll", "kl", "active_units", "penalty") if (values := getattr(self, name))}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the loss curves into the image file `path`. Raises ImportError without matplotlib (fastae[plots])."""
        plot_losses({"training": self.loss, "validation": self.val_loss}, path)
