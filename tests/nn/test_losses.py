"""`mse_loss` and `MSELoss` beside PyTorch's: values, gradients, gradients of those, errors; how losses are named."""

import re

import pytest
import torch
import torch.nn.functional as F
from accuracy import check, check_all
from cases import DTYPES, VIEWS, normal, short
from fastae_kernels.elementwise import MSE, LossKind
from torch import Tensor

import fastae
from fastae import MSELoss, likelihoods, mse_loss
from fastae.nn import library as _ops
from fastae.nn.losses import kind_of, likelihood_of

FLOATS = "float32, float16, bfloat16 or float64"


def everything(function: object, input: Tensor, target: Tensor, reduction: str, upstream: float) -> list[Tensor]:
    """The loss and both gradients; upstream is what comes down from above, a loss scale for instance."""
    input, target = input.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()
    loss = function(input, target, reduction=reduction)
    loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), input.grad, target.grad]


def three_ways(input: Tensor, target: Tensor, reduction: str = "mean", upstream: float = 1.0) -> None:
    check_all(
        everything(mse_loss, input, target, reduction, upstream),
        everything(F.mse_loss, input, target, reduction, upstream),
        everything(F.mse_loss, input.double(), target.double(), reduction, upstream),
    )


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 9), (4, 3, 5), (2, 1, 3, 2)], ids=short)
def test_loss_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    for reduction, upstream in (("mean", 1.0), ("mean", 0.0), ("sum", -3.0), ("none", 2.0)):
        three_ways(normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), reduction, upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=short)
def test_small_gradients_under_a_loss_scale_are_no_worse_than_pytorchs(dtype: torch.dtype, backend: str) -> None:
    """2 (input - target) / n is 2e-6 here: under the normal range of fp16 before the upstream gradient lifts it."""
    target = normal(96, 96, dtype=dtype)
    input = target + (0.01 * normal(96, 96, seed=1)).to(dtype)
    for upstream in (1024.0, 16384.0):
        three_ways(input, target, "mean", upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_near_convergence(dtype: torch.dtype, backend: str) -> None:
    """Residuals of 0.01 from targets of order one: subtracted wide, rounded once; against fp64 on the same inputs."""
    target = torch.rand(64, 90, generator=torch.Generator().manual_seed(0)).to(dtype)
    input = (target.float() + 0.01 * normal(64, 90, seed=1)).to(dtype).requires_grad_()
    loss = mse_loss(input, target, reduction="sum")
    loss.backward()
    truth = 2 * (input.double() - target.double()).detach()
    error = (input.grad.double() - truth).norm() / truth.norm()
    assert error < torch.finfo(dtype).eps / 2
    true_loss = (input.double() - target.double()).square().sum().item()
    assert abs(loss.item() - true_loss) <= torch.finfo(dtype).eps * true_loss


@pytest.mark.parametrize("shape", [(64, 4100), (2001, 150), (8, 64, 600)], ids=short)
def test_where_the_difference_is_kept(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a CPU, many values in many rows: `F.mse_loss` is not called."""
    dtype = torch.bfloat16
    monkeypatch.setattr(F, "mse_loss", None)
    input, target = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    with fastae.use_backend("torch"):
        found = {
            (reduction, upstream): everything(mse_loss, input, target, reduction, upstream)
            for reduction, upstream in (("mean", 1.0), ("sum", 0.125), ("mean", 1024.0))
        }
        strided = everything(mse_loss, input.transpose(0, 1), target.transpose(0, 1), "mean", 1.0)
        assert torch.equal(strided[1].transpose(0, 1), found["mean", 1.0][1])
        rounded_once = ((input - target).float() * (2 / input.numel())).to(dtype)
        assert torch.equal(found["mean", 1.0][1], rounded_once)
    monkeypatch.undo()
    with fastae.use_backend("torch"):
        leaf = input.detach().requires_grad_()
        (again,) = torch.autograd.grad(mse_loss(leaf, target), leaf, create_graph=True)
        assert again.requires_grad
        check(again.detach(), found["mean", 1.0][1], 2 * (input.double() - target.double()) / input.numel())
    for (reduction, upstream), ours in found.items():
        check_all(
            ours,
            everything(F.mse_loss, input, target, reduction, upstream),
            everything(F.mse_loss, input.double(), target.double(), reduction, upstream),
        )


def test_one_row_that_holds_all_the_error() -> None:
    """Its root is rounded, which the square doubles, and then the loss: 1.5 eps at most."""
    for seed in range(20):
        target = torch.zeros(64, 4100, dtype=torch.bfloat16)
        input = target.clone()
        input[5] = (1 + seed / 7) * normal(4100, dtype=torch.bfloat16, seed=seed)
        true = input.double().square().mean().item()
        loss = mse_loss(input.requires_grad_(), target).item()
        assert abs(loss - true) <= 1.5 * torch.finfo(torch.bfloat16).eps * true


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((63, 4200), torch.bfloat16),
        ((300000,), torch.bfloat16),
        ((128, 2000), torch.bfloat16),
        ((512, 512), torch.float32),
        ((512, 512), torch.float16),
    ],
)
def test_where_pytorchs_passes_are_as_good(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Too few rows, too few values, fp32, fp16."""
    results = [everything(f, normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), "mean", 1.0)
               for f in (mse_loss, F.mse_loss)]  # fmt: skip
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_large_offsets(dtype: torch.dtype, backend: str) -> None:
    """The difference is taken before the squares: a common offset costs what its own rounding costs, no more."""
    for offset in (1e3, 1e6):
        three_ways(normal(70, 67, dtype=dtype) + offset, normal(70, 67, dtype=dtype, seed=1) + offset)


def test_inf_nan_and_overflow_as_pytorch_has_them(backend: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        input, target = normal(5, 7), normal(5, 7, seed=1)
        input[2, 3] = value
        three_ways(input, target)
        three_ways(target, input)
    three_ways(torch.full((3, 3), 200.0, dtype=torch.float16), torch.full((3, 3), -200.0, dtype=torch.float16), "sum")
    equal = normal(5, 7)
    loss, dinput, dtarget = everything(mse_loss, equal, equal.clone(), "mean", 1.0)
    assert loss == 0
    assert not dinput.any()
    assert not dtarget.any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)], ids=short)
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    for reduction in ("mean", "sum", "none"):
        results = everything(mse_loss, torch.empty(shape), torch.empty(shape), reduction, 1.0)
        assert [t.shape for t in results[1:]] == [torch.Size(shape)] * 2
        if reduction != "none":
            assert results[0].shape == ()
    assert mse_loss(torch.empty(shape), torch.empty(shape)).isnan()
    assert mse_loss(torch.empty(shape), torch.empty(shape), "sum") == 0


