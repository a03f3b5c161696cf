"""The mean squared error of a linear layer with activation against a target, in one kernel: `linear_act_mse`."""

from __future__ import annotations

from typing import Any

import torch
from fastae_kernels.reference import DIFFERENTIABLE
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastae.nn import backend as _backend
from fastae.nn import library as _ops
from fastae.nn.arguments import (
    all_dtensors,
    autocast,
    autocast_dtype,
    check_tensors,
    kernels_take,
    refuse_torchscript,
    require_tensors,
)
from fastae.nn.linear_act import check_activation, check_layer
from fastae.nn.losses import check_reduction

# ---------------------------------------------------------------- checks


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None,
) -> None:  # fmt: skip
    check_activation(activation, "linear_act_mse: activation")
    check_reduction(reduction, "linear_act_mse: reduction")
    check_tensors("linear_act_mse", x=x, weight=weight, bias=bias, target=target, row_weight=row_weight)
    if x.dim() != 2:
        raise ValueError(f"linear_act_mse: x must be [rows, in_features]; got {list(x.shape)}")
    check_layer("linear_act_mse", x, weight, bias)
    if target.shape != (len(x), len(weight)):
        raise ValueError(
            f"linear_act_mse: target must be {[len(x), len(weight)]} as the layer's output is; got {list(target.shape)}"
        )
    if row_weight is not None and row_weight.shape != x.shape[:1]:
        raise ValueError(f"linear_act_mse: row_weight must be [{len(x)}], one per row; got {list(row_weight.shape)}")
    for name, t in (("target", target), ("row_weight", row_weight)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"linear_act_mse: {name} must not require a gradient; detach it, or use mse_loss(linear_act(...), ...)"
            )


# ---------------------------------------------------------------- autograd


class _LinearActMSEFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, row_weight: Tensor | None,
        activation: str, reduction: str, backend: str,
    ) -> Tensor:  # fmt: skip
        loss, dp = _ops.linear_act_mse(x, w, b, target, activation, reduction, row_weight, True, backend)
        ctx.save_for_backward(x, w, b, target, row_weight, dp)
        ctx.activation, ctx.reduction, ctx.backend = activation, reduction, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, row_weight, dp = ctx.saved_tensors
        need_dx, need_dw, need_db = needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            return *_differentiable_backward(ctx, grad_output, needs, x, w, b, target, row_weight), *[None] * 5
        divisor = {"mean": dp.numel(), "sum": 1, "none": dp.shape[1]}[ctx.reduction]
        scale = grad_output * (2 / max(divisor, 1))
        if ctx.reduction == "none":  # each row has a gradient of its own
            dp, scale = (dp * scale.unsqueeze(1)).to(dp.dtype), scale.new_ones(())
        dx = dw = db = None
        if need_dw:
            dw, db = _ops.linear_wgrad(dp, x, need_db, scale, ctx.backend)
        elif need_db:
            db = (_ops.act_bwd(dp, None, "identity", True, ctx.backend)[1] * scale).to(dp.dtype)
        if need_dx:
            dx = (_ops.linear_dgrad_act(dp, w, None, "identity", ctx.backend) * scale).to(x.dtype)
        return dx, dw, db if need_db else None, *[None] * 5


