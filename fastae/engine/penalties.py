"""What the parts `L1`, `KLSparse` and `Contractive` raise a loss by, for autograd, and the stage of a code with one.

An island of autograd of its own: a code is narrow, and the batch's mean of `KLSparse` has to be there first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fastae_kernels.elementwise import ACTIVATIONS, accumulator
from fastae_kernels.ops import Below, Criterion, Ops, Pending
from fastae_kernels.reference import through_activation
from fastae_kernels.sampling import Penalty
from torch import Tensor

from fastae.bottlenecks import CodePenalty, Contractive, KLSparse
from fastae.engine.program import Contraction
from fastae.engine.stages import NOTHING_BELOW, Gradients, Kept, Place, Scale, run

EDGE = 1e-6  # how near to 0 or 1 a unit's mean counts: its logarithm stays finite
MOST_VALUES = 2**24  # of a Jacobian in memory


def code_penalty(part: CodePenalty, z: Tensor, row_weight: Tensor | None) -> Tensor:
    """The penalty of codes z [M, Z], each row's by its weight: [], differentiable by z."""
    z = z.to(accumulator(z))
    if isinstance(part, KLSparse):
        weighted = z if row_weight is None else z * row_weight.unsqueeze(1)
        rows = len(z) if row_weight is None else row_weight.sum().clamp(min=torch.finfo(z.dtype).tiny)
        mean = EDGE + (1 - 2 * EDGE) * weighted.sum(0) / rows
        on, off = part.rho, 1 - part.rho
        return part.c * (on * (on / mean).log() + off * (off / (1 - mean)).log()).sum()
    size = z.abs().sum(1)
    return part.c * (size if row_weight is None else size * row_weight).sum() / len(z)


def contraction(part: Contractive, layers: Sequence[Any], x: Tensor, row_weight: Tensor | None) -> Tensor:
    """c ||J||^2 of layers at x [M, K], each row's by its weight, the mean over the rows: [].

    layers: what has a weight, a bias and the name of an activation. Differentiable by the first two, in their dtype
    (fp32 for half precision). J = D_L W_L ... D_1 W_1, D = diag f'(p). ||A W_1||^2 is the trace of A (W_1 W_1T) AT
    where that is less work.
    """
    weights = [layer.weight.to(accumulator(layer.weight)) for layer in layers]
    slopes: list[Tensor] = []
    h = x.to(weights[0].dtype)
    for layer, w in zip(layers, weights, strict=True):
        p, f = F.linear(h, w, None if layer.bias is None else layer.bias.to(w.dtype)), ACTIVATIONS[layer.activation]
        slopes.append(f.slope(p))
        h = f.differentiable(p)
    if len(layers) == 1:
        squares = slopes[0].square() @ weights[0].square().sum(1)
    else:
        first, step = weights[0], rows_at_once(layers)
        gram = first @ first.t() if first.shape[0] < first.shape[1] else None
        rows = [_squares(weights, [s[i : i + step] for s in slopes], gram) for i in range(0, len(x), step)]
        squares = rows[0] if len(rows) == 1 else torch.cat(rows)
    return part.c * (squares if row_weight is None else squares * row_weight).sum() / len(x)


def rows_at_once(layers: Sequence[Any]) -> int:
    """How many rows' Jacobians may be in memory."""
    return max(1, MOST_VALUES // (max(layer.weight.shape[0] for layer in layers) * layers[-1].weight.shape[0]))


def _squares(weights: Sequence[Tensor], slopes: Sequence[Tensor], gram: Tensor | None) -> Tensor:
    """||J||^2 of some rows."""
    a = slopes[-1].unsqueeze(2) * weights[-1]  # [M, Z, N]
    for w, slope in zip(weights[-2:0:-1], slopes[-2:0:-1], strict=True):
        a = (a * slope.unsqueeze(1)) @ w
    a = a * slopes[0].unsqueeze(1)
    return ((a @ weights[0]).square() if gram is None else (a @ gram) * a).sum((1, 2))


@dataclass(eq=False, repr=False)
class PenaltyStage:
    """A code as it is, and its penalty; the activation of the stage below is undone here."""

    ops: Ops
    part: CodePenalty
    width: int
    needs: tuple[bool, bool] = (False, False)
    name: str = ""
    apart: Callable[[Callable[[], object]], None] = field(default=run)

    def forward(self, x: Tensor, keep: bool, place: Place) -> Kept:
        wide = accumulator(x)
        value, slope = x.new_empty(1, dtype=wide), x.new_empty(len(x), self.width, dtype=wide)

        def call() -> None:
            with torch.enable_grad():
                z = x[:, : self.width].detach().to(wide).requires_grad_()
                penalty = code_penalty(self.part, z, place.row_weight)
                slope.copy_(torch.autograd.grad(penalty, z)[0])
            value.copy_(penalty.detach() * len(x))

        self.apart(call)
        return Kept(x, x, penalty=Penalty(value), slope=slope.mul_(1 / place.unit))

    def below(self, kept: Kept) -> Below:
        return NOTHING_BELOW

    def loss(
        self, x: Tensor, target: Tensor, criterion: Criterion, below: Below | None, place: Place,
        pending: Pending | None,
    ) -> tuple[Tensor, Kept, Tensor, Tensor | None]:  # fmt: skip
        raise AssertionError("a code is not the last stage")

    def backward(
        self, kept: Kept, dp: Tensor, dx: Tensor | None, scale: Scale, below: Below | None, out: Tensor | None,
        pending: Pending,
    ) -> tuple[Tensor | None, Scale, Gradients]:  # fmt: skip
        if below is None:
            return None, scale, (None, None)
        assert kept.slope is not None
        dp[:, : self.width].add_(kept.slope)
        return through_activation(dp, below.saved, below.activation, below.dropout), scale, (None, None)


def add_contraction(
    of: Contraction, x: Tensor, row_weight: Tensor | None, places: dict[Tensor, Tensor], value: Tensor
) -> None:
    """Add the gradients of a contraction at x [M, K] to those in `places`, by parameter; `value` [1] = M times it."""
    wanted = [p for layer in of.layers for p in (layer.weight, layer.bias) if p is not None and p in places]
    value.zero_()
    step = rows_at_once(of.layers)
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        with torch.enable_grad():
            penalty = contraction(of.part, of.layers, x[rows], None if row_weight is None else row_weight[rows])
            made = torch.autograd.grad(penalty, wanted, allow_unused=True) if wanted else ()
        count = min(step, len(x) - first)
        for p, grad in zip(wanted, made, strict=True):
            if grad is not None:  # there is none by a bias before the identity
                places[p].add_(grad, alpha=count / len(x))
        value.add_(penalty.detach(), alpha=count)
