"""y = f(x wT + b) in one kernel, with its backward pass: `linear_act` and the layer `LinearAct`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from fastae_kernels.elementwise import ACTIVATIONS
from fastae_kernels.operands import first_operand
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastae.nn import backend as _backend
from fastae.nn import library as _ops
from fastae.nn.arguments import admit, nearest, refuse_torchscript

# ---------------------------------------------------------------- checks


def check_activation(name: str, argument: str) -> str:
    """`name` if it is an activation, else a ValueError that lists them and names the nearest."""
    if name not in ACTIVATIONS:
        valid = ", ".join(ACTIVATIONS)
        raise ValueError(f"{argument} must be one of {valid}; got {name!r}{nearest(name, ACTIVATIONS)}")
    return name


def check_layer(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The shapes of weight and bias fit x [..., in_features]."""
    if weight.dim() != 2 or weight.size(1) != x.size(-1):  # size: a third of what shape takes
        raise ValueError(
            f"{function}: weight must be [out_features, {x.shape[-1]}] to match x {list(x.shape)}; "
            f"got {list(weight.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.size(0) != weight.size(0)):
        raise ValueError(
            f"{function}: bias must be [{weight.shape[0]}] to match weight {list(weight.shape)}; got {list(bias.shape)}"
        )


def eager(x: Tensor, w: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """The layer by PyTorch's own ops."""
    return ACTIVATIONS[activation].differentiable(F.linear(x, w, b))


# ---------------------------------------------------------------- autograd


class _LinearActFunction(torch.autograd.Function):
    """Returns (y, p), p being None where f' is taken from y.

    What the backward pass reads is an output of its own, so that it can be differentiated again without x, w and b.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, activation: str, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        saves = ACTIVATIONS[activation].eager_saves
        y, kept = _ops.direct(_ops.linear_act_fwd, backend)(x, w, b, activation, saves == "p", backend)
        p = kept if saves == "p" else None
        need_dx, need_dw, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_dw else None, w if need_dx else None, y if saves == "y" else p)
        ctx.activation, ctx.backend = activation, backend
        ctx.set_materialize_grads(False)
        return y, p

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, more_dp: Tensor | None) -> tuple[Tensor | None, ...]:
        """`more_dp` comes where a gradient has been differentiated: by way of the p that it was computed from."""
        x, w, saved = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        activation, backend = ctx.activation, ctx.backend
        if torch.is_grad_enabled():  # create_graph=True: by PyTorch's own ops
            dp = _sum(None if dy is None else _differentiable_dp(dy, saved, activation), more_dp)
            if dp is None:
                return None, None, None, None, None
            dx, dw = dp @ w if need_dx else None, dp.t() @ x if need_dw else None
            return dx, dw, dp.sum(0) if need_db else None, None, None
        dp, dx, dw, db = dy, None, None, None
        db_alone = need_db and not need_dw
        if dp is not None and (saved is not None or db_alone):
            fused = db_alone and more_dp is None
            dp, db = _ops.direct(_ops.act_bwd, backend)(dp, saved, activation, fused, backend)
        if more_dp is not None:
            dp = _sum(dp, more_dp)
            db = dp.sum(0) if db_alone else None
        if dp is None:
            return None, None, None, None, None
        if need_dx:
            dx = _ops.direct(_ops.linear_dgrad_act, backend)(dp, w, None, "identity", backend)
        if need_dw:
            dw, db = _ops.direct(_ops.linear_wgrad, backend)(dp, x, need_db, None, backend)
        return dx, dw, db if need_db else None, None, None


def _sum(first: Tensor | None, second: Tensor | None) -> Any:
    return second if first is None else first if second is None else first + second


def _differentiable_dp(dy: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """dy * f'(p) as a function of dy and of what is saved, y or p."""
    f = ACTIVATIONS[activation]
    if saved is None:
        return dy
    if f.from_y is not None:
        return f.from_y(dy, saved)
    p = saved.view_as(saved)
    (dp,) = torch.autograd.grad(f.differentiable(p), p, dy, create_graph=True)
    return dp


# ---------------------------------------------------------------- function


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """f(x weightT + bias): a linear layer and its activation in one kernel.

    Args:
        x: [..., in_features], any strides; fp32, fp16, bf16 or fp64.
        weight: [out_features, in_features], as in `torch.nn.Linear`; dtype and device of x.
        bias: [out_features] or None; dtype and device of x.
        activation: a name of `fastae_kernels.elementwise.ACTIVATIONS`: "relu", "gelu" (erf), "leaky_relu" (slope 0.01),
            "logit" (the inverse of sigmoid, its argument clamped to [1e-6, 1 - 1e-6]) and so on.

    Returns [..., out_features] in x's dtype. fp16 and bf16 accumulate in fp32 and round once; fp32 follows
    `torch.get_float32_matmul_precision()`. Under `torch.autocast` the arguments are cast as those of `F.linear` are.
    Differentiable twice. Where kernels do not apply, PyTorch's own ops compute it: under `torch.func` (`vmap`, `grad`,
    `jvp`) and forward-mode derivatives, for tensor subclasses (DTensor) and sparse or nested tensors, and in
    `torch.export`. Formulas: kernels/README.md.

    Raises TypeError for a dtype that is not floating point, mixed dtypes or DTensors among plain tensors, ValueError
    for shapes or devices that do not fit or an unknown activation, RuntimeError under TorchScript or if the backend is
    "triton" and cannot run here.
    """
    if has_torch_function_variadic(x, weight, bias):
        result: Tensor = handle_torch_function(linear_act, (x, weight, bias), x, weight, bias, activation)
        return result
    (x, weight, bias), supported = admit("linear_act", ("x", "weight", "bias"), (x, weight, bias), ("bias",))
    if activation not in ACTIVATIONS:
        check_activation(activation, "linear_act: activation")
    if x.dim() == 0:
        raise ValueError("linear_act: x must be [..., in_features]; got a scalar")
    check_layer("linear_act", x, weight, bias)
    if not supported:
        return eager(x, weight, bias, activation)
    backend = "torch" if _backend.leaves_to_torch(x) else ""
    backend = backend or _backend.resolve(x, weight.size(1), x.numel() * weight.size(0))
    if backend == "torch" or (backend == "onednn" and x.dtype != torch.float32):
        # The twins, which multiply the other types for oneDNN too, would do the same through a Function of Python
        if torch.compiler.is_compiling():
            return eager(x, weight, bias, activation)
        p, f = F.linear(first_operand(x), weight, bias), ACTIVATIONS[activation]
        return f.differentiable(p) if f.in_place is None else f.in_place(p)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    # Inside Function.forward gradients are always off, and needs_input_grad ignores no_grad: decide here what is saved.
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y, _ = _LinearActFunction.apply(rows, weight, bias, activation, backend)
    else:
        y, _ = _ops.direct(_ops.linear_act_fwd, backend)(rows, weight, bias, activation, False, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


linear_act.__prepare_scriptable__ = lambda: refuse_torchscript("linear_act")  # type: ignore[attr-defined]

# ---------------------------------------------------------------- module


class LinearAct(nn.Linear):
    """`torch.nn.Linear` followed by an activation, in one kernel; the same parameters, names and initial values.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        activation: as in `fastae.linear_act`.

    Shapes: [..., in_features] -> [..., out_features]. A state_dict is `nn.Linear`'s: weight [out_features, in_features]
    and bias [out_features]. Raises what `fastae.linear_act` raises.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = check_activation(activation, "LinearAct: activation")

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.weight, self.bias, self.activation)

    def __prepare_scriptable__(self) -> None:
        refuse_torchscript("LinearAct")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activation={self.activation!r}"
