"""State of a training run, and the base class `Callback`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastae.train.history import History


class Callback:
    """Called by `fit`; `run` gives the model, the optimizer, the history, and `run.stop(reason)`.

    `state_dict` and `load_state_dict` carry what must survive a resume: a dict of numbers, strings, tensors, lists,
    tuples and dicts, which come back equal.
    """

    def on_train_begin(self, run: Run) -> None: ...

    def on_epoch_end(self, run: Run) -> None: ...

    def on_train_end(self, run: Run) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Run:
    """A training run as callbacks see it; `state_dict` is all that a resume needs."""

    model: Any  # a `fastae.train.fit.TrainableModel`
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    callbacks: Sequence[Callback]
    settings: dict[str, Any]
    has_validation: bool
    history: History = field(default_factory=History)

    def stop(self, reason: str) -> None:
        """End training after the epoch under way."""
        self.history.stopped = reason

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, values in optimizer["state"].items():
            state |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
        for name, callback in self._named_callbacks():
            state |= {f"{name}{k}": v for k, v in callback.state_dict().items()}
        return state | {
            "param_groups": optimizer["param_groups"],
            "generator": self.generator.get_state(),
            "history": self.history.to_dict(),
            "settings": self.settings,
        }

    def check_settings(self, state: dict[str, Any]) -> None:
        """Raise ValueError if `state` belongs to a run with other settings."""
        saved = state["settings"]
        for name, value in self.settings.items():
            if name in saved and saved[name] != value:
                raise ValueError(f"Checkpoint: {name} must be {saved[name]!r}, as in the checkpoint; got {value!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

        def part(prefix: str) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        optimizer: dict[int, dict[str, Any]] = {}
        for name, value in part("optimizer.").items():
            index, key = name.split(".", 1)
            optimizer.setdefault(int(index), {})[key] = value
        self.model.load_state_dict(part("model."))
        before = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": state["param_groups"]})
        for own, group in zip(before, self.optimizer.param_groups, strict=True):
            for key, value in own.items():
                group.setdefault(key, value)  # what a scheduler made for this run has put there
        for p, values in self.optimizer.state.items():
            for key, value in values.items():  # a file has no strides, and fused optimizers go by memory
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    values[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self.generator.set_state(state["generator"])
        self.history = History(**state["history"])
        for name, callback in self._named_callbacks():
            if own := part(name):
                callback.load_state_dict(own)

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        """By class, and by order within a class: a run may be resumed with other callbacks beside."""
        seen: Counter[str] = Counter()
        for callback in self.callbacks:
            kind = type(callback).__name__
            yield f"callback.{kind}.{seen[kind]}.", callback
            seen[kind] += 1
