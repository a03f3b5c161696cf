"""The plain-PyTorch twin of every launcher: same names, same arguments, same results.

These are the reference that the kernels are tested against, the path taken on a CPU, and the baseline of the
benchmarks.
The mathematics stands in `kernels/README.md`. Tensors are 2-D; outputs are fresh and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

LEAKY_RELU_SLOPE = 0.01
LOGIT_EPS = 1e-6  # logit clamps its argument to [eps, 1 - eps], as torch.logit(p, eps) does
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Activation:
    """`forward(p, out)` writes f(p); `backward(dy, saved, out)` writes dy * f'(p); both may write over their first
    argument.

    `saves` says what f' is written from: the output `y`, the pre-activation `p`, or nothing.
    """

    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    saves: Literal["y", "p"] | None


def _identity(p: Tensor, out: Tensor) -> None:
    if out is not p:
        out.copy_(p)


def _softplus_bwd(dy: Tensor, y: Tensor, out: Tensor) -> None:
    torch.mul(dy, torch.expm1(-y), out=out).neg_()  # f' = sigmoid(p) = 1 - exp(-y)


def _logit(p: Tensor, out: Tensor) -> None:
    # In half precision ATen rounds 1 - eps to 1 and returns inf there.
    out.copy_(torch.logit(p.float() if p.dtype in _HALF else p, LOGIT_EPS))


def _logit_bwd(dy: Tensor, p: Tensor, out: Tensor) -> None:
    wide = torch.float32 if p.dtype in _HALF else p.dtype
    out.copy_(aten.logit_backward(dy.to(wide), p.to(wide), LOGIT_EPS))


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, lambda dy, _, out: _identity(dy, out), None),
    "relu": Activation(
        lambda p, out: aten.relu.out(p, out=out),
        lambda dy, y, out: aten.threshold_backward.grad_input(dy, y, 0, grad_input=out),
        "y",
    ),
    "leaky_relu": Activation(
        lambda p, out: aten.leaky_relu.out(p, LEAKY_RELU_SLOPE, out=out),
        lambda dy, y, out: aten.leaky_relu_backward.grad_input(dy, y, LEAKY_RELU_SLOPE, True, grad_input=out),
        "y",
    ),
    "elu": Activation(
        lambda p, out: aten.elu.out(p, out=out),
        lambda dy, y, out: aten.elu_backward.grad_input(dy, 1, 1, 1, True, y, grad_input=out),
        "y",
    ),
    "gelu": Activation(
        lambda p, out: aten.gelu.out(p, out=out),
        lambda dy, p, out: aten.gelu_backward.grad_input(dy, p, grad_input=out),
        "p",
    ),
    "gelu_tanh": Activation(
        lambda p, out: aten.gelu.out(p, approximate="tanh", out=out),
        lambda dy, p, out: aten.gelu_backward.grad_input(dy, p, approximate="tanh", grad_input=out),
        "p",
    ),
    "silu": Activation(
        lambda p, out: aten.silu.out(p, out=out),
        lambda dy, p, out: aten.silu_backward.grad_input(dy, p, grad_input=out),
        "p",
    ),
    "sigmoid": Activation(
        lambda p, out: torch.sigmoid(p, out=out),
        lambda dy, y, out: aten.sigmoid_backward.grad_input(dy, y, grad_input=out),
        "y",
    ),
    "tanh": Activation(
        lambda p, out: torch.tanh(p, out=out),
        lambda dy, y, out: aten.tanh_backward.grad_input(dy, y, grad_input=out),
        "y",
    ),
    "softplus": Activation(lambda p, out: aten.softplus.out(p, out=out), _softplus_bwd, "y"),
    "logit": Activation(_logit, _logit_bwd, "p"),
}


#: The same activations as differentiable functions of p, for gradients of gradients.
DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda p: p,
    "relu": torch.relu,
    "leaky_relu": lambda p: F.leaky_relu(p, LEAKY_RELU_SLOPE),
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "logit": lambda p: torch.logit(p.float() if p.dtype in _HALF else p, LOGIT_EPS).to(p.dtype),
}


def linear_act_fwd(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y = f(x wT + b) [M, N], and p = x wT + b [M, N] if it is to be kept."""
    p = F.linear(x, w, b)
    y = torch.empty_like(p) if keep_p else p
    ACTIVATIONS[activation].forward(p, y)
    return y, p if keep_p else None


def act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool = False) -> tuple[Tensor, Tensor | None]:
    """dp = dy * f'(p) [M, N], and db = the sum of dp over the rows [N] if it is asked for."""
    dp = dy.new_empty(dy.shape)
    ACTIVATIONS[activation].backward(dy, dp if saved is None else saved, dp)
    return dp, _sum_rows(dp) if need_db else None


def linear_dgrad_act(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """dx = (dp w) * f'(...) [M, K]: the gradient handed to the layer below, through that layer's activation."""
    dx = torch.mm(dp, w)
    if saved is not None:
        ACTIVATIONS[activation].backward(dx, saved, dx)
    return dx


def linear_wgrad(dp: Tensor, x: Tensor, need_db: bool = False) -> tuple[Tensor, Tensor | None]:
    """dw = dpT x [N, K], and db = the sum of dp over the rows [N] if it is asked for."""
    return torch.mm(dp.t(), x), _sum_rows(dp) if need_db else None


def mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool = False) -> tuple[Tensor, Tensor | None]:
    """sum (input - target)^2, divided by their number for "mean" [], and its gradient 2 (input - target) / n [M, N]."""
    wide = torch.float32 if input.dtype in _HALF else input.dtype
    n = input.numel() if reduction == "mean" else 1
    difference = torch.sub(input.to(wide), target.to(wide), out=input.new_empty(input.shape, dtype=wide))
    flat = difference.view(-1)
    loss = torch.dot(flat, flat)
    loss = loss / n if n else loss * float("nan")  # the mean of nothing is NaN, as in torch
    dinput = difference.mul_(2 / n if n else 0.0).to(input.dtype) if need_dinput else None
    return loss.to(input.dtype), dinput


def _sum_rows(dp: Tensor) -> Tensor:
    return dp.sum(0)  # ATen accumulates half precision in fp32
