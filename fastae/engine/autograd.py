"""A whole stack of dense layers and its loss as one `autograd.Function`; scores and codes of a stack in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from fastae_kernels.elementwise import LossKind
from torch import Tensor

from fastae.engine import library as _stack_ops
from fastae.engine.program import Dense
from fastae.nn import library as _ops
from fastae.nn.backend import decide, ops
from fastae.nn.linear_act import eager
from fastae.nn.losses import eager_loss
from fastae.nn.recompute import differentiable_gradients


class Stack(NamedTuple):
    """Dense layers, first to last, and the backend of each."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activations: list[str]
    backends: list[str]

    def fused_backend(self) -> str | None:
        """The backend that takes rows through all layers in one call, if one does."""
        if "triton" not in self.backends:
            return "onednn" if "onednn" in self.backends else "torch"
        dims = [self.weights[0].shape[1], *(w.shape[0] for w in self.weights)]
        fits = set(self.backends) == {"triton"} and ops("triton").fits_stack(dims, self.weights[0].dtype)
        return "triton" if fits else None


def stack_of(dense: Sequence[Dense], x: Tensor, loss: bool = True) -> Stack:
    """The layers on the backends that the dispatch chooses for x [M, K]; the `loss` is taken of the last."""
    rows, last = len(x), dense[-1]
    weights = [stage.weight.t() if stage.transposed else stage.weight for stage in dense]
    backends = [
        decide(x, w.shape[1], rows * w.numel(), loss and stage is last)[0]
        for w, stage in zip(weights, dense, strict=True)
    ]
    return Stack(weights, [stage.bias for stage in dense], [stage.activation for stage in dense], backends)


def stack_loss(x: Tensor, target: Tensor, stack: Stack, kind: LossKind) -> Tensor:
    """The mean loss of the stack's output for x [M, K] against target [M, N], which gets no gradient: []."""
    weights, biases, activations, backends = stack.weights, stack.biases, stack.activations, stack.backends
    parameters = [t for pair in zip(weights, biases, strict=True) for t in pair]
    # Inside Function.forward gradients are always off, and needs_input_grad ignores no_grad: decide here what is saved.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        loss: Tensor = _StackLossFunction.apply(x, target, activations, backends, kind, *parameters)
        return loss
    h = _hidden(x, stack, len(weights) - 1)
    loss, _ = _ops.linear_act_loss(
        h, weights[-1], biases[-1], target, activations[-1], *kind, "mean", None, False, backends[-1]
    )
    return loss


def stack_score(x: Tensor, stack: Stack, kind: LossKind, parameter: Tensor | None = None) -> Tensor:
    """Each row's mean loss against x after all layers, [M, K] -> [M]; no gradient."""
    if backend := stack.fused_backend():
        return _stack_ops.stack_score(x, stack.weights, stack.biases, stack.activations, backend, *kind, parameter)
    h = _hidden(x, stack, len(stack.weights) - 1)
    last = stack.activations[-1], *kind, "none", None, False, stack.backends[-1], parameter
    errors, _ = _ops.linear_act_loss(h, stack.weights[-1], stack.biases[-1], x, *last)
    return errors


def stack_encode(x: Tensor, stack: Stack) -> Tensor:
    """The rows of x [M, K] after all layers, [M, N]; no gradient."""
    if backend := stack.fused_backend():
        return _stack_ops.stack_encode(x, stack.weights, stack.biases, stack.activations, backend)
    return _hidden(x, stack, len(stack.weights))


def _hidden(x: Tensor, stack: Stack, layers: int) -> Tensor:
    for i in range(layers):
        layer = stack.weights[i], stack.biases[i], stack.activations[i], False, stack.backends[i]
        x, _ = _ops.linear_act_fwd(x, *layer)
    return x


class _StackLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, activations: list[str], backends: list[str], kind: LossKind,
        *parameters: Tensor | None,
    ) -> Tensor:  # fmt: skip
        weights, biases = list(parameters[::2]), list(parameters[1::2])
        below = any(ctx.needs_input_grad[:1] + ctx.needs_input_grad[5:-2])
        made = _stack_ops.stack_loss(x, target, weights, biases, activations, backends, below, *kind)
        loss, dp, dx, outputs, kept = made
        ctx.save_for_backward(x, target, dp, dx, *outputs, *kept, *parameters)
        ctx.activations, ctx.backends, ctx.kind = activations, backends, kind
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        activations, backends, lower = ctx.activations, ctx.backends, len(ctx.activations) - 1
        x, target, dp, dx, *rest = ctx.saved_tensors
        outputs, kept, parameters = rest[:lower], rest[lower : 2 * lower], rest[2 * lower :]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            loss = partial(_eager, target=target, activations=activations, kind=ctx.kind)
            wants = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
            again = differentiable_gradients(loss, (x, *parameters), wants, grad_output)
            return again[0], None, None, None, None, *again[1:]
        needs = list(ctx.needs_input_grad[5:])
        scale = grad_output * ctx.kind.scale(*dp.shape)
        dinput, made = _stack_ops.stack_loss_backward(
            dp, dx, x, outputs, kept, parameters[::2], activations, backends, needs, scale, ctx.needs_input_grad[0]
        )
        wanted = [grad if need else None for grad, need in zip(made, needs, strict=True)]
        return dinput if ctx.needs_input_grad[0] else None, None, None, None, None, *wanted


def _eager(x: Tensor, *parameters: Tensor | None, target: Tensor, activations: Sequence[str], kind: LossKind) -> Tensor:
    """The loss by PyTorch's own ops."""
    y = x
    for activation, w, b in zip(activations, parameters[::2], parameters[1::2], strict=True):
        assert w is not None
        y = eager(y, w, b, activation)
    wide = torch.promote_types(y.dtype, torch.float32)
    return eager_loss(y.to(wide), target.to(wide), kind, "mean")
