"""Whole stacks of layers as `torch.library` ops: `torch.ops.fastae.stack_*`, with fake ones for tracing. Private."""

from __future__ import annotations

import torch
from torch import Tensor

from fastae.engine import schedule as _schedule
from fastae.nn.backend import op
from fastae.nn.library import define, loss_dtype, or_empty


def _stack_loss(
    x: Tensor, target: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str],
    backends: list[str], below: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    plan = _schedule.Plan(activations, backends)
    done = _schedule.forward(x, target, weights, biases, plan, _schedule.fresh(len(plan)), below)
    kept = [or_empty(p, x) for p in done.kept]
    return done.loss, done.dp, or_empty(done.dx, x), done.inputs[1:], kept


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
    return x.new_empty((), dtype=loss_dtype(x)), outputs[-1], dx, outputs[:-1], kept


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
    return or_empty(dinput, x), [or_empty(grad, x) for pair in grads for grad in pair]


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
    return x.new_empty(x.shape[0], dtype=loss_dtype(x))


def _stack_encode(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    code: Tensor = op(backend, "stack_encode")(x, tuple(weights), tuple(biases), tuple(activations))
    return code


def _stack_encode_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], weights[-1].shape[0]))


stack_loss = define(
    "stack_loss(Tensor x, Tensor target, Tensor[] weights, Tensor?[] biases, str[] activations, str[] backends, "
    "bool below) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
    _stack_loss,
    _stack_loss_fake,
)
stack_loss_backward = define(
    "stack_loss_backward(Tensor dp, Tensor dx, Tensor x, Tensor[] outputs, Tensor[] kept, Tensor[] weights, "
    "str[] activations, str[] backends, bool[] needs, Tensor scale, bool need_dinput) -> (Tensor, Tensor[])",
    _stack_loss_backward,
    _stack_loss_backward_fake,
)
stack_score = define(
    "stack_score(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor",
    _stack_score,
    _stack_score_fake,
)
stack_encode = define(
    "stack_encode(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor",
    _stack_encode,
    _stack_encode_fake,
)