# ---------------------------------------------------------------- autograd


def test_each_subset_of_gradients(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    asked: list[bool] = []
    op = _ops.loss
    monkeypatch.setattr(_ops, "loss", lambda *a: (asked.append(a[5]), op(*a))[1])
    for needs in ((True, False), (False, True), (True, True), (False, False)):
        args = [t.requires_grad_(need) for t, need in zip((normal(3, 4), normal(3, 4, seed=1)), needs, strict=True)]
        loss = mse_loss(*args)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        assert [t.grad is not None for t in args] == list(needs)
        with torch.no_grad():
            mse_loss(*args)
        with torch.inference_mode():
            mse_loss(*args)
        assert asked == ([any(needs), False, False] if backend == "triton" else [])  # elsewhere F.mse_loss
        asked.clear()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str) -> None:
    """On the kernel; elsewhere it is PyTorch's own in fp64."""
    with fastae.use_backend("triton"):
        for shape in ((), (3, 2)):
            args = tuple(normal(*shape, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
            assert torch.autograd.gradcheck(lambda *a: mse_loss(*a, reduction), args)
            assert torch.autograd.gradgradcheck(lambda *a: mse_loss(*a, reduction), args, fast_mode=True)
        same = normal(3, 2, dtype=torch.float64).requires_grad_()
        one = lambda a: mse_loss(a, a.t().reshape(3, 2), reduction)  # noqa: E731
        assert torch.autograd.gradgradcheck(one, (same,), fast_mode=True)


def test_strided_arguments(backend: str) -> None:
    for view in VIEWS:
        three_ways(view(normal(5, 4)), view(normal(5, 4, seed=1)))
        three_ways(normal(4, 5, 3).transpose(0, 2), normal(3, 5, 4, seed=1))


def test_backward_twice_and_inputs_left_alone(backend: str) -> None:
    input, target = normal(5, 4).requires_grad_(), normal(5, 4, seed=1)
    before = input.detach().clone(), target.clone()
    loss = mse_loss(input, target)
    loss.backward(retain_graph=True)
    first = input.grad.clone()
    loss.backward()
    assert torch.equal(input.grad, 2 * first)
    assert torch.equal(input, before[0])
    assert torch.equal(target, before[1])
    loss = mse_loss(input * 1, target)
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_with_and_without_a_graph_agree(backend: str) -> None:
    for reduction in ("mean", "sum"):
        input, target = normal(5, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
        plain = torch.autograd.grad(mse_loss(input, target, reduction) * 3, (input, target))
        graph = torch.autograd.grad(mse_loss(input, target, reduction) * 3, (input, target), create_graph=True)
        for mine, theirs in zip(plain, graph, strict=True):
            assert theirs.requires_grad
            torch.testing.assert_close(mine, theirs.detach())


def test_autocast_as_pytorch_does(backend: str) -> None:
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)):
        results = []
        for function in (mse_loss, F.mse_loss):
            input, target = normal(5, 4, dtype=dtypes[0]).requires_grad_(), normal(5, 4, dtype=dtypes[1], seed=1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = function(input, target)
            loss.backward()
            results.append((loss.detach(), input.grad))
        torch.testing.assert_close(results[0], results[1])
        assert results[0][0].dtype == torch.float32


@pytest.mark.parametrize("kind", [MSE, LossKind("huber", 0.3)], ids=short)
def test_opcheck(kind: LossKind, backend: str) -> None:
    """Also the op of squared error that graphs saved before there were other losses call."""
    input, target = normal(5, 4), normal(4, 5).t()
    for reduction, need_dinput in (("mean", True), ("sum", False)):
        torch.library.opcheck(_ops.loss, (input, target, *kind, reduction, need_dinput, backend))
        if kind == MSE:
            torch.library.opcheck(_ops.mse, (input, target, reduction, need_dinput, backend))
            mine, general = (
                op(input, target, *named, reduction, need_dinput, backend)
                for op, named in ((_ops.mse, ()), (_ops.loss, MSE))
            )
            assert all(map(torch.equal, mine, general))


# ---------------------------------------------------------------- errors and the module

t = normal(2, 3)
ERRORS = {
    "shape": (lambda: mse_loss(t, normal(3, 2)), ValueError, "mse_loss: target must be [2, 3] as input is; got [3, 2]"),
    "broadcast": (lambda: mse_loss(t, normal(3)), ValueError, "mse_loss: target must be [2, 3] as input is; got [3]"),
    "int": (lambda: mse_loss(t.int(), t.int()), TypeError, f"mse_loss: input must be {FLOATS}; got int32"),
    "complex": (lambda: mse_loss(t + 0j, t + 0j), TypeError, f"mse_loss: input must be {FLOATS}; got complex64"),
    "devices": (lambda: mse_loss(t, t.to("meta")), ValueError, "mse_loss: target must be on cpu as input is; got meta"),
    "reduction": (
        lambda: mse_loss(t, t, "men"),
        ValueError,
        "mse_loss: reduction must be one of mean, sum, none; got 'men'; did you mean 'mean'?",
    ),
    "module": (
        lambda: MSELoss("xyz"),
        ValueError,
        "MSELoss: reduction must be one of mean, sum, none; got 'xyz'",
    ),
    "list": (lambda: mse_loss([1.0], t), TypeError, "mse_loss: input must be a torch.Tensor; got list"),
    "target a number": (lambda: mse_loss(t, 1.0), TypeError, "mse_loss: target must be a torch.Tensor; got float"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case: str) -> None:
    call, kind, text = ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()


def test_module(backend: str) -> None:
    for reduction in ("mean", "sum", "none"):
        module = MSELoss(reduction)
        assert repr(module) == f"MSELoss(reduction={reduction!r})"
        assert eval(repr(module), {"MSELoss": MSELoss}).reduction == reduction
        input, target = normal(5, 4), normal(5, 4, seed=1)
        check(
            module(input, target),
            F.mse_loss(input, target, reduction=reduction),
            F.mse_loss(input.double(), target.double(), reduction=reduction),
        )
    assert fastae.MSELoss().reduction == "mean"
    assert not list(MSELoss().parameters())


# ---------------------------------------------------------------- losses by name


def test_a_name_or_a_part() -> None:
    for given, part in (
        ("mse", likelihoods.MSE()),
        ("mae", likelihoods.MAE()),
        ("huber", likelihoods.Huber()),
        ("huber:delta=0.3", likelihoods.Huber(0.3)),
        (likelihoods.Huber(2.5), likelihoods.Huber(2.5)),
    ):
        assert likelihood_of(given, "f: loss") == part
    assert kind_of(likelihoods.MSE()) == MSE
    assert kind_of(likelihoods.Huber(0.3)) == LossKind("huber", 0.3)


LOSSES = ", ".join(likelihoods.PARTS)
LOSS_ERRORS = {
    "hubr": (ValueError, f"f: loss must be one of {LOSSES}; got 'hubr'; did you mean 'huber'?"),
    "MSE": (ValueError, f"f: loss must be one of {LOSSES}; got 'MSE'"),
    "mean": (ValueError, f"f: loss must be one of {LOSSES}; got 'mean'"),
    "hubr:delta=2": (ValueError, f"f: loss must be one of {LOSSES}; got 'hubr:delta=2'; did you mean 'huber'?"),
    "huber:delta=x": (ValueError, "likelihood: delta must be a number; got 'x'"),
    "huber:beta=1": (ValueError, "likelihood: huber has delta; got 'beta'"),
    "mae:delta=1": (ValueError, "likelihood: mae has no options; got 'delta'"),
    "huber:delta=-1": (ValueError, "Huber: delta must be a positive number; got -1.0"),
    3: (TypeError, "f: loss must be a name or a part of fastae.likelihoods; got 3"),
    None: (TypeError, "f: loss must be a name or a part of fastae.likelihoods; got None"),
    likelihoods.Huber: (
        TypeError,
        f"f: loss must be a name or a part of fastae.likelihoods; got {likelihoods.Huber!r}",
    ),
}


@pytest.mark.parametrize("given", LOSS_ERRORS, ids=short)
def test_a_loss_that_there_is_not(given: object) -> None:
    kind, text = LOSS_ERRORS[given]
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        likelihood_of(given, "f: loss")
