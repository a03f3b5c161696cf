"""Losses whose gradient is computed in the same pass: `mse_loss` and `MSELoss`; which losses there are, by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fastae_kernels.elementwise import MSE, LossKind
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastae.likelihoods import PARTS, Likelihood, parsed
from fastae.nn import backend as _backend
from fastae.nn import library as _ops
from fastae.nn.arguments import (
    FLOATS,
    admit,
    autocast,
    autocast_dtype,
    nearest,
    refuse_torchscript,
    require_tensors,
    special,
)
from fastae.nn.log_likelihood import LOG_LIKELIHOODS
from fastae.nn.recompute import differentiable_gradients

REDUCTIONS = ("mean", "sum", "none")

# ---------------------------------------------------------------- checks


def check_reduction(reduction: str, argument: str) -> str:
    """`reduction` if there is one of that name, else a ValueError that lists them."""
    if reduction not in REDUCTIONS:
        valid = ", ".join(REDUCTIONS)
        raise ValueError(f"{argument} must be one of {valid}; got {reduction!r}{nearest(reduction, REDUCTIONS)}")
    return reduction


def likelihood_of(given: str | Likelihood, argument: str) -> Likelihood:
    """The part that a name ("huber", "huber:delta=2") or a part stands for.

    Raises ValueError for a name that there is not, TypeError for anything else.
    """
    if isinstance(given, str):
        name = given.partition(":")[0]
        if name not in PARTS:
            raise ValueError(f"{argument} must be one of {', '.join(PARTS)}; got {given!r}{nearest(name, PARTS)}")
        return parsed(given)
    if not isinstance(given, tuple(PARTS.values())):
        raise TypeError(f"{argument} must be a name or a part of fastae.likelihoods; got {given!r}")
    return given


def likelihood_beside(given: str | Likelihood, output_activation: str, model: str) -> Likelihood:
    """The part, beside an output activation that it allows: a log-likelihood has a mean function of its own."""
    part = likelihood_of(given, f"{model}: likelihood")
    if part.name in LOG_LIKELIHOODS and output_activation != "identity":
        raise ValueError(
            f"{model}: output_activation must be 'identity' beside likelihood {part.name!r}, which has a mean function "
            f"of its own; got {output_activation!r}"
        )
    return part


def kind_of(likelihood: Likelihood) -> LossKind:
    """How the kernels know it."""
    return LossKind(likelihood.name, likelihood.setting)


# ---------------------------------------------------------------- autograd


class _LossFunction(torch.autograd.Function):
    """On a kernel, which leaves its gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, kind: LossKind, reduction: str, backend: str) -> Tensor:
        loss, dinput = _ops.loss(_rows(input), _rows(target), *kind, reduction, True, backend)
        ctx.save_for_backward(input, target, dinput)
        ctx.kind, ctx.reduction = kind, reduction
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, dinput = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return *_again(ctx, input, target, grad_output), None, None, None
        return *_of_both(ctx, (dinput * grad_output).view(input.shape)), None, None, None


