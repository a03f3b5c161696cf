"""The loss of an array and its gradient in one pass: every loss against its closed form and PyTorch's own, in every
implementation; the two tables have the same losses."""

import itertools
from collections.abc import Callable

import pytest
import torch
from accuracy import FLOOR, check, check_all
from cases import (
    ALL_KINDS,
    DTYPES,
    KINDS,
    VIEWS,
    eager_loss,
    loss_of,
    normal,
    short,
    slope_of,
    suited,
    three_ways,
    width_of,
)
from fastae_kernels import elementwise
from fastae_kernels.elementwise import LOSSES, MSE, LossKind
from fastae_kernels.jit import launch
from fastae_kernels.jit import losses as kernels
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Ops, Out
from fastae_kernels.reference import TORCH
from torch import Tensor

from fastae.likelihoods import PARTS

pytestmark = pytest.mark.usefixtures("poisoned")

IMPLEMENTATIONS = {"triton": kernels, "torch": TORCH, "onednn": ONEDNN}
# One, a row, a column, more than a program's 4,096 values in a row, several tiles each way
SHAPES = ((1, 1), (3, 5), (1, 300), (300, 1), (1, 5000), (33, 130))


def by_the_book(input: Tensor, target: Tensor, kind: LossKind, reduction: str) -> tuple[Tensor, Tensor]:
    M, N = input.shape
    n = M * width_of(kind, N) if reduction == "mean" else 1
    return loss_of(kind, input, target).sum() / n, slope_of(kind, input, target) / n


def as_pytorch_has_it(input: Tensor, target: Tensor, kind: LossKind, reduction: str) -> tuple[Tensor, Tensor]:
    leaf = input.detach().clone().requires_grad_()
    loss = eager_loss(kind)(leaf, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


# ---------------------------------------------------------------- the tables


def test_every_loss_has_a_row_a_pair_and_a_part() -> None:
    assert list(LOSSES) == list(kernels.LOSS_PAIRS) == list(PARTS)
    for name, (value, gradient) in kernels.LOSS_PAIRS.items():
        assert (value.__name__, gradient.__name__) == (f"{name}_value", f"{name}_gradient")
        part = PARTS[name]()
        assert (part.name, part.setting) == (name, LOSSES[name].default)
    assert {kind.name for kind in ALL_KINDS} == set(LOSSES), "a loss that no test knows"


def test_a_loss_kind() -> None:
    assert MSE == LossKind("mse") == ("mse", 0.0)
    assert MSE.row is elementwise.LOSSES["mse"]
    assert MSE.scale(3, 5) == 2 / 15
    assert LossKind("mae").scale(3, 5) == LossKind("huber", 2.0).scale(3, 5) == 1 / 15
    assert LossKind("bernoulli").scale(3, 5) == LossKind("gaussian").scale(3, 7) == 1 / 3
    assert MSE.scale(0, 5) == 2, "a batch of nothing has no scale to divide by"


def test_what_autograd_differentiates_is_pytorchs_own() -> None:
    y, t = normal(4, 3), normal(4, 3, seed=1)
    for kind, reduction in itertools.product(ALL_KINDS, ("mean", "sum", "none")):
        target = suited(kind, t)
        mine = kind.row.functional(y, target, None, kind.setting, reduction)
        theirs = eager_loss(kind)(y, target, reduction=reduction)
        if kind.name == "nb":  # whose digits theirs loses for large counts
            torch.testing.assert_close(mine, theirs)
        else:
            assert torch.equal(mine, theirs)


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=short)
def test_by_the_book(kind: LossKind, dtype: torch.dtype) -> None:
    """Closed forms in fp64; PyTorch's own op in the same dtype. Half precision is subtracted and summed in fp32."""
    number = ALL_KINDS.index(kind) + DTYPES.index(dtype)
    for place, ((M, N), reduction) in enumerate(itertools.product(SHAPES, ("mean", "sum"))):
        input, target = normal(M, N, dtype=dtype), suited(kind, normal(M, N, dtype=dtype, seed=1))
        truth = by_the_book(input.double(), target.double(), kind, reduction)
        same = as_pytorch_has_it(input, target, kind, reduction)
        for name, ops in IMPLEMENTATIONS.items():
            if name != "triton" or place % 6 == number % 6:
                check_all(ops.loss(input, target, kind, reduction, True), same, truth)
    loss, nothing = kernels.loss(input, target, kind, reduction)
    assert nothing is None
    assert torch.equal(loss, kernels.loss(input, target, kind, reduction, True)[0])


@pytest.mark.parametrize("kind", KINDS, ids=short)
def test_kinks(kind: LossKind) -> None:
    """An error of 0, and of delta exactly: to the bit as PyTorch has it."""
    delta = kind.setting or 0.5
    for dtype, ops in itertools.product((torch.float32, torch.float64), IMPLEMENTATIONS.values()):
        edge = torch.tensor(delta, dtype=dtype)
        beyond = torch.nextafter(edge, 2 * edge)
        input = torch.stack([0 * edge, -0.0 * edge, edge, -edge, beyond, -beyond, edge / 2, 3 * edge, -9 * edge])[None]
        _, gradient = ops.loss(input, torch.zeros_like(input), kind, "sum", True)
        assert torch.equal(gradient, as_pytorch_has_it(input, torch.zeros_like(input), kind, "sum")[1])
        for one in input.flatten() if ops is not kernels or dtype == torch.float32 else ():
            value, slope = ops.loss(one.view(1, 1), torch.zeros(1, 1, dtype=dtype), kind, "sum", True)
            torch.testing.assert_close(value, loss_of(kind, one), rtol=4 * torch.finfo(dtype).eps, atol=0)
            assert slope == slope_of(kind, one)
        if kind.name == "mae":
            assert gradient.flatten().tolist() == [0, 0, 1, -1, 1, -1, 1, 1, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [*KINDS[:3], LossKind("gaussian"), LossKind("poisson")], ids=short)
