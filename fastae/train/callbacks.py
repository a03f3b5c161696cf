"""Built-in callbacks: `EarlyStopping` and `Checkpoint`."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fastae.data.writers import write_atomically
from fastae.nn.arguments import nearest
from fastae.train.distributed import Ranks
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
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be at least 1; got {patience}")
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

    def state_dict(self) -> dict[str, Any]:
        scalars = {"best": self.best, "best_epoch": self.best_epoch, "wait": self.wait}
        return scalars | {f"weights.{k}": v for k, v in self._weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_epoch, self.wait = state["best"], state["best_epoch"], state["wait"]
        self._weights = {k.removeprefix("weights."): v for k, v in state.items() if k.startswith("weights.")}


class Checkpoint(Callback):
    """Write everything that training needs to go on, bit for bit, to `directory`/checkpoint.safetensors.

    The file is replaced as a whole after every `every` epochs: parameters, optimizer, random state, history, the other
    callbacks (the best weights of `EarlyStopping` among them). Of several processes rank 0 reads and writes it, and an
    error there is raised on all; another number of them may go on from it.

    Args:
        directory: made if it is missing.
        every: epochs between two writes, at least 1.
        resume: start from the checkpoint if there is one. Every setting of `fit` but `epochs` must be what it was.

    Raises ValueError if the checkpoint is truncated, not written by fastae or of another run; OSError if it cannot be
    written.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 1, resume: bool = False) -> None:
        if every < 1:
            raise ValueError(f"Checkpoint: every must be at least 1; got {every}")
        self.path = Path(directory) / "checkpoint.safetensors"
        self.every, self.resume = every, resume

    def on_train_begin(self, run: Run) -> None:
        if (state := Ranks().on_rank_0(self._begin)) is not None:
            run.load_state_dict(state)

    def on_epoch_end(self, run: Run) -> None:
        if run.history.epochs % self.every == 0:
            Ranks().on_rank_0(lambda: self._write(run))

    def _begin(self) -> dict[str, Any] | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self._read() if self.resume and self.path.exists() else None

    def _write(self, run: Run) -> None:
        from safetensors.torch import save as to_bytes

        state = run.state_dict()
        # clone: safetensors refuses tensors that share memory, as the state of a user's own optimizer may
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, Tensor)}
        values = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        write_atomically({self.path: to_bytes(tensors, {"fastae": json.dumps(values)})})

    def _read(self) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                values = json.loads(file.metadata()["fastae"])
                state = values | {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
            if missing := {"settings", "history", "param_groups", "generator"} - state.keys():
                raise KeyError(*sorted(missing))
            return state
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Checkpoint: {self.path} must be a checkpoint of fastae; it is truncated, or was not written by "
                f"fastae ({error})"
            ) from None
