"""The kernels as `torch.library` ops: `torch.ops.fastae.*`, with fake implementations for tracing. Private to fastae.

Each op takes the implementation that is to run ("torch" or "triton") as its last argument, so that a call depends on
nothing but its arguments. An optional result that was not asked for comes back as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from fastae_kernels import reference
from torch import Tensor

_library = torch.library.Library("fastae", "DEF")


@cache
def _implementation(backend: str, stem: str, name: str) -> Callable[..., Any]:
    module = reference if backend == "torch" else import_module(f"fastae_kernels.{stem}")
    return getattr(module, name)


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _library.define(schema)
    name = schema.split("(", 1)[0]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastae::{name}", fake, lib=_library)
    return getattr(torch.ops.fastae, name).default


def _or_empty(optional: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if optional is None else optional


def _linear_act_fwd(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y, p = _implementation(backend, "linear_act", "linear_act_fwd")(x, w, b, activation, keep_p)
    return y, _or_empty(p, x)


def _linear_act_fwd_fake(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], w.shape[0]))
    return y, torch.empty_like(y) if keep_p else x.new_empty(0)


def _act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str) -> tuple[Tensor, Tensor]:
    dp, db = _implementation(backend, "linear_act", "act_bwd")(dy, saved, activation, need_db)
    return dp, _or_empty(db, dy)


def _act_bwd_fake(
    dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1] if need_db else 0)


def _linear_dgrad_act(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    dx: Tensor = _implementation(backend, "linear_act", "linear_dgrad_act")(dp, w, saved, activation)
    return dx


def _linear_dgrad_act_fake(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    return dp.new_empty((dp.shape[0], w.shape[1]))


def _linear_wgrad(dp: Tensor, x: Tensor, need_db: bool, backend: str) -> tuple[Tensor, Tensor]:
    dw, db = _implementation(backend, "linear_act", "linear_wgrad")(dp, x, need_db)
    return dw, _or_empty(db, dp)


def _linear_wgrad_fake(dp: Tensor, x: Tensor, need_db: bool, backend: str) -> tuple[Tensor, Tensor]:
    return dp.new_empty((dp.shape[1], x.shape[1])), dp.new_empty(dp.shape[1] if need_db else 0)


def _mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    loss, dinput = _implementation(backend, "mse_loss", "mse")(input, target, reduction, need_dinput)
    return loss, _or_empty(dinput, input)


def _mse_fake(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    return input.new_empty(()), input.new_empty(input.shape if need_dinput else 0)


linear_act_fwd = _define(
    "linear_act_fwd(Tensor x, Tensor w, Tensor? b, str activation, bool keep_p, str backend) -> (Tensor, Tensor)",
    _linear_act_fwd,
    _linear_act_fwd_fake,
)
act_bwd = _define(
    "act_bwd(Tensor dy, Tensor? saved, str activation, bool need_db, str backend) -> (Tensor, Tensor)",
    _act_bwd,
    _act_bwd_fake,
)
linear_dgrad_act = _define(
    "linear_dgrad_act(Tensor dp, Tensor w, Tensor? saved, str activation, str backend) -> Tensor",
    _linear_dgrad_act,
    _linear_dgrad_act_fake,
)
linear_wgrad = _define(
    "linear_wgrad(Tensor dp, Tensor x, bool need_db, str backend) -> (Tensor, Tensor)",
    _linear_wgrad,
    _linear_wgrad_fake,
)
mse = _define(
    "mse(Tensor input, Tensor target, str reduction, bool need_dinput, str backend) -> (Tensor, Tensor)",
    _mse,
    _mse_fake,
)
