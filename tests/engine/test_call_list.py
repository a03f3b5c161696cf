"""The calls of a step, recorded once and replayed: the same bits, and never on memory that has moved."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastae
from fastae.engine.call_list import Recorder


def pair(**options: object) -> tuple[fastae.TrainStep, fastae.TrainStep]:
    """The same step twice; the second decides anew every time."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([17, 12, 5], **options)
    with fastae.use_backend("torch"):
        steps = [fastae.TrainStep(m, torch.optim.Adam(m.parameters(), fused=True), 16) for m in (ae, copy.deepcopy(ae))]
    steps[1].static.repeats = False
    return steps[0], steps[1]


def same(a: fastae.TrainStep, b: fastae.TrainStep) -> bool:
    pairs = list(zip(a.model.parameters(), b.model.parameters(), strict=True))
    return all(torch.equal(p, q) and torch.equal(p.grad, q.grad) for p, q in pairs)


X = torch.rand(40, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"activation": "gelu"}, {"output_activation": "sigmoid"}])
def test_the_same_bits(options: dict[str, object]) -> None:
    a, b = pair(**options)
    losses: tuple[list[Tensor], list[Tensor]] = [], []
    for _ in range(3):
        for rows in torch.arange(40).split(16):
            for step, into in zip((a, b), losses, strict=True):
                into.append(step(X, rows))
                into.append(step(X, rows, 1 - X))
    assert a.static.repeats
    assert a.static.memory.recorded.keys() == {(False, False), (True, False)}
    assert all(torch.equal(p, q) for p, q in zip(*losses, strict=True))
    assert len({loss.data_ptr() for loss in losses[0]}) == len(losses[0]), "each loss has memory of its own"
    assert same(a, b)


def test_gradients_that_were_dropped_come_back() -> None:
    a, b = pair()
    for step in (a, b):
        step(X[:16])
        step.optimizer.zero_grad(set_to_none=True)
        step(X[:16])
    assert same(a, b)


def test_parameters_that_moved_are_found() -> None:
    a, b = pair()
    for step in (a, b):
        step(X[:16])
        for p in step.model.parameters():
            p.data = p.data.clone() * 0.5
        step(X[:16])
    assert same(a, b)


def record(call: Callable[[], object]) -> Recorder:
    with Recorder() as recorder:
        call()
    return recorder


def test_what_makes_memory_or_reads_numbers_is_not_repeated() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    assert record(lambda: torch.add(x, 1, out=y)).repeatable
    assert not record(lambda: torch.mul(x + 1, 2, out=y)).repeatable
    assert not record(lambda: y.mul_(x.sum().item())).repeatable
    assert record(lambda: y.view(-1)[1:].mul_(2)).repeatable
    assert not record(lambda: torch.dot(x, y, out=None)).repeatable, "an out= of None is new memory"
    step = pair(activation="mish")[0]
    step(X[:16])
    assert not step.static.repeats, "its derivative needs memory"


def test_repeating_reads_what_is_in_memory_now() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    (call,) = record(lambda: torch.add(x, 1, out=y)).calls
    assert y.tolist() == [2.0] * 3
    x.fill_(5)
    call()
    assert y.tolist() == [6.0] * 3


def test_a_call_apart_is_repeated_as_a_whole() -> None:
    x, y, recorder = torch.ones(3), torch.zeros(3), Recorder()
    with recorder:
        recorder.apart(lambda: y.copy_(x + x.sum().item()))
        with recorder.section("a"):
            y.mul_(2)
    assert recorder.repeatable
    assert recorder.sections == [("a", 1, 2)]
    x.fill_(2)
    for call in recorder.calls:
        call()
    assert y.tolist() == [16.0] * 3
