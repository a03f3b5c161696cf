"""The stage of a variational code, bound to an implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastae_kernels import sampling
from fastae_kernels.ops import Below, Criterion, Layer, Ops, Pending
from fastae_kernels.sampling import Penalty, Sampled
from torch import Tensor

from fastae.bottlenecks import Variational
from fastae.engine.stages import Gradients, Kept, Place, Scale, weight_gradients


@dataclass(eq=False, repr=False)
class SampleStage:
    """z = mu + sigma e of [mu | log sigma^2] = x wT + b, or of x itself where there is no w, and its divergence.

    The stage above makes the gradient by [mu | log sigma^2] from its own (`Below.sampled`).
    """

    ops: Ops
    part: Variational
    width: int
    w: Tensor | None = None
    b: Tensor | None = None
    needs: tuple[bool, bool] = (False, False)
    out: tuple[Tensor, Tensor | None] | None = None
    name: str = ""

    def forward(self, x: Tensor, keep: bool, place: Place) -> Kept:
        assert place.key is not None
        assert place.y is not None
        assert place.beta is not None
        shaped = self.part.capacity is not None or self.part.free_bits > 0
        sample = sampling.Sample(self.width, place.key, place.row_weight, shaped)
        if self.w is None:
            saved: tuple[Tensor, ...]
            p, (kl, saved) = x, sampling.sample(x, sample, place.y)
        else:
            assert place.p is not None
            _, p, kl, saved = self.ops.linear_sample(x, Layer(self.w, self.b, "identity"), sample, (place.y, place.p))
        slope, penalty = self._shaped(kl, len(x), place.beta) if shaped else (place.beta, Penalty(kl, place.beta))
        return Kept(x, place.y, sampled=Sampled(sample, p, slope, saved=saved), penalty=penalty, kl=kl)

    def _shaped(self, kl: Tensor, rows: int, beta: Tensor) -> tuple[Tensor, Penalty]:
        """The slope of the objective by KL, [] or [Z], and the penalty, from sums over the rows [R, Z]."""
        means = torch.sum(kl, 0, out=kl.new_empty(self.width)).mul_(1 / rows)
        if self.part.capacity is None:
            free = self.part.free_bits
            slope = torch.gt(means, free, out=torch.empty_like(means)).mul_(beta)
            paid = torch.clamp_min(means, free, out=torch.empty_like(means)).mul_(beta)
            return slope, Penalty(paid.mul_(rows))
        off = torch.sum(means, 0, keepdim=True, out=kl.new_empty(1)).sub_(self.part.capacity)
        slope = torch.sign(off, out=torch.empty_like(off)).mul_(beta)
        return slope.view(()), Penalty(torch.abs(off, out=torch.empty_like(off)).mul_(beta).mul_(rows))

    def below(self, kept: Kept) -> Below:
        return Below(None, "identity", None, kept.sampled)

    def loss(
        self, x: Tensor, target: Tensor, criterion: Criterion, below: Below | None, place: Place,
        pending: Pending | None,
    ) -> tuple[Tensor, Kept, Tensor, Tensor | None]:  # fmt: skip
        raise AssertionError("a code is not the last stage")

    def backward(
        self, kept: Kept, dp: Tensor, dx: Tensor | None, scale: Scale, below: Below | None, out: Tensor | None,
        pending: Pending,
    ) -> tuple[Tensor | None, Scale, Gradients]:  # fmt: skip
        if self.w is None:  # dp is the gradient by the output of the island below
            return dp, scale, (None, None)
        grads = weight_gradients(self.ops, dp, kept.x, self.needs, scale, self.out, pending)
        if below is not None:
            dx = self.ops.linear_dgrad_act(dp, self.w, below.saved, below.activation, out, below.dropout)
        return dx, scale, grads
