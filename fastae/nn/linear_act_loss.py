"""The loss of a linear layer with activation against a target, in one kernel: `linear_act_loss`, `linear_act_mse`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fastae_kernels.elementwise import ACTIVATIONS, MSE, LossKind
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastae.likelihoods import Likelihood, spelled
from fastae.nn import backend as _backend
from fastae.nn import library as _ops
from fastae.nn.arguments import admit, refuse_torchscript
from fastae.nn.linear_act import check_activation, check_layer, eager
from fastae.nn.losses import REDUCTIONS, check_reduction, eager_loss, kind_of, likelihood_of, row_losses
from fastae.nn.recompute import differentiable_gradients

# ---------------------------------------------------------------- checks


def _check(
    function: str, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None,
) -> None:  # fmt: skip
    if activation not in ACTIVATIONS:
        check_activation(activation, f"{function}: activation")
    if reduction not in REDUCTIONS:
        check_reduction(reduction, f"{function}: reduction")
    if x.dim() != 2:
        raise ValueError(f"{function}: x must be [rows, in_features]; got {list(x.shape)}")
    check_layer(function, x, weight, bias)
    if target.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(
            f"{function}: target must be {[len(x), len(weight)]} as the layer's output is; got {list(target.shape)}"
        )
    if row_weight is not None and row_weight.shape != x.shape[:1]:
        raise ValueError(f"{function}: row_weight must be [{len(x)}], one per row; got {list(row_weight.shape)}")
    for name, t in (("target", target), ("row_weight", row_weight)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{function}: {name} must not require a gradient; detach it, or use mse_loss(linear_act(...), ...)"
            )


def _kind(likelihood: Likelihood) -> LossKind:
    if likelihood.parameter is not None:
        raise ValueError(
            f"linear_act_loss: loss must have nothing of its own to train; got {spelled(likelihood)!r}, which has "
            f"{likelihood.parameter.name}: use DenseAutoencoder(likelihood=...)"
        )
    return kind_of(likelihood)


# ---------------------------------------------------------------- autograd


class _LinearActLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, row_weight: Tensor | None,
        activation: str, kind: LossKind, reduction: str, backend: str,
    ) -> Tensor:  # fmt: skip
        loss, dp = _ops.direct(_ops.linear_act_loss, backend)(
            x, w, b, target, activation, *kind, reduction, row_weight, True, backend
        )
        kept = x if any(ctx.needs_input_grad[:2]) else None  # db alone comes from dp
        ctx.save_for_backward(kept, w, b, target, row_weight, dp)
        ctx.activation, ctx.kind, ctx.reduction, ctx.backend = activation, kind, reduction, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, row_weight, dp = ctx.saved_tensors
        need_dx, need_dw, need_db = needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            if x is None:
                raise RuntimeError(
                    "linear_act_loss: x or weight must require a gradient where the bias's is differentiated again "
                    "(create_graph=True); or use mse_loss(linear_act(...), ...)"
                )
            loss = partial(
                _eager, target=target, row_weight=row_weight, activation=ctx.activation, kind=ctx.kind,
                reduction=ctx.reduction,
            )  # fmt: skip
            return *differentiable_gradients(loss, (x, w, b), needs, grad_output), *[None] * 6
        width = ctx.kind.width(dp.shape[1])
        divisor = {"mean": len(dp) * width, "sum": 1, "none": width}[ctx.reduction]
        scale = grad_output * (ctx.kind.row.factor / max(divisor, 1))
        if ctx.reduction == "none":  # each row has a gradient of its own
            dp, scale = (dp * scale.unsqueeze(1)).to(dp.dtype), scale.new_ones(())
        dx = dw = db = None
        if need_dw:
            dw, db = _ops.direct(_ops.linear_wgrad, ctx.backend)(dp, x, need_db, scale, ctx.backend)
        elif need_db:
            db = (_ops.direct(_ops.act_bwd, ctx.backend)(dp, None, "identity", True, ctx.backend)[1] * scale).to(
                dp.dtype
            )
        if need_dx:
            dx = (_ops.direct(_ops.linear_dgrad_act, ctx.backend)(dp, w, None, "identity", ctx.backend) * scale).to(
                x.dtype
            )
        return dx, dw, db if need_db else None, *[None] * 6


def _eager(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, row_weight: Tensor | None, activation: str, kind: LossKind,
    reduction: str,
) -> Tensor:  # fmt: skip
    """The loss by PyTorch's own ops."""
    y = eager(x, w, b, activation)
    if y.dtype.itemsize == 2:
        y, target = y.float(), target.float()
    if row_weight is None and reduction != "none":
        return eager_loss(y, target, kind, reduction)
    errors = eager_loss(y, target, kind, "none")
    errors = errors if row_weight is None else errors * row_weight.unsqueeze(1)
    if reduction == "none":
        return row_losses(errors, kind)
    values = len(errors) * kind.width(errors.shape[1])
    return errors.sum() / values if reduction == "mean" else errors.sum()  # NaN of no values, as in PyTorch


