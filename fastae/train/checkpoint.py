"""`Checkpoint`: the callback that writes everything training needs to go on, and the file it writes."""

from __future__ import annotations

import copy
import json
import os
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastae.data.writers import write_atomically
from fastae.nn.arguments import whole_number
from fastae.train.callbacks import EarlyStopping
from fastae.train.distributed import Ranks
from fastae.train.run import Callback, Run

_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError)  # what a damaged state raises


_WEIGHTS = ("model.", f"callback.{EarlyStopping.__name__}.")  # how their names begin


class Checkpoint(Callback):
    """Write everything that training needs to go on, bit for bit, to `directory`/checkpoint.safetensors.

    The file is replaced as a whole after every `every` epochs: parameters, optimizer, random state, history, the other
    callbacks (the best weights of `EarlyStopping` among them). Of several processes rank 0 reads and writes it, and an
    error there is raised on all; another number of them may go on from it.

    Args:
        directory: made if it is missing.
        every: epochs between two writes, at least 1.
        resume: start from the checkpoint if there is one. Data, scaling and every setting of `fit` but `epochs` must be
            what they were. A run that `EarlyStopping` ended goes on if that has more patience now.
        overwrite: start over where there is a checkpoint, which the first one written then replaces.

    Raises ValueError if there is a checkpoint but neither `resume` nor `overwrite`, or it is truncated, not written by
    fastae or of another run; TypeError, before training begins, if the state of a callback or of the optimizer is not
    made of numbers, strings, tensors, lists, tuples and dicts; OSError if the file cannot be written.
    """

    def __init__(
        self, directory: str | os.PathLike[str], every: int = 1, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path = Path(directory) / "checkpoint.safetensors"
        self.every, self.resume = whole_number("Checkpoint", "every", every, 1), resume
        self.overwrite = overwrite

    @property
    def epochs(self) -> int:
        """How many epochs the checkpoint has that a resumed run goes on from; 0 where there is none."""
        return len(self._read()["history"]["loss"]) if self.resume and self.path.exists() else 0

    def on_train_begin(self, run: Run) -> None:
        _encoded(run.state_dict())  # what cannot be written is refused before an epoch has been paid for
        if (state := Ranks().on_rank_0(self._begin)) is None:
            return
        self._load(run, state)
        waiting = [c for c in run.callbacks if isinstance(c, EarlyStopping)]
        if run.history.stopped == "early stopping" and all(c.wait < c.patience for c in waiting):
            run.history.stopped = None

    def _load(self, run: Run, state: dict[str, Any]) -> None:
        """All of the state or, with an error, nothing of it."""
        before = copy.deepcopy(run.state_dict())
        try:
            run.check_settings(state)
            self._check_finite(run, state)
            _check_groups(run.optimizer, state["param_groups"])
            run.load_state_dict(state)
        except _DAMAGE as error:
            run.load_state_dict(before)
            if isinstance(error, ValueError) and str(error).startswith("Checkpoint: "):
                raise
            raise self._unreadable(error) from error

    def _check_finite(self, run: Run, state: dict[str, Any]) -> None:
        """No run writes weights that are not: `fit` ends before. Buffers may hold inf, a mask say."""
        weights = tuple(name for name, _ in run.model.named_parameters())
        for name, value in state.items():
            of_weight = isinstance(value, Tensor) and name.startswith(_WEIGHTS) and name.endswith(weights)
            if of_weight and not bool(value.isfinite().all()):
                raise ValueError(f"Checkpoint: {self.path} must hold finite weights; got NaN or inf in {name}")

    def _unreadable(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())
        return ValueError(
            f"Checkpoint: {self.path} must be a checkpoint of fastae; it is truncated, or was not written by fastae "
            f"({reason})"
        )

    def on_epoch_end(self, run: Run) -> None:
        if run.history.epochs % self.every == 0:
            Ranks().on_rank_0(lambda: self._write(run))

    def _begin(self) -> dict[str, Any] | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return None
        if self.resume:
            return self._read()
        if not self.overwrite:
            raise ValueError(f"Checkpoint: {self.path} exists; resume=True goes on from it, overwrite=True starts over")
        return None

    def _write(self, run: Run) -> None:
        from safetensors.torch import save as to_bytes

        values, tensors = _encoded(run.state_dict())
        # clone: safetensors refuses tensors that share memory, as the state of a user's own optimizer may
        copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_atomically({self.path: to_bytes(copies, {"fastae": json.dumps(values)})})

    def _read(self) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        try:
            # Of the file's bytes: tensors that map it would live in a file that others may write to
            tensors = from_bytes(data := self.path.read_bytes())
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            values = json.loads(header["__metadata__"]["fastae"])
            state = {name: _decoded(value, tensors) for name, value in values.items()}
            inside = _names(values)
            state |= {name: t for name, t in tensors.items() if name not in inside}
            if missing := {"settings", "history", "param_groups", "generator"} - state.keys():
                raise KeyError(*sorted(missing))
            return state
        except (SafetensorError, *_DAMAGE) as error:
            raise self._unreadable(error) from None


def _check_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """An optimizer takes groups with options missing or of another kind, and fails when it steps."""
    for group in saved:
        for name, value in optimizer.defaults.items():
            now = group[name]
            if value is None or now is None or isinstance(now, type(value)):
                continue
            for kinds in ((Number, Tensor), (list, tuple)):
                if isinstance(value, kinds) and isinstance(now, kinds):
                    break
            else:
                raise TypeError(f"the optimizer's {name} must be a {type(value).__name__}; got {now!r}")


# ---------------------------------------------------------------- a state as JSON and tensors

# JSON has neither tuples nor keys that are numbers: these are written as objects with one such key
_TUPLE, _DICT, _TENSOR = "$tuple", "$dict", "$tensor"


def _encoded(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values, tensors by name) that `_decoded` makes equal values from."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: _json(value, name, tensors) for name, value in state.items() if not isinstance(value, Tensor)}
    return values, tensors


def _json(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, np.generic) and isinstance(value.item(), (bool, int, float)):
        return value.item()
    if isinstance(value, Tensor):
        while where in tensors:  # the keys 1 and "1" of a dict, say
            where += "'"
        tensors[where] = value
        return {_TENSOR: where}
    if isinstance(value, (list, tuple)):
        items = [_json(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(key, _json(item, f"{where}.{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {_DICT: [[_json(key, where, tensors), item] for key, item in pairs]}
    raise TypeError(
        f"Checkpoint: {where} must be made of numbers, strings, tensors, lists, tuples and dicts to be written; "
        f"got {type(value).__name__}"
    )


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(_decoded(value[_TUPLE], tensors))
    if value.keys() == {_DICT}:
        return {_decoded(key, tensors): _decoded(item, tensors) for key, item in value[_DICT]}
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    return {key: _decoded(item, tensors) for key, item in value.items()}


def _names(value: Any) -> set[str]:
    """The tensors that stand inside values."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return {value[_TENSOR]}
        value = list(value.values())
    return set().union(*map(_names, value)) if isinstance(value, list) else set()
