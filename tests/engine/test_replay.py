"""The calls of a step, noted once and made again: the same bits, and never on memory that has moved."""

import copy

import pytest
import torch
from torch import Tensor

import fastae
from fastae.engine.call_list import record


def pair(**options: object) -> tuple[fastae.TrainStep, fastae.TrainStep]:
    """The same step twice; the second decides anew every time."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([17, 12, 5], **options)
    with fastae.use_backend("torch"):
        steps = [fastae.TrainStep(m, torch.optim.Adam(m.parameters(), fused=True), 16) for m in (ae, copy.deepcopy(ae))]
    steps[1]._repeats = False
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
    assert a._repeats
    assert a._memory.replays.keys() == {False, True}
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


def test_what_makes_memory_or_reads_numbers_is_not_repeated() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    assert record(lambda: torch.add(x, 1, out=y), [x]) is not None
    assert record(lambda: torch.mul(x + 1, 2, out=y), [x]) is None
    assert record(lambda: y.mul_(x.sum().item()), [x]) is None
    assert record(lambda: y.view(-1)[1:].mul_(2), [x]) is not None
    step = pair(activation="softplus")[0]
    step(X[:16])
    assert not step._repeats, "its derivative needs memory"


def test_repeating_reads_what_is_in_memory_now() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    noted = record(lambda: torch.add(x, 1, out=y), [x])
    assert y.tolist() == [2.0] * 3
    x.fill_(5)
    noted()
    assert y.tolist() == [6.0] * 3
    assert noted.holds()
    x.data = torch.ones(3)
    assert not noted.holds()
