"""`linear_act_loss` and `linear_act_mse` as PyTorch sees them: loss and gradients against fp64 truth, gradients of
those, errors, autocast."""

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from accuracy import check, check_all
from cases import ALL_KINDS, DTYPES, EAGER, KINDS, TURNS, eager_loss, layer, normal, short, uniform, width_of
from fastae_kernels.elementwise import MSE, LossKind
from torch import Tensor

import fastae
from fastae import likelihoods, linear_act_loss, linear_act_mse
from fastae.likelihoods import Huber, Likelihood
from fastae.nn import library as _ops

REDUCTIONS = ("mean", "sum", "none")


def part_of(kind: LossKind) -> Likelihood:
    if kind.name == "gaussian":
        return likelihoods.Gaussian(math.exp(kind.setting / 2))
    return likelihoods.PARTS[kind.name](*([kind.setting] if kind.setting else []))


def eager(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, kind: LossKind = MSE,
    reduction: str = "mean", weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As PyTorch users write it; the loss of half precision in fp32."""
    y = EAGER[activation](torch.nn.functional.linear(x, w, b))
    wide = torch.promote_types(y.dtype, torch.float32)
    errors = eager_loss(kind)(y.to(wide), target.to(wide), reduction="none")
    errors = errors if weight is None else errors * weight.to(wide)[:, None]
    width = width_of(kind, errors.shape[1])
    return {
        "mean": lambda: errors.sum() / (len(errors) * width), "sum": errors.sum, "none": lambda: errors.sum(1) / width
    }[reduction]()  # fmt: skip


def mine(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, kind: LossKind = MSE,
    reduction: str = "mean", weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """By the shorter of the two functions where there are both."""
    if kind == MSE:
        return linear_act_mse(x, w, b, target, activation, reduction, weight)
    return linear_act_loss(x, w, b, target, activation, part_of(kind), reduction, weight)


def everything(function: Callable[..., Tensor], args: list[Tensor | None], *others: object) -> list[Tensor | None]:
    """The loss and the gradients of x, w, b."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in args]
    loss = function(*leaves, *others)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return [loss.detach(), *(None if t is None else t.grad for t in leaves)]


def three_ways(
    args: list[Tensor | None], target: Tensor, activation: str, kind: LossKind = MSE, reduction: str = "mean",
    weight: Tensor | None = None,
) -> None:  # fmt: skip
    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    others = activation, kind, reduction
    truth, *truths = everything(eager, [double(t) for t in args], double(target), *others, double(weight))
    loss, *grads = everything(mine, args, target, *others, weight)
    _, *eager_grads = everything(eager, args, target, *others, weight)
    check_all(grads, eager_grads, truths)
    # The loss comes in fp32 or fp64, so PyTorch in that precision is what it has to match.
    widened = [None if t is None else t.to(loss.dtype) for t in (*args, target)]
    # But oneDNN hands out bf16 residuals, from the fp32 accumulator: each square is off by 2 eps / 2 at most.
    bf16 = args[0].dtype == torch.bfloat16
    rounds = fastae.get_backend() == "onednn" and bf16 and activation == "identity" and kind == MSE
    check(loss, eager(*widened, *others, weight), truth, torch.finfo(torch.bfloat16).eps if rounds else None)


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize(("activation", "dtype"), TURNS, ids=short)
def test_loss_and_gradients(activation: str, dtype: torch.dtype, backend: str) -> None:
    x, w, b = layer(activation, 37, 20, 9, dtype)
    target = uniform(37, 20, low=-1, high=1, dtype=dtype, seed=5)
    three_ways([x, w, b], target, activation)
    three_ways([x, w, None], target, activation, MSE, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind.name != "nb"], ids=short)
def test_each_loss(kind: LossKind, dtype: torch.dtype, backend: str) -> None:
    """fp32 and fp64 on "torch" are PyTorch's own ops; the others a Function on the twins and the kernels."""
    number = ALL_KINDS.index(kind) + DTYPES.index(dtype)
    activation = ("sigmoid", "identity", "gelu")[number % 3]
    x, w, b = layer(activation, 35, 20, 9, dtype)
    weight = uniform(35, low=-1, high=3, dtype=dtype, seed=6) if number % 2 else None
    three_ways([x, w, b], normal(35, 20, dtype=dtype, seed=5), activation, kind, REDUCTIONS[number % 3], weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (33, 1, 17)], ids=short)
