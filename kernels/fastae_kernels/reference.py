"""The plain-PyTorch twin of every launcher: same names, same arguments, same results.

These are the reference that the kernels are tested against, the path taken on a CPU, and the baseline of the
benchmarks.
The mathematics stands in `kernels/README.md`. Tensors are 2-D; outputs are contiguous, and fresh unless `out` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastae_kernels.operands import first_operand, rows_apart

aten = torch.ops.aten

# (src [R, ...], dst): dst is still to become src.sum(0); `sum_together` makes many of them in one launch
Pending = list[tuple[Tensor, Tensor]]

# What `rows_apart` does to the operands of a product
Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

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
        lambda p, out: torch.clamp_min(p, 0, out=out),
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
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    keep_p: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = f(x wT + b) [M, N], and p = x wT + b [M, N] if it is to be kept; `out` is for (y, p)."""
    y_out, p_out = (None, None) if out is None else out
    p = _linear(x, w, b, p_out if keep_p else y_out)
    y = p if not keep_p else torch.empty_like(p) if y_out is None else y_out
    ACTIVATIONS[activation].forward(p, y)
    return y, p if keep_p else None


def act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool = False) -> tuple[Tensor, Tensor | None]:
    """dp = dy * f'(p) [M, N], and db = the sum of dp over the rows [N] if it is asked for."""
    dp = dy.new_empty(dy.shape)
    ACTIVATIONS[activation].backward(dy, dp if saved is None else saved, dp)
    return dp, dp.sum(0) if need_db else None  # ATen accumulates half precision in fp32


def linear_dgrad_act(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, out: Tensor | None = None) -> Tensor:
    """dx = (dp w) * f'(...) [M, K]: the gradient handed to the layer below, through that layer's activation."""
    dp = first_operand(dp)
    dx = torch.mm(dp, w) if out is None else torch.mm(dp, w, out=out)
    if saved is not None:
        ACTIVATIONS[activation].backward(dx, saved, dx)
    return dx