# ---------------------------------------------------------------- function


def linear_act_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    activation: str = "identity",
    loss: str | Likelihood = "mse",
    reduction: str = "mean",
    row_weight: Tensor | None = None,
) -> Tensor:
    """The loss of linear_act(x, weight, bias, activation) against target in one kernel: its output is never stored.

    Args:
        x: [rows, in_features], any strides; fp32, fp16, bf16 or fp64.
        weight, bias, activation: as in `fastae.linear_act`.
        target: [rows, out_features], dtype and device of x; it gets no gradient.
        loss: a part of `fastae.likelihoods` or its name, "huber" say; none that has something to be trained.
        reduction: "mean" over all values, "sum", or "none": each row's mean, [rows].
        row_weight: [rows] or None: factors on the rows' losses, before any sum; "mean" still divides by the
            number of values. It gets no gradient.

    Returns a scalar, or [rows], in fp32 (fp64 for fp64). The target is subtracted in the accumulator before anything is
    rounded: in bf16 the gradient keeps its precision near convergence, where mse_loss(linear_act(...)) loses it. Under
    `torch.autocast` the arguments are cast as those of `F.linear` are. Differentiable twice, but for the gradient of a
    bias alone: what that needs a frozen x and weight for is not kept.
    Formulas: kernels/README.md.

    Raises TypeError for a dtype that is not floating point or mixed dtypes, ValueError for shapes or devices that do
    not fit, an unknown activation, loss or reduction, or a target or row_weight that requires a gradient, RuntimeError
    under TorchScript or if the backend cannot run here. Where kernels do not apply, PyTorch's own ops compute it (see
    `linear_act`).
    """
    tensors = x, weight, bias, target, row_weight
    if has_torch_function_variadic(*tensors):
        args = x, weight, bias, target, activation, loss, reduction, row_weight
        result: Tensor = handle_torch_function(linear_act_loss, tensors, *args)
        return result
    kind = MSE if loss == "mse" else _kind(likelihood_of(loss, "linear_act_loss: loss"))
    return _linear_act_loss("linear_act_loss", tensors, activation, kind, reduction)


def linear_act_mse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    activation: str = "identity",
    reduction: str = "mean",
    row_weight: Tensor | None = None,
) -> Tensor:
    """`linear_act_loss` by squared error: mse_loss(linear_act(x, weight, bias, activation), target) in one kernel."""
    tensors = x, weight, bias, target, row_weight
    if has_torch_function_variadic(*tensors):
        args = x, weight, bias, target, activation, reduction, row_weight
        result: Tensor = handle_torch_function(linear_act_mse, tensors, *args)
        return result
    return _linear_act_loss("linear_act_mse", tensors, activation, MSE, reduction)


_NAMES, _OPTIONAL = ("x", "weight", "bias", "target", "row_weight"), ("bias", "row_weight")


def _linear_act_loss(
    function: str, tensors: tuple[Tensor | None, ...], activation: str, kind: LossKind, reduction: str
) -> Tensor:
    (x, weight, bias, target, row_weight), supported = admit(function, _NAMES, tensors, _OPTIONAL)
    _check(function, x, weight, bias, target, activation, reduction, row_weight)
    if not supported:
        return _eager(x, weight, bias, target, row_weight, activation, kind, reduction)
    backend = _backend.resolve(x, weight.shape[1], x.shape[0] * weight.numel(), loss=True)
    if backend == "torch" and x.dtype.itemsize > 2:  # the twin would do the same through a Function of Python
        return _eager(x, weight, bias, target, row_weight, activation, kind, reduction)
    # Inside Function.forward gradients are always off, and needs_input_grad ignores no_grad: decide here what is saved.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        loss: Tensor = _LinearActLossFunction.apply(
            x, weight, bias, target, row_weight, activation, kind, reduction, backend
        )
        return loss
    loss, _ = _ops.direct(_ops.linear_act_loss, backend)(
        x, weight, bias, target, activation, *kind, reduction, row_weight, False, backend
    )
    return loss


linear_act_loss.__prepare_scriptable__ = partial(refuse_torchscript, "linear_act_loss")  # type: ignore[attr-defined]
linear_act_mse.__prepare_scriptable__ = partial(refuse_torchscript, "linear_act_mse")  # type: ignore[attr-defined]
