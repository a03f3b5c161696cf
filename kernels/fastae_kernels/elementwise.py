"""Activations and losses as torch functions: one row each in two tables. Their Triton pairs: `jit/activations.py` and
`jit/losses.py`; the mathematics: `kernels/README.md`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastae_kernels import negative_binomial

aten = torch.ops.aten

LEAKY_RELU_SLOPE = 0.01
SOFTPLUS_THRESHOLD = 20  # torch's: softplus is the identity above it
LOGIT_EPS = 1e-6  # logit clamps its argument to [eps, 1 - eps], as torch.logit(p, eps) does
HALF = (torch.float16, torch.bfloat16)


def accumulator(x: Tensor) -> torch.dtype:
    """fp32 for half precision, else x's own dtype."""
    return torch.float32 if x.dtype in HALF else x.dtype


# ---------------------------------------------------------------- activations


class Activation(NamedTuple):
    """`forward(p, out)` writes f(p); `backward(dy, saved, out)` writes dy * f'(p); both may write over their first
    argument. `differentiable(p)` is f for autograd, for gradients of gradients, and `slope(p)` is f' for it.

    `saves` says what f' is written from inside a step: the output `y`, the pre-activation `p`, or nothing.
    `eager_saves`: what PyTorch's own pair of a linear layer and this activation keeps for its backward pass, and what
    `linear_act` keeps: whoever changes the other one in place does no harm. Where they differ, `backward` takes either.
    `in_place` is f for autograd over its argument, where its derivative is taken from y: no second tensor of p's size.
    `from_y(dy, y)` is that derivative for autograd.
    `spellings`: PyTorch's own module, functions and methods, where they have no settings; `patch` recognises those with
    settings by itself.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    saves: Literal["y", "p"] | None
    differentiable: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    eager_saves: Literal["y", "p"] | None
    in_place: Callable[[Tensor], Tensor] | None = None
    from_y: Callable[[Tensor, Tensor], Tensor] | None = None
    spellings: tuple[Callable[..., object] | str, ...] = ()


def _identity(p: Tensor, out: Tensor) -> None:
    if out is not p:
        out.copy_(p)


def _logit(p: Tensor, out: Tensor) -> None:
    # In half precision ATen rounds 1 - eps to 1 and returns inf there.
    out.copy_(torch.logit(p.float() if p.dtype in HALF else p, LOGIT_EPS))


def _logit_bwd(dy: Tensor, p: Tensor, out: Tensor) -> None:
    wide = accumulator(p)
    out.copy_(aten.logit_backward(dy.to(wide), p.to(wide), LOGIT_EPS))


def _logit_slope(p: Tensor) -> Tensor:
    inside = p.clamp(LOGIT_EPS, 1 - LOGIT_EPS)
    return torch.where(inside == p, 1 / (inside * (1 - inside)), 0.0)


def _mish_slope(p: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(p))
    return t + p * torch.sigmoid(p) * (1 - t * t)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, lambda dy, _, out: _identity(dy, out), None, lambda p: p, torch.ones_like, None),
    "relu": Activation(
        lambda p, out: torch.clamp_min(p, 0, out=out),
        lambda dy, y, out: aten.threshold_backward.grad_input(dy, y, 0, grad_input=out),
        "y",
        torch.relu,
        lambda p: (p > 0).to(p.dtype),
        "y",
        torch.relu_,
        lambda dy, y: aten.threshold_backward(dy, y, 0),
        (nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    ),
    "leaky_relu": Activation(
        lambda p, out: aten.leaky_relu.out(p, LEAKY_RELU_SLOPE, out=out),
        lambda dy, y, out: aten.leaky_relu_backward.grad_input(dy, y, LEAKY_RELU_SLOPE, True, grad_input=out),
        "y",
        lambda p: F.leaky_relu(p, LEAKY_RELU_SLOPE),
        lambda p: (p > 0).to(p.dtype) * (1 - LEAKY_RELU_SLOPE) + LEAKY_RELU_SLOPE,
        "p",
    ),
    "elu": Activation(
        lambda p, out: aten.elu.out(p, out=out),
        lambda dy, p, out: aten.elu_backward.grad_input(dy, 1, 1, 1, False, p, grad_input=out),
        "p",  # y + 1 is 0 in the tail, where y is rounded
        F.elu,
        lambda p: p.clamp(max=0).exp(),
        "p",
    ),
    "gelu": Activation(
        lambda p, out: aten.gelu.out(p, out=out),
        lambda dy, p, out: aten.gelu_backward.grad_input(dy, p, grad_input=out),
        "p",
        F.gelu,
        lambda p: aten.gelu_backward(torch.ones_like(p), p),
        "p",
    ),
    "gelu_tanh": Activation(
        lambda p, out: aten.gelu.out(p, approximate="tanh", out=out),
        lambda dy, p, out: aten.gelu_backward.grad_input(dy, p, approximate="tanh", grad_input=out),
        "p",
        lambda p: F.gelu(p, approximate="tanh"),
        lambda p: aten.gelu_backward(torch.ones_like(p), p, approximate="tanh"),
        "p",
    ),
    "silu": Activation(
        lambda p, out: aten.silu.out(p, out=out),
        lambda dy, p, out: aten.silu_backward.grad_input(dy, p, grad_input=out),
        "p",
        F.silu,
        lambda p: torch.sigmoid(p) * (1 + p * torch.sigmoid(-p)),
        "p",
        spellings=(nn.SiLU, F.silu),
    ),
    "mish": Activation(
        lambda p, out: aten.mish.out(p, out=out),
        lambda dy, p, out: out.copy_(aten.mish_backward(dy, p)),
        "p",
        F.mish,
        _mish_slope,
        "p",
        spellings=(nn.Mish, F.mish),
    ),
    "sigmoid": Activation(
        lambda p, out: torch.sigmoid(p, out=out),
        lambda dy, y, out: aten.sigmoid_backward.grad_input(dy, y, grad_input=out),
        "y",
        torch.sigmoid,
        lambda p: torch.sigmoid(p) * torch.sigmoid(-p),
        "y",
        torch.sigmoid_,
        lambda dy, y: aten.sigmoid_backward(dy, y),
        (nn.Sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
    ),
    "tanh": Activation(
        lambda p, out: torch.tanh(p, out=out),
        lambda dy, y, out: aten.tanh_backward.grad_input(dy, y, grad_input=out),
        "y",
        torch.tanh,
        lambda p: 1 - torch.tanh(p).square(),
        "y",
        torch.tanh_,
        lambda dy, y: aten.tanh_backward(dy, y),
        (nn.Tanh, torch.tanh, "tanh", "tanh_"),
    ),
    "softplus": Activation(
        lambda p, out: aten.softplus.out(p, out=out),
        lambda dy, p, out: aten.softplus_backward.grad_input(dy, p, 1, SOFTPLUS_THRESHOLD, grad_input=out),
        "p",
        F.softplus,
        lambda p: torch.where(p > SOFTPLUS_THRESHOLD, 1.0, torch.sigmoid(p)),
        "p",
    ),
    "logit": Activation(
        _logit,
        _logit_bwd,
        "p",
        lambda p: torch.logit(p.float() if p.dtype in HALF else p, LOGIT_EPS).to(p.dtype),
        _logit_slope,
        "p",
    ),
}


# ---------------------------------------------------------------- losses


class LossKind(NamedTuple):
    """A row of LOSSES and the number that it may take: huber's delta."""

    name: str
    setting: float = 0.0

    @property
    def row(self) -> Loss:
        return LOSSES[self.name]

    def width(self, features: int) -> int:
        """Values of a row that its mean divides by: all its features or, of a log-likelihood, none: that is a sum."""
        return 1 if self.row.summed else features

    def scale(self, rows: int, features: int) -> float:
        """u of a mean: what a gradient that the kernels store lacks."""
        return self.row.factor / max(rows * self.width(features), 1)


