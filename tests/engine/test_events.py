"""What can happen to a model, its parameters, their storage, its hooks or its optimizer: a `TrainStep` heeds it.

The table: every EVENT, before the first step and between steps, under every optimizer, for every variant of the model,
by hand and inside `fit` by a callback. Each cell equals a plain loop in fp64 to rounding, or raises: what PyTorch
raises too, or what the event says.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from events import BATCHES, EVENTS, OPTIMIZERS, REFUSED, VARIANTS, Event, X, model
from torch import Tensor

import fastae
from fastae.engine.train_step import TrainStep
from fastae.likelihoods import Huber

# ---------------------------------------------------------------- the table

WHEN = ("before the first step", "between steps")
PLACE = 2  # the step, or the epoch, before which "between steps" is


@contextmanager
def removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()


def plainly(name: str, variant: str, optimizer: str, when: int, batches: list[Tensor], place: int) -> Any:
    """The weights and gradients of a loop as people write it, or what it raises."""
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    with removed(handles):
        try:
            for i, x in enumerate(batches):
                if i == (0, place)[when]:
                    handles.append(EVENTS[name](ae, made))
                made.zero_grad()
                ae.zero_grad()  # what the optimizer does not hold
                loss = F.huber_loss if isinstance(ae.likelihood, Huber) else F.mse_loss
                loss(ae(x), x).backward()
                made.step()
        except Exception as error:
            return error
    return ae


def by_hand(name: str, variant: str, optimizer: str, when: int) -> Any:
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    with removed(handles):
        try:
            step = None if when == 0 else TrainStep(ae, made, 16)
            for i, x in enumerate(BATCHES):
                if i == (0, PLACE)[when]:
                    handles.append(EVENTS[name](ae, made))
                step = step or TrainStep(ae, made, 16)
                step(x)
        except Exception as error:
            return error
    return ae


class At(fastae.Callback):
    def __init__(self, epoch: int, event: Event, handles: list[Any]) -> None:
        self.epoch, self.event, self.handles = epoch, event, handles

    def on_train_begin(self, run: Any) -> None:
        if self.epoch == 0:
            self.handles.append(self.event(run.model, run.optimizer))

    def on_epoch_end(self, run: Any) -> None:
        if run.history.epochs == self.epoch:
            self.handles.append(self.event(run.model, run.optimizer))


def in_fit(name: str, variant: str, optimizer: str, when: int) -> Any:
    ae = model(variant)
    made, handles = OPTIMIZERS[optimizer](ae.parameters()), list[Any]()
    callback = At((0, 1)[when], EVENTS[name], handles)
    with removed(handles):
        try:
            ae.fit(X, epochs=2, batch_size=16, optimizer=made, seed=5, validation_split=0, precision="float64",
                   callbacks=[callback], progress=False)  # fmt: skip
        except Exception as error:
            return error
    return ae


def fit_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [X[rows] for _ in range(2) for rows in torch.randperm(40, generator=generator).split(16)]


def differs(found: Any, wanted: Any, name: str, optimizer: str) -> str:
    """What is wrong with a cell, or nothing."""
    kind, text = REFUSED.get(name, ("nothing", ""))
    if optimizer.startswith(kind):
        return "" if isinstance(found, ValueError) and str(found).startswith(text) else f"not refused: {found!r}"
    if isinstance(wanted, Exception) or isinstance(found, Exception):
        same = type(found) is type(wanted)
        return "" if same else f"raised {found!r}, a plain loop {wanted!r}"
    for (key, p), q in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        if not torch.allclose(p, q, rtol=1e-9, atol=1e-11):
            return f"{key} is {(p - q).abs().max().item():.1e} off"
    for (key, p), q in zip(found.named_parameters(), wanted.parameters(), strict=True):
        if (p.grad is None) != (q.grad is None):
            return f"{key}.grad is {'missing' if p.grad is None else 'there'}, a plain loop's is not"
        if p.grad is not None and not torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11):
            return f"{key}.grad is {(p.grad - q.grad).abs().max().item():.1e} off"
    return ""


CELLS = list(itertools.product(VARIANTS, OPTIMIZERS, range(2)))


def test_the_number_of_cells() -> None:
    assert len(EVENTS) * len(CELLS) * 2 == 2640


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVENTS)
def test_called_by_hand(name: str) -> None:
    problems = {}
    for variant, optimizer, when in CELLS:
        wanted = plainly(name, variant, optimizer, when, BATCHES, PLACE)
        if problem := differs(by_hand(name, variant, optimizer, when), wanted, name, optimizer):
            problems[variant, optimizer, WHEN[when]] = problem
    assert not problems


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVENTS)
def test_inside_fit_by_a_callback(name: str) -> None:
    problems = {}
    for variant, optimizer, when in CELLS:
        wanted = plainly(name, variant, optimizer, when, fit_batches(), 3)
        if name == "eval mode":  # fit trains: the mode is the loop's own, and changes nothing here
            wanted = plainly("nothing", variant, optimizer, when, fit_batches(), 3)
        if problem := differs(in_fit(name, variant, optimizer, when), wanted, name, optimizer):
            problems[variant, optimizer, WHEN[when]] = problem
    assert not problems


# Found by tests/fuzz: what one event does to the step, and another one after it
SEQUENCES = [
    ("a forward of the instance", "another likelihood"),
    ("a BatchNorm inserted", "a gradient of someone else's", "a layer is frozen"),
    ("a backward hook", "a layer replaced by PyTorch's", "nothing"),
    ("a BatchNorm inserted", "eval mode", "a BatchNorm inserted"),
]


@pytest.mark.parametrize("names", SEQUENCES, ids=" then ".join)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_events_after_each_other(names: tuple[str, ...], variant: str, early: bool) -> None:
    weights = []
    for plain in (True, False):
        ae = model(variant)
        optimizer = OPTIMIZERS["Adam"](ae.parameters())
        step = TrainStep(ae, optimizer, 16) if early and not plain else None
        for name, x in zip((*names, "nothing"), BATCHES, strict=False):
            EVENTS[name](ae, optimizer)
            if name == "a gradient of someone else's":
                continue
            if plain:
                ae.zero_grad()
                optimizer.zero_grad()
                (F.huber_loss if isinstance(ae.likelihood, Huber) else F.mse_loss)(ae(x), x).backward()
                optimizer.step()
            else:
                step = step or TrainStep(ae, optimizer, 16)
                step(x)
        weights.append(ae.state_dict())
    for name, p in weights[0].items():
        torch.testing.assert_close(weights[1][name], p, rtol=1e-9, atol=1e-11)
