"""`linear_act_mse` as PyTorch sees it: loss and gradients against fp64 truth, gradients of those, errors, autocast."""

import itertools
import re

import pytest
import torch
from accuracy import check, check_all
from cases import ACTIVATIONS, DTYPES, EAGER, layer, normal, uniform
from torch import Tensor

import fastae
from fastae.nn import library as _ops


def eager(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, reduction: str, weight: Tensor | None
) -> Tensor:
    """As PyTorch users write it; the loss of half precision in fp32."""
    y = EAGER[activation](torch.nn.functional.linear(x, w, b))
    wide = torch.promote_types(y.dtype, torch.float32)
    errors = (y - target).to(wide).square()
    errors = errors if weight is None else errors * weight.to(wide)[:, None]
    return {"mean": errors.mean, "sum": errors.sum, "none": lambda: errors.mean(1)}[reduction]()


def everything(function: object, args: list[Tensor | None], *others: object) -> list[Tensor | None]:
    """The loss and the gradients of x, w, b."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in args]
    loss = function(*leaves, *others)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return [loss.detach(), *(None if t is None else t.grad for t in leaves)]


def three_ways(
    args: list[Tensor | None], target: Tensor, activation: str, reduction: str, weight: Tensor | None = None
) -> None:
    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    truth, *truths = everything(eager, [double(t) for t in args], double(target), activation, reduction, double(weight))
    loss, *grads = everything(fastae.linear_act_mse, args, target, activation, reduction, weight)
    _, *eager_grads = everything(eager, args, target, activation, reduction, weight)
    check_all(grads, eager_grads, truths)
    # The loss comes in fp32 or fp64, so PyTorch in that precision is what it has to match.
    widened = [None if t is None else t.to(loss.dtype) for t in (*args, target)]
    # But oneDNN hands out bf16 residuals, from the fp32 accumulator: each square is off by 2 eps / 2 at most.
    rounds = fastae.get_backend() == "onednn" and args[0].dtype == torch.bfloat16 and activation == "identity"
    floor = torch.finfo(torch.bfloat16).eps if rounds else None
    check(loss, eager(*widened, activation, reduction, weight), truth, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_gradients(activation: str, dtype: torch.dtype, backend: str) -> None:
    x, w, b = layer(activation, 37, 20, 33, dtype)
    target = uniform(37, 20, low=-1, high=1, dtype=dtype, seed=5)
    three_ways([x, w, b], target, activation, "mean")
    three_ways([x, w, None], target, activation, "none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (33, 1, 17), (70, 37, 96)], ids=str)
def test_reductions_and_row_weights(shape: tuple[int, int, int], weighted: bool, reduction: str, backend: str) -> None:
    x, w, b = layer("silu", *shape, torch.float32)
    weight = uniform(shape[0], low=-1, high=3, seed=6) if weighted else None
    three_ways([x, w, b], normal(*shape[:2], seed=5), "silu", reduction, weight)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], reduction: str, backend: str) -> None:
    M, N, K = shape
    args = [t.requires_grad_() for t in (normal(M, K), normal(N, K), normal(N))]
    loss = fastae.linear_act_mse(*args, normal(M, N, seed=1), "relu", reduction)
    truth = eager(*args, normal(M, N, seed=1), "relu", reduction, None)
    torch.testing.assert_close(loss, truth, equal_nan=True)
    loss.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in args)


def test_near_convergence_bf16_keeps_its_gradient(backend: str) -> None:
    """A residual of 0.01 below values of 1: rounding y before the subtraction costs a tenth of the gradient."""
    x, w = normal(64, 48, dtype=torch.bfloat16), (normal(40, 48, seed=1) / 7).bfloat16()
    b = (normal(40, seed=3) / 10).bfloat16()
    target = (x.double() @ w.double().t() + b.double() + 0.01 * normal(64, 40, dtype=torch.float64, seed=2)).bfloat16()

    def dw(loss: object, *args: Tensor) -> Tensor:
        leaf = args[1].clone().requires_grad_()
        loss(args[0], leaf, *args[2:]).backward()
        return leaf.grad.double()

    def unfused(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fastae.mse_loss(fastae.linear_act(x, w, b), t)

    args = (x, w, b, target)
    truth = dw(fastae.linear_act_mse, *(t.double() for t in args))
    error = (dw(fastae.linear_act_mse, *args) - truth).norm() / truth.norm()
    unfused_error = (dw(unfused, *args) - truth).norm() / truth.norm()
    assert error < 0.005
    assert unfused_error > 0.05


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_each_subset_of_gradients(wanted: tuple[bool, bool, bool], backend: str) -> None:
    args, target = layer("tanh", 9, 6, 5, torch.float32), normal(9, 6, seed=5)

    def grads(function: object) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(want) for t, want in zip(args, wanted, strict=True)]
        loss = function(*leaves, target, "tanh")
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        return [t.grad for t in leaves]

    for got, want in zip(grads(fastae.linear_act_mse), grads(lambda *a: eager(*a, "mean", None)), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction: str, backend: str) -> None:
    args = [t.requires_grad_() for t in layer("silu", 4, 3, 5, torch.float64)]
    target, weight = normal(4, 3, dtype=torch.float64, seed=5), uniform(4, low=0, high=2, dtype=torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        return fastae.linear_act_mse(*leaves, target, "silu", reduction, weight)

    assert torch.autograd.gradcheck(loss, args)
    assert torch.autograd.gradgradcheck(loss, args)


def test_backward_twice_leaves_what_was_saved(backend: str) -> None:
    x, w, b = (t.requires_grad_() for t in layer("relu", 9, 6, 5, torch.float32))
    for reduction in ("mean", "none"):
        loss = fastae.linear_act_mse(x, w, b, normal(9, 6, seed=5), "relu", reduction).sum()
        first = torch.autograd.grad(loss, [x, w, b], retain_graph=True)
        again = torch.autograd.grad(loss, [x, w, b])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_arguments(backend: str) -> None:
    x, w, b = normal(33, 9).t(), normal(33, 40).t()[::2], normal(40)[::2]
    target = normal(1, 20).expand(9, 20)
    check(
        fastae.linear_act_mse(x, w, b, target, "gelu"),
        eager(x, w, b, target, "gelu", "mean", None),
        eager(x.double(), w.double(), b.double(), target.double(), "gelu", "mean", None),
    )


def test_nan_and_inf_as_pytorch_has_them(backend: str) -> None:
    x, w, b = layer("identity", 9, 6, 5, torch.float32)
    target = normal(9, 6, seed=5)
    x[2, 1], target[4, 3] = float("nan"), float("inf")
    for activation in ("identity", "relu"):
        ours = fastae.linear_act_mse(x, w, b, target, activation, "none")
        torch.testing.assert_close(ours, eager(x, w, b, target, activation, "none", None), equal_nan=True)


def test_autocast_as_linear_is_cast(backend: str) -> None:
    x, w, b = layer("relu", 9, 6, 5, torch.float32)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastae.linear_act_mse(x, w, b, normal(9, 6, seed=5), "relu")
    loss.backward()
    low = [t.bfloat16() for t in (x, w, b, normal(9, 6, seed=5))]
    torch.testing.assert_close(loss, fastae.linear_act_mse(*low, "relu"))
    assert loss.dtype == w.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": normal(9, 3, 5)}, ValueError, "x must be [rows, in_features]; got [9, 3, 5]"),
        ({"weight": normal(6, 4)}, ValueError, "weight must be [out_features, 5] to match x [9, 5]; got [6, 4]"),
        ({"bias": normal(5)}, ValueError, "bias must be [6] to match weight [6, 5]; got [5]"),
        ({"target": normal(9, 5)}, ValueError, "target must be [9, 6] as the layer's output is; got [9, 5]"),
        ({"target": normal(9, 6).double()}, TypeError, "target must be float32 as x is; got float64"),
        ({"target": None}, TypeError, "target must be a torch.Tensor; got NoneType"),
        ({"row_weight": normal(6)}, ValueError, "row_weight must be [9], one per row; got [6]"),
        ({"reduction": "men"}, ValueError, "reduction must be one of mean, sum, none; got 'men'; did you mean 'mean'?"),
        ({"activation": "rel"}, ValueError, "; got 'rel'; did you mean 'relu'?"),
        (
            {"target": normal(9, 6).requires_grad_()},
            ValueError,
            "target must not require a gradient; detach it, or use",
        ),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = {"x": normal(9, 5), "weight": normal(6, 5), "bias": normal(6), "target": normal(9, 6)} | change
    with pytest.raises(error, match=re.escape(text)) as caught:
        fastae.linear_act_mse(**arguments)
    assert str(caught.value).startswith("linear_act_mse: ")


def test_opcheck(backend: str) -> None:
    x, w, b = layer("silu", 5, 4, 3, torch.float32)
    arguments = (x, w, b, normal(5, 4), "silu", "mean", None, True, backend)
    torch.library.opcheck(_ops.linear_act_mse, arguments)