def test_reductions_and_row_weights(shape: tuple[int, int, int], weighted: bool, reduction: str, backend: str) -> None:
    x, w, b = layer("silu", *shape, torch.float32)
    weight = uniform(shape[0], low=-1, high=3, seed=6) if weighted else None
    kind = KINDS[shape[0] % 3]
    three_ways([x, w, b], normal(*shape[:2], seed=5), "silu", kind, reduction, weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)], ids=short)
def test_empty(shape: tuple[int, int, int], reduction: str, backend: str) -> None:
    M, N, K = shape
    for kind in KINDS[:3]:
        args = [t.requires_grad_() for t in (normal(M, K), normal(N, K), normal(N))]
        loss = mine(*args, normal(M, N, seed=1), "relu", kind, reduction)
        truth = eager(*args, normal(M, N, seed=1), "relu", kind, reduction)
        torch.testing.assert_close(loss, truth, equal_nan=True)
        loss.sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape for t in args)


def test_near_convergence_bf16_keeps_its_gradient(backend: str) -> None:
    """A residual of 0.01 below values of 1: rounding y before the subtraction costs a tenth of the gradient."""
    x, w = normal(64, 48, dtype=torch.bfloat16), (normal(40, 48, seed=1) / 7).bfloat16()
    b = (normal(40, seed=3) / 10).bfloat16()
    target = (x.double() @ w.double().t() + b.double() + 0.01 * normal(64, 40, dtype=torch.float64, seed=2)).bfloat16()

    def dw(loss: Callable[..., Tensor], *args: Tensor) -> Tensor:
        leaf = args[1].clone().requires_grad_()
        loss(args[0], leaf, *args[2:]).backward()
        return leaf.grad.double()

    def unfused(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fastae.mse_loss(fastae.linear_act(x, w, b), t)

    args = (x, w, b, target)
    truth = dw(linear_act_mse, *(t.double() for t in args))
    error = (dw(linear_act_mse, *args) - truth).norm() / truth.norm()
    unfused_error = (dw(unfused, *args) - truth).norm() / truth.norm()
    assert error < 0.005
    assert unfused_error > 0.05


@pytest.mark.parametrize("kind", KINDS[:3], ids=short)
def test_each_subset_of_gradients(kind: LossKind, backend: str) -> None:
    args, target = layer("tanh", 9, 6, 5, torch.float32), normal(9, 6, seed=5)

    def grads(function: Callable[..., Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(want) for t, want in zip(args, wanted, strict=True)]
        loss = function(*leaves, target, "tanh", kind)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        return [t.grad for t in leaves]

    for wanted in itertools.product([False, True], repeat=3):
        for got, want in zip(grads(mine, wanted), grads(eager, wanted), strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("name", ["onednn", "triton"])  # "torch" is PyTorch's own ops in fp64
@pytest.mark.parametrize("kind", KINDS[:3], ids=short)
def test_gradcheck(kind: LossKind, name: str) -> None:
    """Away from kinks: no error near 0, nor near delta."""
    args = [t.requires_grad_() for t in layer("silu", 3, 2, 4, torch.float64)]
    target, weight = normal(3, 2, dtype=torch.float64, seed=5), uniform(3, low=0, high=2, dtype=torch.float64)
    errors = (EAGER["silu"](torch.nn.functional.linear(*args)) - target).detach().abs()
    assert errors.min() > 1e-3
    assert (errors - kind.setting).abs().min() > 1e-3
    assert kind.setting == 0 or (errors < kind.setting).any(), "no error inside delta"
    for reduction in ("mean", "none"):

        def loss(*leaves: Tensor, reduction: str = reduction) -> Tensor:
            return mine(*leaves, target, "silu", kind, reduction, weight)

        with fastae.use_backend(name):
            assert torch.autograd.gradcheck(loss, args, fast_mode=name == "triton")
            assert torch.autograd.gradgradcheck(loss, args, fast_mode=name == "triton")


def test_backward_with_and_without_a_graph_agree(backend: str) -> None:
    for kind, reduction in itertools.product(KINDS[:3], REDUCTIONS):
        args = [t.requires_grad_() for t in layer("gelu", 9, 6, 5, torch.float32)]
        weight = uniform(9, low=0, high=2, seed=6)
        plain, graph = (
            torch.autograd.grad(
                mine(*args, normal(9, 6, seed=5), "gelu", kind, reduction, weight).sum() * 3, args, create_graph=graph
            )
            for graph in (False, True)
        )
        for one, other in zip(plain, graph, strict=True):
            assert other.requires_grad
            torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)


def test_backward_twice_leaves_what_was_saved(backend: str) -> None:
    x, w, b = (t.requires_grad_() for t in layer("relu", 9, 6, 5, torch.float32))
    for reduction in ("mean", "none"):
        loss = linear_act_mse(x, w, b, normal(9, 6, seed=5), "relu", reduction).sum()
        first = torch.autograd.grad(loss, [x, w, b], retain_graph=True)
        again = torch.autograd.grad(loss, [x, w, b])
        assert all(map(torch.equal, first, again))


def test_strided_arguments(backend: str) -> None:
    x, w, b = normal(33, 9).t(), normal(33, 40).t()[::2], normal(40)[::2]
    target = normal(1, 20).expand(9, 20)
    for kind in KINDS[:3]:
        check(
            mine(x, w, b, target, "gelu", kind),
            eager(x, w, b, target, "gelu", kind),
            eager(x.double(), w.double(), b.double(), target.double(), "gelu", kind),
        )


def test_nan_and_inf_as_pytorch_has_them(backend: str) -> None:
    x, w, b = layer("identity", 9, 6, 5, torch.float32)
    target = normal(9, 6, seed=5)
    x[2, 1], target[4, 3] = float("nan"), float("inf")
    for activation, kind in itertools.product(("identity", "relu"), KINDS[:3]):
        ours = mine(x, w, b, target, activation, kind, "none")
        torch.testing.assert_close(ours, eager(x, w, b, target, activation, kind, "none"), equal_nan=True)


def test_autocast_as_linear_is_cast(backend: str) -> None:
    x, w, b = layer("relu", 9, 6, 5, torch.float32)
    w.requires_grad_()
    for kind in KINDS[:3]:
        w.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = mine(x, w, b, normal(9, 6, seed=5), "relu", kind)
        loss.backward()
        low = [t.bfloat16() for t in (x, w, b, normal(9, 6, seed=5))]
        torch.testing.assert_close(loss, mine(*low, "relu", kind))
        assert loss.dtype == w.grad.dtype == torch.float32


def test_transforms_and_subclasses_by_pytorchs_ops(backend: str) -> None:
    class Named(Tensor):
        pass

    x, w, b = layer("relu", 9, 6, 5, torch.float32)
    target = normal(9, 6, seed=5)
    for kind in KINDS[:3]:
        rows = torch.func.vmap(lambda r, t, kind=kind: mine(r[None], w, b, t[None], "relu", kind))(x, target)
        torch.testing.assert_close(rows, eager(x, w, b, target, "relu", kind, "none"))
        named = mine(x.as_subclass(Named), w, b, target, "relu", kind)
        assert type(named) is Named
        torch.testing.assert_close(named.as_subclass(Tensor), eager(x, w, b, target, "relu", kind))


# ---------------------------------------------------------------- names and parts of losses


def test_a_loss_is_a_name_or_a_part(backend: str) -> None:
    x, w, b = layer("relu", 9, 6, 5, torch.float32)
    args = x, w, b, normal(9, 6, seed=5), "relu"
    for named, kind in (
        ("mse", MSE),
        (likelihoods.MSE(), MSE),
        ("mae", LossKind("mae")),
        (likelihoods.MAE(), LossKind("mae")),
        ("huber", LossKind("huber", 1.0)),
        (Huber(), LossKind("huber", 1.0)),
        ("huber:delta=0.3", LossKind("huber", 0.3)),
        (Huber(0.3), LossKind("huber", 0.3)),
    ):
        torch.testing.assert_close(linear_act_loss(*args, named), eager(*args, kind))
        assert torch.equal(linear_act_loss(*args, named), linear_act_loss(*args, part_of(kind)))
    assert torch.equal(linear_act_loss(*args), linear_act_mse(*args))


LOSSES = ", ".join(likelihoods.PARTS)
NOTHING = "loss must have nothing of its own to train; got "
LOSS_ERRORS = {
    "nb": ("nb", ValueError, f"{NOTHING}'nb', which has log_theta: use DenseAutoencoder(likelihood=...)"),
    "a learned scale": (
        "gaussian:scale=learned",
        ValueError,
        f"{NOTHING}'gaussian:scale=learned', which has log_variance: use DenseAutoencoder(likelihood=...)",
    ),
    "wrong name": ("hubr", ValueError, f"loss must be one of {LOSSES}; got 'hubr'; did you mean 'huber'?"),
    "nothing near": ("xyz", ValueError, f"loss must be one of {LOSSES}; got 'xyz'"),
    "the reduction": ("mean", ValueError, f"loss must be one of {LOSSES}; got 'mean'"),
    "wrong type": (2.5, TypeError, "loss must be a name or a part of fastae.likelihoods; got 2.5"),
    "None": (None, TypeError, "loss must be a name or a part of fastae.likelihoods; got None"),
}


@pytest.mark.parametrize("case", LOSS_ERRORS)
def test_a_loss_that_there_is_not(case: str) -> None:
    loss, kind, text = LOSS_ERRORS[case]
    with pytest.raises(kind, match=f"^{re.escape(f'linear_act_loss: {text}')}$"):
        linear_act_loss(normal(9, 5), normal(6, 5), None, normal(9, 6), loss=loss)


@pytest.mark.parametrize("delta", ["0", "-1", "inf", "nan"])
def test_a_delta_that_is_not_a_positive_number(delta: str) -> None:
    text = f"Huber: delta must be a positive number; got {float(delta)!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        linear_act_loss(normal(9, 5), normal(6, 5), None, normal(9, 6), loss=f"huber:delta={delta}")


# ---------------------------------------------------------------- errors

VALID = ", ".join(EAGER)
WITH_GRADIENT = "must not require a gradient; detach it, or use mse_loss(linear_act(...), ...)"


@pytest.mark.parametrize("function", [linear_act_mse, linear_act_loss], ids=short)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": normal(9, 3, 5)}, ValueError, "x must be [rows, in_features]; got [9, 3, 5]"),
        ({"x": None}, TypeError, "x must be a torch.Tensor; got NoneType"),
        ({"weight": normal(6, 4)}, ValueError, "weight must be [out_features, 5] to match x [9, 5]; got [6, 4]"),
        ({"bias": normal(5)}, ValueError, "bias must be [6] to match weight [6, 5]; got [5]"),
        ({"target": normal(9, 5)}, ValueError, "target must be [9, 6] as the layer's output is; got [9, 5]"),
        ({"target": normal(9, 6).double()}, TypeError, "target must be float32 as x is; got float64"),
        ({"target": None}, TypeError, "target must be a torch.Tensor; got NoneType"),
        ({"row_weight": normal(6)}, ValueError, "row_weight must be [9], one per row; got [6]"),
        ({"row_weight": normal(9).half()}, TypeError, "row_weight must be float32 as x is; got float16"),
        ({"reduction": "men"}, ValueError, "reduction must be one of mean, sum, none; got 'men'; did you mean 'mean'?"),
        ({"activation": "rel"}, ValueError, f"activation must be one of {VALID}; got 'rel'; did you mean 'relu'?"),
        ({"target": normal(9, 6).requires_grad_()}, ValueError, f"target {WITH_GRADIENT}"),
        ({"row_weight": normal(9).requires_grad_()}, ValueError, f"row_weight {WITH_GRADIENT}"),
    ],
)
def test_errors(function: Callable[..., Tensor], change: dict[str, object], error: type[Exception], text: str) -> None:
    arguments = {"x": normal(9, 5), "weight": normal(6, 5), "bias": normal(6), "target": normal(9, 6)} | change
    with pytest.raises(error, match=f"^{re.escape(f'{function.__name__}: {text}')}$"):
        function(**arguments)


