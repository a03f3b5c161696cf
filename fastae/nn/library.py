"""Kernels of a layer and a loss as `torch.library` ops: `torch.ops.fastae.*`, with meta functions for tracing. Private.

Each op takes the backend's name as an argument ("torch", "onednn" or "triton"), so that a call depends on nothing but
its arguments. An optional result that was not asked for comes back as an empty tensor. Names and schemas stay: graphs
that somebody saved call them; `mse` and `linear_act_mse` are `loss` and `linear_act_loss` of squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.ops import Criterion, Layer
from torch import Tensor

from fastae.nn.backend import ops

_library = torch.library.Library("fastae", "DEF")
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op and return its overload."""
    _library.define(schema)
    name = schema.split("(", 1)[0]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, fake, "Meta")
    op = getattr(torch.ops.fastae, name).default
    _IMPLEMENTATIONS[op] = implementation
    return op


def direct(op: Any, backend: str) -> Callable[..., Any]:
    """The callable for an op: its implementation where no dispatch mode is active; the dispatcher takes 6 us."""
    if backend == "triton" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return op
    return _IMPLEMENTATIONS.get(op, op)


def or_empty(optional: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if optional is None else optional


def loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _linear_act_fwd(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y, p = ops(backend).linear_act_fwd(x, w, b, activation, keep_p)
    return y, or_empty(p, x)


def _linear_act_fwd_fake(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], w.shape[0]))
    return y, torch.empty_like(y) if keep_p else x.new_empty(0)


def _act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str) -> tuple[Tensor, Tensor]:
    dp, db = ops(backend).act_bwd(dy, saved, activation, need_db)
    return dp, or_empty(db, dy)


def _act_bwd_fake(
    dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1] if need_db else 0)


def _linear_dgrad_act(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    return ops(backend).linear_dgrad_act(dp, w, saved, activation)


def _linear_dgrad_act_fake(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    return dp.new_empty((dp.shape[0], w.shape[1]))


def _linear_wgrad(dp: Tensor, x: Tensor, need_db: bool, scale: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dw, db = ops(backend).linear_wgrad(dp, x, need_db, scale)
    return dw, or_empty(db, dp)


def _linear_wgrad_fake(
    dp: Tensor, x: Tensor, need_db: bool, scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return dp.new_empty((dp.shape[1], x.shape[1])), dp.new_empty(dp.shape[1] if need_db else 0)


def _loss(
    input: Tensor, target: Tensor, kind: str, setting: float, reduction: str, need_dinput: bool, backend: str
) -> tuple[Tensor, Tensor]:
    loss, dinput = ops(backend).loss(input, target, LossKind(kind, setting), reduction, need_dinput)
    return loss, or_empty(dinput, input)


def _loss_fake(
    input: Tensor, target: Tensor, kind: str, setting: float, reduction: str, need_dinput: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return input.new_empty(()), input.new_empty(input.shape if need_dinput else 0)


def _mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _loss(input, target, *MSE, reduction, need_dinput, backend)


def _mse_fake(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _loss_fake(input, target, *MSE, reduction, need_dinput, backend)


def _linear_act_loss(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, kind: str, setting: float, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str, parameter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    criterion = Criterion(LossKind(kind, setting), reduction, row_weight, parameter=parameter)
    loss, dp = ops(backend).linear_act_loss(x, Layer(w, b, activation), target, criterion, need_dp)
    return loss, or_empty(dp, x)


def _linear_act_loss_fake(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, kind: str, setting: float, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str, parameter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=loss_dtype(x))
    return loss, x.new_empty((x.shape[0], w.shape[0]) if need_dp else 0)


def _linear_act_mse(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _linear_act_loss(x, w, b, target, activation, *MSE, reduction, row_weight, need_dp, backend)


def _linear_act_mse_fake(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _linear_act_loss_fake(x, w, b, target, activation, *MSE, reduction, row_weight, need_dp, backend)


linear_act_fwd = define(
    "linear_act_fwd(Tensor x, Tensor w, Tensor? b, str activation, bool keep_p, str backend) -> (Tensor, Tensor)",
    _linear_act_fwd,
    _linear_act_fwd_fake,
)
act_bwd = define(
    "act_bwd(Tensor dy, Tensor? saved, str activation, bool need_db, str backend) -> (Tensor, Tensor)",
    _act_bwd,
    _act_bwd_fake,
)
linear_dgrad_act = define(
    "linear_dgrad_act(Tensor dp, Tensor w, Tensor? saved, str activation, str backend) -> Tensor",
    _linear_dgrad_act,
    _linear_dgrad_act_fake,
)
linear_wgrad = define(
    "linear_wgrad(Tensor dp, Tensor x, bool need_db, Tensor? scale, str backend) -> (Tensor, Tensor)",
    _linear_wgrad,
    _linear_wgrad_fake,
)
loss = define(
    "loss(Tensor input, Tensor target, str kind, float setting, str reduction, bool need_dinput, str backend) "
    "-> (Tensor, Tensor)",
    _loss,
    _loss_fake,
)
mse = define(
    "mse(Tensor input, Tensor target, str reduction, bool need_dinput, str backend) -> (Tensor, Tensor)",
    _mse,
    _mse_fake,
)
linear_act_loss = define(
    "linear_act_loss(Tensor x, Tensor w, Tensor? b, Tensor target, str activation, str kind, float setting, "
    "str reduction, Tensor? row_weight, bool need_dp, str backend, Tensor? parameter=None) -> (Tensor, Tensor)",
    _linear_act_loss,
    _linear_act_loss_fake,
)
linear_act_mse = define(
    "linear_act_mse(Tensor x, Tensor w, Tensor? b, Tensor target, str activation, str reduction, Tensor? row_weight, "
    "bool need_dp, str backend) -> (Tensor, Tensor)",
    _linear_act_mse,
    _linear_act_mse_fake,
)
