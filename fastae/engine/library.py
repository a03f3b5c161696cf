"""Whole stacks of layers as `torch.library` ops: `torch.ops.fastae.stack_*`, with meta functions for tracing. Private.

`kind` and `setting` name the loss, squared error by default.
"""

from __future__ import annotations

import torch
from fastae_kernels.elementwise import ACTIVATIONS, LossKind
from fastae_kernels.ops import Criterion
from torch import Tensor

from fastae.engine import schedule
from fastae.engine.stages import DenseStage, Kept, Place
from fastae.nn.backend import ops
from fastae.nn.library import define, loss_dtype, or_empty


def _stages(
    weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backends: list[str],
    needs: list[bool] | None = None,
) -> list[DenseStage]:  # fmt: skip
    given = [True] * (2 * len(weights)) if needs is None else needs
    layers = zip(weights, biases, activations, backends, given[::2], given[1::2], strict=True)
    return [DenseStage(ops(backend), w, b, name, (dw, db)) for w, b, name, backend, dw, db in layers]


def _stack_loss(
    x: Tensor, target: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str],
    backends: list[str], below: bool, kind: str = "mse", setting: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    stages = _stages(weights, biases, activations, backends)
    places = [Place() for _ in stages]
    done = schedule.forward(stages, x, target, Criterion(LossKind(kind, setting)), places, below)
    hidden = done.kept[:-1]
    return done.loss, done.dp, or_empty(done.dx, x), [k.y for k in hidden], [or_empty(k.p, x) for k in hidden]


def _stack_loss_fake(
    x: Tensor, target: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str],
    backends: list[str], below: bool, kind: str = "mse", setting: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    outputs = [x.new_empty((x.shape[0], w.shape[0])) for w in weights]
    kept = [
        torch.empty_like(y) if below and ACTIVATIONS[name].saves == "p" else x.new_empty(0)
        for y, name in zip(outputs[:-1], activations, strict=False)
    ]
    made = _makes_dx(weights, backends, below)
    dx = torch.empty_like(outputs[-2]) if made else x.new_empty(0)
    return x.new_empty((), dtype=loss_dtype(x)), outputs[-1], dx, outputs[:-1], kept


def _makes_dx(weights: list[Tensor], backends: list[str], below: bool) -> bool:
    w = weights[-1]
    return below and len(weights) > 1 and ops(backends[-1]).fits_decoder(w.shape[1], w.dtype)


def _stack_loss_backward(
    dp: Tensor, dx: Tensor, x: Tensor, outputs: list[Tensor], kept: list[Tensor], weights: list[Tensor],
    activations: list[str], backends: list[str], needs: list[bool], scale: Tensor, need_dinput: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    stages = _stages(weights, [None] * len(weights), activations, backends, needs)
    inputs = [x, *outputs]
    states = [Kept(h, y, p) for h, y, p in zip(inputs, [*outputs, dp], [*kept, None], strict=True)]
    made = dx if _makes_dx(weights, backends, dx.numel() > 0) else None
    state = schedule.ForwardState(scale, dp, made, states)
    places = [Place() for _ in stages]
    dinput, grads = schedule.backward(state, stages, places, scale, ops(_adds(backends)), need_dinput)
    return or_empty(dinput, x), [or_empty(grad, x) for pair in grads for grad in pair]


def _adds(backends: list[str]) -> str:
    """The backend that sums what the kernels leave."""
    return "triton" if "triton" in backends else "torch"


def _stack_loss_backward_fake(
    dp: Tensor, dx: Tensor, x: Tensor, outputs: list[Tensor], kept: list[Tensor], weights: list[Tensor],
    activations: list[str], backends: list[str], needs: list[bool], scale: Tensor, need_dinput: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    shapes = [shape for w in weights for shape in (w.shape, w.shape[:1])]
    grads = [x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]
    return x.new_empty(x.shape if need_dinput else 0), grads


def _stack_score(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str,
    kind: str = "mse", setting: float = 0.0, parameter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    layers = tuple(weights), tuple(biases), tuple(activations)
    return ops(backend).stack_score(x, *layers, LossKind(kind, setting), parameter)


def _stack_score_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str,
    kind: str = "mse", setting: float = 0.0, parameter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], dtype=loss_dtype(x))


def _stack_encode(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    return ops(backend).stack_encode(x, tuple(weights), tuple(biases), tuple(activations))


def _stack_encode_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], activations: list[str], backend: str
) -> Tensor:
    return x.new_empty((x.shape[0], weights[-1].shape[0]))


stack_loss = define(
    "stack_loss(Tensor x, Tensor target, Tensor[] weights, Tensor?[] biases, str[] activations, str[] backends, "
    'bool below, str kind="mse", float setting=0.0) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])',
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
    "stack_score(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend, "
    'str kind="mse", float setting=0.0, Tensor? parameter=None) -> Tensor',
    _stack_score,
    _stack_score_fake,
)
stack_encode = define(
    "stack_encode(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, str backend) -> Tensor",
    _stack_encode,
    _stack_encode_fake,
)