class Loss(NamedTuple):
    """The loss of an output y [M, N] against a target t, as sums for the twins and as PyTorch has it for autograd.

    `evaluate(y, t, a, setting, per_row, gradient, da, out)` returns the sum over all values [], or of each row [M], in
    `out` if that is given. It writes the gradient by y, in units of `factor`, into `gradient` [M, N], which may be y,
    and that by the loss's parameter a (one for each column, [N], or one for all, [1]) of each value into `da` [M, N],
    if that is given. a is None for a loss that has none, or that has the value 0. All are contiguous and fp32 or fp64,
    and it makes no memory but by `torch.empty`, so that its calls can be repeated.
    `functional(y, t, a, setting, reduction)` is for autograd, PyTorch's own where there is one; "none" gives its
    values, one by one.
    """

    evaluate: Callable[[Tensor, Tensor, Tensor | None, float, bool, Tensor, Tensor | None, Tensor | None], Tensor]
    functional: Callable[[Tensor, Tensor, Tensor | None, float, str], Tensor]
    factor: float  # dL/dy is this times what is stored
    default: float = 0.0  # the setting where none is given
    summed: bool = False  # a log-likelihood: summed over the features of a row, where the others take the mean


def sum_of_squares(e: Tensor, per_row: bool, out: Tensor | None = None) -> Tensor:
    """[] or, of each row, [M]; without memory for the squares."""
    if per_row:
        return torch.linalg.vector_norm(e, dim=1, out=out).square_()
    return torch.dot(e.view(-1), e.view(-1), out=out)


