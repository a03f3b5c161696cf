"""A whole stack of layers and its loss as one `autograd.Function`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastae_kernels.reference import DIFFERENTIABLE
from torch import Tensor

from fastae.engine import library as _stack_ops
from fastae.engine.schedule import Plan
from fastae.nn import library as _ops


def stack_loss(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: Plan,
) -> Tensor:
    """The mean squared error of the stack's output for x [M, K] against target [M, N], which gets no gradient: []."""
    activations, backends = list(plan.activations), list(plan.backends)
    parameters = [t for pair in zip(weights, biases, strict=True) for t in pair]
    # Inside Function.forward gradients are always off, and needs_input_grad ignores no_grad: decide here what is saved.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        loss: Tensor = _StackLossFunction.apply(x, target, activations, backends, *parameters)
        return loss
    h = _hidden(x, weights[:-1], biases[:-1], plan)
    loss, _ = _ops.linear_act_mse(
        h, weights[-1], biases[-1], target, activations[-1], "mean", None, False, backends[-1]
    )
    return loss


def stack_score(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], plan: Plan) -> Tensor:
    """Each row's mean squared error after all layers, [M, K] -> [M]; no gradient."""
    if backend := plan.whole(weights):
        return _stack_ops.stack_score(x, weights, biases, list(plan.activations), backend)
    h = _hidden(x, weights[:-1], biases[:-1], plan)
    last = plan.activations[-1], "none", None, False, plan.backends[-1]
    errors, _ = _ops.linear_act_mse(h, weights[-1], biases[-1], x, *last)
    return errors


def stack_encode(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], plan: Plan) -> Tensor:
    """The rows of x [M, K] after all layers, [M, N]; no gradient."""
    if backend := plan.whole(weights):
        return _stack_ops.stack_encode(x, weights, biases, list(plan.activations), backend)
    return _hidden(x, weights, biases, plan)


def _hidden(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], plan: Plan) -> Tensor:
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x, _ = _ops.linear_act_fwd(x, w, b, plan.activations[layer], False, plan.backends[layer])
    return x


class _StackLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, activations: list[str], backends: list[str], *parameters: Tensor | None
    ) -> Tensor:
        weights, biases = list(parameters[::2]), list(parameters[1::2])
        below = any(ctx.needs_input_grad[:1] + ctx.needs_input_grad[4:-2])
        loss, dp, dx, outputs, kept = _stack_ops.stack_loss(x, target, weights, biases, activations, backends, below)
        ctx.save_for_backward(x, target, dp, dx, *outputs, *kept, *parameters)
        ctx.activations, ctx.backends = activations, backends
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        activations, backends, lower = ctx.activations, ctx.backends, len(ctx.activations) - 1
        x, target, dp, dx, *rest = ctx.saved_tensors
        outputs, kept, parameters = rest[:lower], rest[lower : 2 * lower], rest[2 * lower :]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            return _differentiable_backward(ctx, grad_output, x, target, parameters)
        needs = list(ctx.needs_input_grad[4:])
        scale = grad_output * (2 / max(dp.numel(), 1))
        dinput, grads = _stack_ops.stack_loss_backward(
            dp, dx, x, outputs, kept, parameters[::2], activations, backends, needs, scale, ctx.needs_input_grad[0]
        )
        wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return dinput if ctx.needs_input_grad[0] else None, None, None, None, *wanted


def _differentiable_backward(
    ctx: Any, grad_output: Tensor, x: Tensor, target: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The same gradients, recomputed from PyTorch's differentiable ops."""
    # Views, so that one tensor in several places (tied weights) gets a gradient for each place.
    leaves = [None if t is None else t.view_as(t) for t in (x, *parameters)]
    y = leaves[0]
    for activation, w, b in zip(ctx.activations, leaves[1::2], leaves[2::2], strict=True):
        y = DIFFERENTIABLE[activation](F.linear(y, w, b))  # type: ignore[arg-type]
    assert y is not None
    wide = torch.promote_types(y.dtype, torch.float32)
    needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
    wanted = [t for t, need in zip(leaves, needs, strict=True) if t is not None and need]
    loss = F.mse_loss(y.to(wide), target.to(wide))
    found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    dx, *grads = (next(found) if t is not None and need else None for t, need in zip(leaves, needs, strict=True))
    return dx, None, None, None, *grads