def _again(ctx: Any, input: Tensor, target: Tensor, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        return eager_loss(y, t, ctx.kind, ctx.reduction)

    return differentiable_gradients(loss, (input, target), ctx.needs_input_grad[:2], grad_output)


def _of_both(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    need_input, need_target = ctx.needs_input_grad[:2]
    return grad if need_input else None, -grad if need_target else None


def eager_loss(y: Tensor, t: Tensor, kind: LossKind, reduction: str, parameter: Tensor | None = None) -> Tensor:
    """The loss by PyTorch's own ops."""
    return kind.row.functional(y, t, parameter, kind.setting, reduction)


def row_losses(values: Tensor, kind: LossKind) -> Tensor:
    """The loss of each row from those of its values [..., features]: their mean or, of a log-likelihood, their sum."""
    return values.sum(-1) if kind.row.summed else values.mean(-1)


# `F.mse_loss` in bf16 on a CPU passes over the data again and again: 1.05 times the time of these three passes at
# 262,144 values, 1.7 at 1,024 x 784, 2.5 at 1,024 x 4,096. Below, a Function of Python costs more than it saves. In
# fp16 they would take twice as long, in fp32 1.2 times.
KEEP_VALUES, KEEP_ROWS = 1 << 18, 64


class _DifferenceFunction(torch.autograd.Function):
    """In bf16 on a CPU: the difference is kept, and is the gradient but for a factor."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str) -> Tensor:
        a, b = _rows(input), _rows(target)
        difference = torch.sub(a, b, out=a.new_empty(a.shape))
        # Summed in fp32, then each row's root is rounded: of 64 rows alike a quarter of what rounding the loss costs,
        # where one row holds all the error twice that
        norms = torch.linalg.vector_norm(difference, dim=1).float()
        ctx.kind, ctx.reduction = MSE, reduction
        ctx.denominator = input.numel() if reduction == "mean" else 1
        ctx.save_for_backward(input, target, difference)
        return torch.dot(norms, norms).div_(ctx.denominator).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, difference = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_again(ctx, input, target, grad_output), None
        # A factor of no dimension multiplies in its own fp32 on a CPU, and the result has the difference's dtype
        grad = (difference * (grad_output.float() * (2 / ctx.denominator))).view(input.shape)
        return *_of_both(ctx, grad), None


def _keeps_difference(input: Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == torch.bfloat16
        and input.numel() >= KEEP_VALUES
        and input.numel() // input.shape[-1] >= KEEP_ROWS
        and not torch.compiler.is_compiling()
    )


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1]) if t.dim() > 2 and t.numel() else t.reshape(1, -1)


# ---------------------------------------------------------------- function


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Mean squared error: mean (or sum) of (input - target)^2, its gradient computed in the same pass over the data.

    Args:
        input, target: the same shape and device; fp32, fp16, bf16 or fp64, any strides. Two dtypes are promoted to
            one, as in `F.mse_loss`.
        reduction: "mean", "sum", or "none" (elementwise; nothing to fuse, so it is `F.mse_loss` itself).
        weight: the input's shape, a factor of each square; "mean" divides by its sum. With one it is `F.mse_loss`.

    Returns a scalar (for "none" a tensor of the input's shape) in the input's dtype. The kernel subtracts and sums fp16
    and bf16 in fp32; on a CPU the difference is rounded first, as in `F.mse_loss`. Under `torch.autocast` the arguments
    are cast to fp32, as those of `F.mse_loss` are. Differentiable twice. Where kernels do not apply it is `F.mse_loss`
    (see `linear_act`).

    Raises TypeError if neither dtype is floating point or DTensors are among plain tensors; ValueError for shapes that
    differ (there is no broadcasting), devices that differ or an unknown reduction; RuntimeError under TorchScript.
    """
    if has_torch_function_variadic(input, target, weight):
        given = {} if weight is None else {"weight": weight}
        tensors = input, target, *given.values()
        result: Tensor = handle_torch_function(mse_loss, tensors, input, target, reduction, **given)
        return result
    if weight is not None:
        check_reduction(reduction, "mse_loss: reduction")
        require_tensors("mse_loss", input=input, target=target, weight=weight)
        if not input.shape == target.shape == weight.shape:
            got = f"{list(target.shape)} and {list(weight.shape)}"
            raise ValueError(f"mse_loss: target and weight must be {list(input.shape)} as input is; got {got}")
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    if special() or type(input) is not Tensor or type(target) is not Tensor or input.dtype is not target.dtype:
        require_tensors("mse_loss", input=input, target=target)
        if autocast_dtype(input) is not None or autocast_dtype(target) is not None:
            with torch.autocast(input.device.type, enabled=False):
                return mse_loss(autocast(input, torch.float32), autocast(target, torch.float32), reduction)
        if input.dtype != target.dtype:
            dtype = torch.promote_types(input.dtype, target.dtype)
            input, target = input.to(dtype), target.to(dtype)
    (input, target), supported = admit("mse_loss", ("input", "target"), (input, target))
    if reduction not in REDUCTIONS:
        check_reduction(reduction, "mse_loss: reduction")
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: target must be {list(input.shape)} as input is; got {list(target.shape)}")
    if not supported or reduction == "none":
        return F.mse_loss(input, target, reduction=reduction)
    backend = "torch" if _backend.leaves_losses_to_torch(input) else _backend.resolve(input)
    needs_grad = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    if backend in ("torch", "onednn"):  # nothing to fuse: the twin's passes would cost more than autograd's two
        if input.dtype is torch.bfloat16 and needs_grad and _keeps_difference(input):
            return _DifferenceFunction.apply(input, target, reduction)
        return F.mse_loss(input, target, reduction=reduction)
    if needs_grad:
        return _LossFunction.apply(input, target, MSE, reduction, backend)
    loss, _ = _ops.loss(_rows(input), _rows(target), *MSE, reduction, False, backend)
    return loss


mse_loss.__prepare_scriptable__ = lambda: refuse_torchscript("mse_loss")  # type: ignore[attr-defined]

# ---------------------------------------------------------------- module


class MSELoss(nn.MSELoss):
    """`torch.nn.MSELoss` on `fastae.mse_loss`: the same arguments and results.

    What the function refuses (shapes to be broadcast, integers, complex numbers) is left to PyTorch.

    Args:
        size_average, reduce: deprecated in PyTorch, which warns of them.
        reduction: "mean", "sum" or "none"; also where it stands first, `MSELoss("sum")`. Raises ValueError for any
            other.
    """

    def __init__(
        self, size_average: bool | str | None = None, reduce: bool | None = None, reduction: str = "mean"
    ) -> None:
        if isinstance(size_average, str):
            super().__init__(reduction=size_average)
        else:
            super().__init__(size_average, reduce, reduction)
        check_reduction(self.reduction, "MSELoss: reduction")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if (
            isinstance(input, Tensor)
            and isinstance(target, Tensor)
            and input.shape == target.shape
            and input.device == target.device
            and torch.promote_types(input.dtype, target.dtype) in FLOATS
        ):
            return mse_loss(input, target, self.reduction)
        return F.mse_loss(input, target, reduction=self.reduction)

    def __prepare_scriptable__(self) -> None:
        refuse_torchscript("MSELoss")

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