def test_inf_and_nan_as_pytorch_has_them(kind: LossKind, value: float) -> None:
    """The gradient of the others is what it was. mae's gradient of NaN is 0, huber's of inf is delta."""
    input, target = normal(5, 7), normal(5, 7, seed=1)
    for ops in IMPLEMENTATIONS.values():
        for where in (input, target):
            kept = where[2, 3].clone()
            before = ops.loss(input, target, kind, "mean", True)[1]
            where[2, 3] = value
            loss, gradient = ops.loss(input, target, kind, "mean", True)
            wanted, wanted_gradient = as_pytorch_has_it(input, target, kind, "mean")
            torch.testing.assert_close(loss, wanted, equal_nan=True)
            torch.testing.assert_close(gradient, wanted_gradient, equal_nan=True)
            before[2, 3] = gradient[2, 3]
            torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)
            where[2, 3] = kept


def test_a_long_sum_of_absolute_errors() -> None:
    """800,000 values as accurate as in PyTorch: a norm that adds one after the other is 2e-5 off."""
    y, t = normal(1024, 784), normal(1024, 784, seed=1)
    for kind in KINDS[1:3]:
        truth = loss_of(kind, y.double() - t.double())
        same = eager_loss(kind)(y, t, reduction="sum")
        check(TORCH.loss(y, t, kind, "sum")[0], same, truth.sum())
        rows = kind.row.evaluate(y, t, None, kind.setting, True, torch.empty_like(y), None, None)
        check(rows, truth.sum(1).float(), truth.sum(1))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_empty(ops: Ops) -> None:
    for shape, kind in itertools.product(((0, 3), (3, 0), (0, 0)), KINDS[:3]):
        nothing = torch.empty(shape)
        for reduction in ("mean", "sum"):
            loss, gradient = ops.loss(nothing, nothing, kind, reduction, True)
            assert loss.shape == ()
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert gradient.shape == shape


def test_every_value_counts_once() -> None:
    """Whole numbers: the sums are exact, so a value lost or taken twice shows as a wrong integer."""
    for M, N in ((1, 4096), (1, 4097), (33, 130), (129, 31), (130, 1)):
        t = -torch.arange(M * N, dtype=torch.float64).view(M, N).remainder(7)
        for kind, target in itertools.product(KINDS[:2], (t, t.t().contiguous().t())):  # as one row, and by rows
            loss, gradient = kernels.loss(torch.zeros(M, N), target.float(), kind, "sum", True)
            assert loss == loss_of(kind, -t).sum()
            assert torch.equal(gradient, slope_of(kind, -t).float())


# ---------------------------------------------------------------- views, memory, launches


@pytest.mark.parametrize("view", VIEWS, ids=short)
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    """One of them, the other, both."""
    number = VIEWS.index(view)
    dtype, kind = DTYPES[number % 4], KINDS[number % 5]
    input, target = normal(35, 67, dtype=dtype), normal(35, 67, dtype=dtype, seed=1)
    for one, two in ((view(input), target), (target, view(input)), (view(input), view(target))):
        three_ways("loss", one, two, kind, "mean", True)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_out(dtype: torch.dtype, ops: Ops) -> None:
    """The same bits as in fresh memory, in the memory given."""
    input, target = normal(33, 67, dtype=dtype), normal(33, 67, dtype=dtype, seed=1)
    for kind in KINDS[:3]:
        fresh = ops.loss(input, target, kind, "mean", True)
        out = Out(torch.empty(33, 67, dtype=dtype), torch.empty((), dtype=dtype))
        assert all(map(torch.equal, ops.loss(input, target, kind, "mean", True, out), fresh))
        assert torch.equal(out.dp, fresh[1])
        assert torch.equal(out.loss, fresh[0])


@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_arguments_are_left_alone_and_the_same_bits_every_time(ops: Ops) -> None:
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), KINDS[:3]):
        input, target = normal(33, 67, dtype=dtype), normal(33, 67, dtype=dtype, seed=1)
        before = input.clone(), target.clone()
        first = ops.loss(input, target, kind, "mean", True)
        assert all(map(torch.equal, first, ops.loss(input, target, kind, "mean", True)))
        assert all(map(torch.equal, (input, target), before))


def test_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **o: (counted.append(1), run(*a, **o))[1])
    kernels.loss(normal(70, 67), normal(70, 67, seed=1), MSE, "mean", True)
    assert len(counted) == 2


def test_poison_shows_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    assert all(t.isnan().all() for t in kernels.loss(normal(3, 5), normal(3, 5), MSE, "mean", True))


def test_the_floor_of_fp64_is_of_fp64() -> None:
    """huber's delta of 0.3 has more digits than fp32: rounded to that, the loss would be 1e-8 off."""
    e = torch.full((1, 4), 1.0, dtype=torch.float64)
    for ops in IMPLEMENTATIONS.values():
        loss, gradient = ops.loss(e, 0 * e, LossKind("huber", 0.3), "sum", True)
        assert gradient.tolist() == [[0.3] * 4]
        assert abs(loss - 4 * 0.3 * 0.85) <= FLOOR[torch.float64]