def _differentiable_backward(
    ctx: Any, grad_output: Tensor, needs: tuple[bool, ...],
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, row_weight: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The same gradients, recomputed from PyTorch's differentiable ops."""
    # Views, so that one tensor in two places (x is w, say) still gets a gradient for each place.
    inputs = [None if t is None else t.view_as(t) for t in (x, w, b)]
    loss = _eager(inputs[0], inputs[1], inputs[2], target, row_weight, ctx.activation, ctx.reduction)  # type: ignore[arg-type]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
    grads = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return tuple(next(grads) if t is not None and need else None for t, need in zip(inputs, needs, strict=True))


def _eager(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, row_weight: Tensor | None, activation: str, reduction: str
) -> Tensor:
    """The loss by PyTorch's own ops."""
    y = DIFFERENTIABLE[activation](torch.nn.functional.linear(x, w, b))
    wide = torch.promote_types(y.dtype, torch.float32)
    if row_weight is None and reduction != "none":
        return torch.nn.functional.mse_loss(y.to(wide), target.to(wide), reduction=reduction)
    errors = (y.to(wide) - target.to(wide)).square()
    errors = errors if row_weight is None else errors * row_weight.unsqueeze(1)
    loss = errors.mean(1) if reduction == "none" else errors.sum()
    return loss / max(errors.numel(), 1) if reduction == "mean" else loss


# ---------------------------------------------------------------- function


def linear_act_mse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    activation: str = "identity",
    reduction: str = "mean",
    row_weight: Tensor | None = None,
) -> Tensor:
    """mse_loss(linear_act(x, weight, bias, activation), target) in one kernel: the layer's output is never stored.

    Args:
        x: [rows, in_features], any strides; fp32, fp16, bf16 or fp64.
        weight, bias, activation: as in `fastae.linear_act`.
        target: [rows, out_features], dtype and device of x; it gets no gradient.
        reduction: "mean" over all values, "sum", or "none": each row's mean, [rows].
        row_weight: [rows] or None: factors on the rows' squared errors, before any sum; "mean" still divides by the
            number of values. It gets no gradient.

    Returns a scalar, or [rows], in fp32 (fp64 for fp64). The target is subtracted in the accumulator before anything is
    rounded: in bf16 the gradient keeps its precision near convergence, where mse_loss(linear_act(...)) loses it. Under
    `torch.autocast` the arguments are cast as those of `F.linear` are. Differentiable twice.
    Formulas: kernels/README.md.

    Raises TypeError for a dtype that is not floating point or mixed dtypes, ValueError for shapes or devices that do
    not fit, an unknown activation or reduction, or a target or row_weight that requires a gradient, RuntimeError under
    TorchScript or if the backend cannot run here. Where kernels do not apply, PyTorch's own ops compute it (see
    `linear_act`).
    """
    tensors = x, weight, bias, target, row_weight
    if has_torch_function_variadic(*tensors):
        args = x, weight, bias, target, activation, reduction, row_weight
        result: Tensor = handle_torch_function(linear_act_mse, tensors, *args)
        return result
    optional = {name: t for name, t in (("bias", bias), ("row_weight", row_weight)) if t is not None}
    require_tensors("linear_act_mse", x=x, weight=weight, target=target, **optional)
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, target = autocast(x, dtype), autocast(weight, dtype), autocast(target, dtype)
        bias, row_weight = (None if t is None else autocast(t, dtype) for t in (bias, row_weight))
    _check(x, weight, bias, target, activation, reduction, row_weight)
    if not kernels_take("linear_act_mse", x, weight, bias, target, row_weight):
        all_dtensors("linear_act_mse", weight=weight, x=x, bias=bias, target=target, row_weight=row_weight)
        return _eager(x, weight, bias, target, row_weight, activation, reduction)
    backend = _backend.resolve(x, weight.shape[1], len(x) * weight.numel(), loss=True)
    if backend == "torch" and x.dtype.itemsize > 2:  # the twin would do the same through a Function of Python
        return _eager(x, weight, bias, target, row_weight, activation, reduction)
    # Inside Function.forward gradients are always off, and needs_input_grad ignores no_grad: decide here what is saved.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        loss: Tensor = _LinearActMSEFunction.apply(x, weight, bias, target, row_weight, activation, reduction, backend)
        return loss
    loss, _ = _ops.linear_act_mse(x, weight, bias, target, activation, reduction, row_weight, False, backend)
    return loss


linear_act_mse.__prepare_scriptable__ = lambda: refuse_torchscript("linear_act_mse")  # type: ignore[attr-defined]
