"""The kernels as `torch.library` ops: `torch.ops.fastae.*`, with fake implementations for tracing. Private to fastae.

Each op is told the implementation that is to run ("torch", "onednn" or "triton"), so that a call depends on nothing but
its arguments. An optional result that was not asked for comes back as an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastae import _schedule
from fastae._backend import op

_library = torch.library.Library("fastae", "DEF")


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
    y, p = op(backend, "linear_act_fwd")(x, w, b, activation, keep_p)
    return y, _or_empty(p, x)


def _linear_act_fwd_fake(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, keep_p: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], w.shape[0]))
    return y, torch.empty_like(y) if keep_p else x.new_empty(0)


def _act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str) -> tuple[Tensor, Tensor]:
    dp, db = op(backend, "act_bwd")(dy, saved, activation, need_db)
    return dp, _or_empty(db, dy)


def _act_bwd_fake(
    dy: Tensor, saved: Tensor | None, activation: str, need_db: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1] if need_db else 0)


def _linear_dgrad_act(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    dx: Tensor = op(backend, "linear_dgrad_act")(dp, w, saved, activation)
    return dx


def _linear_dgrad_act_fake(dp: Tensor, w: Tensor, saved: Tensor | None, activation: str, backend: str) -> Tensor:
    return dp.new_empty((dp.shape[0], w.shape[1]))


def _linear_wgrad(dp: Tensor, x: Tensor, need_db: bool, scale: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    dw, db = op(backend, "linear_wgrad")(dp, x, need_db, scale)
    return dw, _or_empty(db, dp)


def _linear_wgrad_fake(
    dp: Tensor, x: Tensor, need_db: bool, scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return dp.new_empty((dp.shape[1], x.shape[1])), dp.new_empty(dp.shape[1] if need_db else 0)


def _mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    loss, dinput = op(backend, "mse")(input, target, reduction, need_dinput)
    return loss, _or_empty(dinput, input)


def _mse_fake(input: Tensor, target: Tensor, reduction: str, need_dinput: bool, backend: str) -> tuple[Tensor, Tensor]:
    return input.new_empty(()), input.new_empty(input.shape if need_dinput else 0)


def _linear_act_mse(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = op(backend, "linear_act_mse")
    loss, dp, _ = run(x, w, b, target, activation, reduction, row_weight, need_dp)
    return loss, _or_empty(dp, x)


def _linear_act_mse_fake(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, activation: str, reduction: str,
    row_weight: Tensor | None, need_dp: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=_loss_dtype(x))
    return loss, x.new_empty((x.shape[0], w.shape[0]) if need_dp else 0)


def _stack_loss(
    x: Tensor, target: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str],
    backends: list[str], below: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    plan = _schedule.Plan(activations, backends)
    done = _schedule.forward(x, target, weights, biases, plan, _schedule.fresh(len(plan)), below)
    kept = [_or_empty(p, x) for p in done.kept]
    return done.loss, done.dp, _or_empty(done.dx, x), done.inputs[1:], kept


def _stack_loss_fake(
    x: Tensor, target: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str],
    backends: list[str], below: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    plan = _schedule.Plan(activations, backends)
    outputs = [x.new_empty((x.shape[0], w.shape[0])) for w in weights]
    kept = [
        torch.empty_like(y) if below and plan.saves[i] == "p" else x.new_empty(0) for i, y in enumerate(outputs[:-1])
    ]
    dx = torch.empty_like(outputs[-2]) if plan.makes_dx(weights[-1], below) else x.new_empty(0)
    return x.new_empty((), dtype=_loss_dtype(x)), outputs[-1], dx, outputs[:-1], kept


def _stack_loss_backward(
    dp: Tensor, dx: Tensor, x: Tensor, outputs: list[Tensor], kept: list[Tensor], weights: list[Tensor],
    activations: list[str], backends: list[str], needs: list[bool], scale: Tensor, need_dinput: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    plan = _schedule.Plan(activations, backends)
    made = _schedule.Activity(
        scale, dp, dx if plan.makes_dx(weights[-1], dx.numel() > 0) else None, [x, *outputs], list(kept)
    )
    pairs = list(zip(needs[::2], needs[1::2], strict=True))
    dinput, grads = _schedule.backward(made, weights, plan, _schedule.fresh(len(plan)), pairs, scale, need_dinput)
    return _or_empty(dinput, x), [_or_empty(grad, x) for pair in grads for grad in pair]


def _stack_loss_backward_fake(
    dp: Tensor, dx: Tensor, x: Tensor, outputs: list[Tensor], kept: list[Tensor], weights: list[Tensor],
    activations: list[str], backends: list[str], needs: list[bool], scale: Tensor, need_dinput: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    shapes = [shape for w in weights for shape in (w.shape, w.shape[:1])]
    grads = [x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]
    return x.new_empty(x.shape if need_dinput else 0), grads


def _stack_score(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    errors: Tensor = op(backend, "stack_score")(x, tuple(weights), tuple(biases), tuple(activations))
    return errors


def _stack_score_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_loss_dtype(x))


def _stack_encode(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    code: Tensor = op(backend, "stack_encode")(x, tuple(weights), tuple(biases), tuple(activations))
    return code


def _stack_encode_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], weights[-1].shape[0]))


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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
    "linear_wgrad(Tensor dp, Tensor x, bool need_db, Tensor? scale, str backend) -> (Tensor, Tensor)",
    _linear_wgrad,
    _linear_wgrad_fake,
)
mse = _define(
    "mse(Tensor input, Tensor target, str reduction, bool need_dinput, str backend) -> (Tensor, Tensor)",
    _mse,
    _mse_fake,
)
linear_act_mse = _define(
    "linear_act_mse(Tensor x, Tensor w, Tensor? b, Tensor target, str activation, str reduction, Tensor? row_weight, "
    "bool need_dp, str backend) -> (Tensor, Tensor)",
    _linear_act_mse,
    _linear_act_mse_fake,
)
stack_loss = _define(
    "stack_loss(Tensor x, Tensor target, Tensor[] weights, Tensor?[] biases, str[] activations, str[] backends, "
    "bool below) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    _stack_loss,
    _stack_loss_fake,
)
stack_loss_backward = _define(
    "stack_loss_backward(Tensor dp, Tensor dx, Tensor x, Tensor[] outputs, Tensor[] kept, Tensor[] weights, "
    "str[] activations, str[] backends, bool[] needs, Tensor scale, bool need_dinput) -> (Tensor, Tensor[])",
    _stack_loss_backward,
    _stack_loss_backward_fake,
)
stack_score = _define(
    "stack_score(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor",
    _stack_score,
    _stack_score_fake,
)
stack_encode = _define(
    "stack_encode(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor",
    _stack_encode,
    _stack_encode_fake,
)