def test_a_target_with_a_gradient_is_fine_where_none_is_made() -> None:
    x, w, b = layer("relu", 9, 6, 5, torch.float32)
    with torch.no_grad():
        loss = linear_act_loss(x, w, b, normal(9, 6).requires_grad_(), "relu", "mae")
        assert torch.equal(loss, linear_act_loss(x, w, b, normal(9, 6), "relu", "mae"))
    assert not loss.requires_grad


# ---------------------------------------------------------------- opcheck


@pytest.mark.parametrize("kind", [MSE, LossKind("huber", 0.3)], ids=short)
def test_opcheck(kind: LossKind, backend: str) -> None:
    """Also the op of squared error that graphs saved before there were other losses call."""
    x, w, b = layer("silu", 5, 4, 3, torch.float32)
    head, tail = (x, w, b, normal(5, 4), "silu"), ("mean", None, True, backend)
    torch.library.opcheck(_ops.linear_act_loss, (*head, *kind, *tail))
    if kind == MSE:
        torch.library.opcheck(_ops.linear_act_mse, (*head, *tail))
        assert all(map(torch.equal, _ops.linear_act_mse(*head, *tail), _ops.linear_act_loss(*head, *kind, *tail)))
    else:
        torch.library.opcheck(_ops.linear_act_loss, (*head, *kind, "none", normal(5), False, backend))