def _mse(
    y: Tensor, t: Tensor, _a: Tensor | None, _: float, per_row: bool, gradient: Tensor, _da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    return sum_of_squares(torch.sub(y, t, out=gradient), per_row, out)


def _mae(
    y: Tensor, t: Tensor, _a: Tensor | None, _: float, per_row: bool, gradient: Tensor, _da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    e = torch.sub(y, t, out=gradient)
    size = torch.abs(e, out=torch.empty_like(e))  # vector_norm(1) would add one after the other: 2e-5 off at 800,000
    total = torch.sum(size if per_row else size.view(-1), -1, out=out)
    e.sign_()
    return total


def _huber(
    y: Tensor, t: Tensor, _a: Tensor | None, delta: float, per_row: bool, gradient: Tensor, _da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """c (e - c / 2), c being e clamped to +-delta: e^2 / 2 inside, delta (|e| - delta / 2) outside."""
    e = torch.sub(y, t, out=gradient)
    c = torch.clamp(e, -delta, delta, out=torch.empty_like(e))
    terms = torch.sub(e, c, alpha=0.5, out=e).mul_(c)
    total = torch.sum(terms if per_row else terms.view(-1), -1, out=out)
    gradient.copy_(c)
    return total


def _gaussian(
    p: Tensor, t: Tensor, s: Tensor | None, setting: float, per_row: bool, gradient: Tensor, ds: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """(e^2 exp(-s) + s) / 2, s = log sigma^2 being the parameter; without one e^2 exp(-setting) / 2."""
    e = torch.sub(p, t, out=gradient)
    if s is None:
        total = sum_of_squares(e, per_row, out).mul_(0.5)
        if setting:
            total.mul_(math.exp(-setting))
            gradient.mul_(math.exp(-setting))
        return total
    precision = torch.neg(s, out=torch.empty_like(s)).exp_()
    terms = torch.mul(e, e, out=torch.empty_like(e)).mul_(precision)
    e.mul_(precision)
    if ds is not None:
        torch.mul(terms, -0.5, out=ds).add_(0.5)
    terms.add_(s).mul_(0.5)
    return torch.sum(terms if per_row else terms.view(-1), -1, out=out)


def _bernoulli(
    p: Tensor, t: Tensor, _a: Tensor | None, _: float, per_row: bool, gradient: Tensor, _da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """max(p, 0) - t p + log(1 + exp(-|p|)): neither overflows nor cancels."""
    terms = torch.clamp_min(p, 0, out=torch.empty_like(p))
    terms.addcmul_(p, t, value=-1)
    total = torch.sum(terms if per_row else terms.view(-1), -1, out=out)
    small = torch.abs(p, out=terms).neg_().exp_()
    total.add_(_sum_log1p(small if per_row else small.view(-1), total))
    torch.sigmoid(p, out=gradient).sub_(t)
    return total


def _sum_log1p(z: Tensor, like: Tensor) -> Tensor:
    """The sum of log(1 + z) over the last axis, of z in [0, 1], which is written over.

    (1 + a)(1 + b) = 1 + (a + b + a b) makes one logarithm of two, and nothing cancels. A logarithm takes as long as
    five of these steps; of 32 factors the product is finite.
    """
    for _ in range(5):
        half, odd = divmod(z.shape[-1], 2)
        if odd or not half:
            break
        a, b = z[..., :half], z[..., half:]
        z = a.add_(b.addcmul_(a, b))
    return torch.sum(z.log1p_(), -1, out=torch.empty_like(like))


def _poisson(
    p: Tensor, t: Tensor, _a: Tensor | None, _: float, per_row: bool, gradient: Tensor, _da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """exp(p) - t p, without log(t!)."""
    linear = torch.mul(p, t, out=torch.empty_like(p))
    rate = torch.exp(p, out=gradient)
    terms = torch.sub(rate, linear, out=linear)
    total = torch.sum(terms if per_row else terms.view(-1), -1, out=out)
    rate.sub_(t)
    return total


def _nb(
    p: Tensor, t: Tensor, a: Tensor | None, setting: float, per_row: bool, gradient: Tensor, da: Tensor | None,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    a = p.new_empty(1).zero_() if a is None else a
    out = p.new_empty(p.shape[:1] if per_row else ()) if out is None else out
    return negative_binomial.evaluate_(gradient, da, out, p, t, a, setting)


def _reduced(values: Tensor, reduction: str) -> Tensor:
    """Of a log-likelihood: summed over the last dimension, the mean over all others."""
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / values.shape[:-1].numel()


def _gaussian_values(p: Tensor, t: Tensor, s: Tensor | None, setting: float) -> Tensor:
    half = F.mse_loss(p, t, reduction="none") / 2
    if s is None:
        return half if setting == 0 else half * math.exp(-setting)
    return half * torch.exp(-s) + s / 2


def _nb_values(p: Tensor, t: Tensor, a: Tensor | None, setting: float) -> Tensor:
    a = p.new_zeros(1) if a is None else a
    values: Tensor = negative_binomial.NegativeBinomial.apply(p, t, a, setting)
    return values


#: name -> the loss; `jit/losses.py` has a pair of the same name for each
LOSSES: dict[str, Loss] = {
    "mse": Loss(_mse, lambda y, t, _a, _, r: F.mse_loss(y, t, reduction=r), 2.0),
    "mae": Loss(_mae, lambda y, t, _a, _, r: F.l1_loss(y, t, reduction=r), 1.0),
    "huber": Loss(_huber, lambda y, t, _a, delta, r: F.huber_loss(y, t, reduction=r, delta=delta), 1.0, 1.0),
    "gaussian": Loss(_gaussian, lambda *given: _reduced(_gaussian_values(*given[:-1]), given[-1]), 1.0, summed=True),
    "bernoulli": Loss(
        _bernoulli,
        lambda p, t, _a, _, r: _reduced(F.binary_cross_entropy_with_logits(p, t, reduction="none"), r),
        1.0,
        summed=True,
    ),
    "poisson": Loss(
        _poisson, lambda p, t, _a, _, r: _reduced(F.poisson_nll_loss(p, t, reduction="none"), r), 1.0, summed=True
    ),
    "nb": Loss(_nb, lambda *given: _reduced(_nb_values(*given[:-1]), given[-1]), 1.0, summed=True),
}
MSE = LossKind("mse")