def linear_wgrad(
    dp: Tensor,
    x: Tensor,
    need_db: bool = False,
    scale: Tensor | float | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dw = scale dpT x [N, K], and db = scale times the sum of dp over the rows [N] if it is asked for.

    `out` is for (dw, db). `scale` is a number or a 0-d tensor on the device: what `linear_act_mse` leaves out of dp.
    The kernel may leave sums `pending`; here nothing is left to do.
    """
    dw, db = (dp.new_empty(dp.shape[1], x.shape[1]), None) if out is None else out
    if isinstance(scale, Tensor) and scale.device.type == "cpu":
        scale = scale.item()  # which waits for nothing there
    first = first_operand(dp.t())
    if isinstance(scale, float):
        torch.addmm(dw, first, x, beta=0, alpha=scale, out=dw)
    else:
        torch.mm(first, x, out=dw)
        if scale is not None:
            dw.mul_(scale)
    if not need_db:
        return dw, None
    db = dp.sum(0) if db is None else torch.sum(dp, 0, out=db)
    return dw, db if scale is None else db.mul_(scale)


def mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool = False) -> tuple[Tensor, Tensor | None]:
    """sum (input - target)^2, divided by their number for "mean" [], and its gradient 2 (input - target) / n [M, N]."""
    wide = _accumulator(input)
    n = input.numel() if reduction == "mean" else 1
    difference = torch.sub(input.to(wide), target.to(wide), out=input.new_empty(input.shape, dtype=wide))
    loss = squared_error(difference, reduction, None)
    dinput = difference.mul_(2 / n if n else 0.0).to(input.dtype) if need_dinput else None
    return loss.to(input.dtype), dinput


def linear_act_mse(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    activation: str,
    reduction: str,
    row_weight: Tensor | None = None,
    need_dp: bool = False,
    need_y: bool = False,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    features: int | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The squared error of y = f(x wT + b) against target [M, N]; dp, and y [M, N] if it is to be kept.

    The loss is sum_ij row_weight_i (y - target)^2, divided by M N for "mean" []; for "none" each row's mean [M]. It is
    fp32, or fp64 for fp64. dp = row_weight (y - target) f'(p) [M, N] lacks the loss's 2 / n, which `linear_wgrad` puts
    in: near convergence dp / n is below the smallest fp16. y is subtracted before it is rounded. `out` is for dp, in
    half precision for fp32 scratch of its shape, and for the loss. Columns from `features` on are padding: their error
    is 0, and N counts the others. The kernel may leave sums `pending`.
    """
    wide, (dp_out, scratch, loss_out) = _accumulator(x), (None, None, None) if out is None else out
    alone = ACTIVATIONS[activation].saves is None and not need_y  # nothing but dp comes out of p
    p_out = scratch if wide != x.dtype else dp_out if alone else None
    p = _linear(x.to(wide), w.to(wide), None if b is None else b.to(wide), p_out)
    return act_mse(p, target, activation, reduction, row_weight, need_dp, need_y, features, x.dtype, dp_out, loss_out)


def act_mse(
    p: Tensor,
    target: Tensor,
    activation: str,
    reduction: str,
    row_weight: Tensor | None,
    need_dp: bool,
    need_y: bool,
    features: int | None,
    dtype: torch.dtype,
    dp_out: Tensor | None,
    loss_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `linear_act_mse` does from p [M, N] on, which it may write over; dp and y come in `dtype`."""
    saves = ACTIVATIONS[activation].saves
    y = torch.empty_like(p) if saves == "p" else p
    ACTIVATIONS[activation].forward(p, y)
    kept = y.to(dtype, copy=True) if need_y else None
    difference = torch.sub(y, target, out=torch.empty_like(y) if need_dp and saves == "y" else y)
    if features is not None:
        difference[:, features:] = 0
    loss = squared_error(difference, reduction, row_weight, None, features, loss_out)
    if not need_dp:
        return loss, None, kept
    dp = difference
    if row_weight is not None:
        dp.mul_(row_weight.unsqueeze(1))
    if saves is not None:
        ACTIVATIONS[activation].backward(dp, p if saves == "p" else y, dp)
    if dp_out is None or dp_out is dp:
        return loss, dp.to(dtype), kept
    return loss, dp_out.copy_(dp), kept


def squared_error(
    difference: Tensor,
    reduction: str,
    row_weight: Tensor | None,
    scratch: Tensor | None = None,
    features: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """sum row_weight difference^2 [], divided by the number of values for "mean"; for "none" each row's mean [M].

    `scratch`: fp32 of the difference's shape, used in half precision. `features`: columns that count in a mean.
    `out`: for the loss where it is a scalar.
    """
    if difference.dtype in _HALF:  # torch.dot in bf16 takes 50 times as long
        scratch = torch.empty(difference.shape, device=difference.device) if scratch is None else scratch
        difference = scratch.copy_(difference)
    M, N = len(difference), difference.shape[1] if features is None else features
    if reduction == "none" or row_weight is not None:
        rows = torch.linalg.vector_norm(difference, dim=1).square_()
        rows = rows if row_weight is None else rows.mul_(row_weight)
        if reduction == "none":
            return rows.div_(N)
        total = torch.sum(rows, 0, out=out)
    else:
        total = torch.dot(difference.view(-1), difference.view(-1), out=out)
    n = M * N if reduction == "mean" else 1
    return total.div_(n) if n else total.fill_(float("nan"))  # the mean of nothing is NaN, as in torch


def decoder_mse(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    activation: str,
    reduction: str,
    saved: Tensor | None,
    below: str,
    row_weight: Tensor | None = None,
    features: int | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_act_mse` and, from its dp, dx = (dp w) * f'(...) of the layer below: (loss, dp [M, N], dx [M, K]).

    `saved` and `below` are that layer's, as in `linear_dgrad_act`; `saved` may be x itself.
    """
    loss, dp, _ = linear_act_mse(x, w, b, target, activation, reduction, row_weight, need_dp=True, features=features)
    assert dp is not None
    return loss, dp, linear_dgrad_act(dp, w, saved, below)


def stack_score(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> Tensor:
    """Each row's mean squared error after all layers, [M, K] -> [M]; fp32, or fp64 for fp64."""

    def scores(prepare: Prepare) -> Tensor:
        h, w = prepare(_through(x, weights[:-1], biases[:-1], activations[:-1], prepare), weights[-1])
        return linear_act_mse(h, w, biases[-1], x, activations[-1], "none")[0]

    return rows_apart(x, scores)


def stack_encode(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> Tensor:
    """The rows of x [M, K] after all layers, [M, N]."""
    return rows_apart(x, lambda prepare: _through(x, weights, biases, activations, prepare))


def _through(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    prepare: Prepare,
) -> Tensor:
    for w, b, activation in zip(weights, biases, activations, strict=True):
        x, _ = linear_act_fwd(*prepare(x, w), b, activation)
    return x


def sum_together(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """For each pair (src [R, ...], dst): dst = src.sum(0).

    dst may be narrower or have fewer rows, which drops what is left over, or be wider, which fills it with 0.
    """
    for src, dst in pairs:
        wide = src.sum(0, dtype=_accumulator(src))
        within = [slice(0, min(n, m)) for n, m in zip(wide.shape, dst.shape, strict=True)]
        if dst.dim() and within[-1].stop < dst.shape[-1]:
            dst[..., within[-1].stop :][tuple(within[:-1])] = 0
        dst[tuple(within)] = wide[tuple(within)]


def _linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor | None) -> Tensor:
    x = first_operand(x)
    out = x.new_empty(x.shape[0], w.shape[0]) if out is None else out  # unlike F.linear, out= ops ignore autocast
    return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype
