"""The stages of a step, bound to an implementation and to the memory of their parameters.

A gradient between stages lacks the loss's scale u; each weight gradient multiplies by it in its accumulator, so that no
fp16 gradient vanishes between layers and no multiplication is a pass of its own. An island of autograd needs true
gradients: below it the scale is in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from fastae_kernels.elementwise import ACTIVATIONS
from fastae_kernels.noise import Dropout, Key
from fastae_kernels.ops import Below, Criterion, Layer, Ops, Out, Pending
from fastae_kernels.reference import through_activation
from fastae_kernels.sampling import Penalty, Sampled, penalised, sample_bwd
from torch import Tensor, nn

from fastae.nn.thin_conv import ThinConv2d

Scale = Tensor | float | None
Gradients = tuple[Tensor | None, Tensor | None]  # dw, db
NOTHING_BELOW = Below(None, "identity")


@dataclass(eq=False, repr=False)
class Place:
    """Memory for the results of a stage on a number of rows; None for fresh ones."""

    y: Tensor | None = None
    p: Tensor | None = None
    dp: Tensor | None = None  # the gradient that reaches the stage
    scratch: Tensor | None = None  # of the last stage in half precision on a CPU: fp32 of dp's shape
    loss: Tensor | None = None  # [], of the last stage
    key: Key | None = None  # of the stage's random numbers
    beta: Tensor | None = None  # [], of a variational code: the factor of its divergence
    row_weight: Tensor | None = None  # [M], factors of the rows' divergence
    dparameter: Tensor | None = None  # of the last stage: the gradient by the loss's own parameter
    unit: float = 1.0  # what gradients lack: the loss's scale u


@dataclass(eq=False, repr=False)
class Kept:
    """Tensors that a stage's forward pass saves for its backward pass."""

    x: Tensor
    y: Tensor
    p: Tensor | None = None
    leaf: Tensor | None = None  # of an island: x as its graph has it
    made: Tensor | None = None  # of an island: its output, on which the graph hangs
    dropout: Dropout | None = None
    sampled: Sampled | None = None  # of a variational code, as are
    penalty: Penalty | None = None
    kl: Tensor | None = None  # partial sums over the rows
    slope: Tensor | None = None  # of a code with a penalty: that by z


class BoundStage(Protocol):
    """A stage as the schedule calls it."""

    needs: tuple[bool, bool]  # whether its weight and its bias, or any parameter, want a gradient

    def forward(self, x: Tensor, keep: bool, place: Place) -> Kept:
        """The output; with `keep`, what the backward pass needs."""
        ...

    def below(self, kept: Kept) -> Below:
        """The activation whose gradient the stage above folds into its own."""
        ...

    def loss(
        self, x: Tensor, target: Tensor, criterion: Criterion, below: Below | None, place: Place,
        pending: Pending | None,
    ) -> tuple[Tensor, Kept, Tensor, Tensor | None]:  # fmt: skip
        """The loss as the last stage: (loss, kept, dp, and dx of the stage `below` if it was made on the way)."""
        ...

    def backward(
        self, kept: Kept, dp: Tensor, dx: Tensor | None, scale: Scale, below: Below | None, out: Tensor | None,
        pending: Pending,
    ) -> tuple[Tensor | None, Scale, Gradients]:  # fmt: skip
        """The gradient for the stage `below` (None: not needed), the scale that it lacks, and those of parameters.

        dx: that gradient, if it is there already; `out`: its place.
        """
        ...


@dataclass(eq=False, repr=False)
class DenseStage:
    """f(x wT + b): the kernels' own."""

    ops: Ops
    w: Tensor
    b: Tensor | None
    activation: str
    needs: tuple[bool, bool] = (True, True)
    out: tuple[Tensor, Tensor | None] | None = None  # places of dw and db
    name: str = ""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.saves = ACTIVATIONS[self.activation].saves

    def forward(self, x: Tensor, keep: bool, place: Place) -> Kept:
        out = None if place.y is None else (place.y, place.p)
        keep_p = keep and self.saves == "p"
        if not self.dropout:
            y, p = self.ops.linear_act_fwd(x, self.w, self.b, self.activation, keep_p, out)
            return Kept(x, y, p)
        assert place.key is not None
        dropout = Dropout(self.dropout, place.key)
        y, p = self.ops.linear_act_fwd(x, self.w, self.b, self.activation, keep_p, out, dropout)
        return Kept(x, y, p, dropout=dropout)

    def below(self, kept: Kept) -> Below:
        return Below({"y": kept.y, "p": kept.p, None: None}[self.saves], self.activation, kept.dropout)

    def loss(
        self, x: Tensor, target: Tensor, criterion: Criterion, below: Below | None, place: Place,
        pending: Pending | None,
    ) -> tuple[Tensor, Kept, Tensor, Tensor | None]:  # fmt: skip
        layer = Layer(self.w, self.b, self.activation)
        drawn = below is not None and below.dropout is not None and below.dropout.key.drawn
        if below is not None and below.sampled is None and not drawn and self.makes_dx():
            loss, dp, dx = self.ops.decoder_loss(x, layer, target, criterion, below, place.dparameter, pending)
            return loss, Kept(x, dp), dp, dx
        out = Out(place.dp, place.loss, place.scratch, place.dparameter)
        loss, gradient = self.ops.linear_act_loss(x, layer, target, criterion, True, out, pending)
        assert gradient is not None
        return loss, Kept(x, gradient), gradient, None

    def makes_dx(self) -> bool:
        """Whether the loss makes the gradient of the stage below as well, in one kernel."""
        return self.ops.fits_decoder(self.w.shape[1], self.w.dtype)

    def backward(
        self, kept: Kept, dp: Tensor, dx: Tensor | None, scale: Scale, below: Below | None, out: Tensor | None,
        pending: Pending,
    ) -> tuple[Tensor | None, Scale, Gradients]:  # fmt: skip
        grads = weight_gradients(self.ops, dp, kept.x, self.needs, scale, self.out, pending)
        if below is not None and below.sampled is not None:
            # true gradients are those of a mean over the rows, and so is the divergence's
            sampled = below.sampled._replace(divisor=len(dp)) if scale is None else below.sampled
            dx = self.ops.linear_dgrad_sample(dp, self.w, sampled, out)
        elif below is not None and dx is None:
            dx = self.ops.linear_dgrad_act(dp, self.w, below.saved, below.activation, out, below.dropout)
        return dx, scale, grads


def weight_gradients(
    ops: Ops, dp: Tensor, x: Tensor, needs: tuple[bool, bool], scale: Scale, out: tuple[Tensor, Tensor | None] | None,
    pending: Pending,
) -> Gradients:  # fmt: skip
    """dw and db of a layer, as far as they are needed."""
    need_dw, need_db = needs
    if need_dw:
        return ops.linear_wgrad(dp, x, need_db, scale, out, pending)
    if not need_db:
        return None, None
    db = ops.act_bwd(dp, None, "identity", True)[1]
    assert db is not None
    return None, db if scale is None else db.mul_(scale)


def is_known(module: nn.Module) -> bool:
    """Whether it is PyTorch's own or ours, and not anybody's, which may do anything."""
    return type(module).__module__.startswith("torch.nn.") or type(module) is ThinConv2d


def run(call: Callable[[], object]) -> None:
    call()


@dataclass(eq=False, repr=False)
class ModuleStage:
    """Any module, by autograd, on memory of the step: its output and the gradient of its input have fixed places.

    apart: runs a call that the recording of a step must repeat as a whole.
    """

    ops: Ops
    module: nn.Module
    needs: tuple[bool, bool]
    needs_dx: bool  # whether a stage below wants a gradient
    autocast: torch.dtype | None = None  # the step's dtype where parameters have another
    name: str = ""
    apart: Callable[[Callable[[], object]], None] = field(default=run)

    def __post_init__(self) -> None:
        # PyTorch's own modules say so; of others nothing is known
        self.in_place = any(getattr(m, "inplace", False) or not is_known(m) for m in self.module.modules())

    def forward(self, x: Tensor, keep: bool, place: Place) -> Kept:
        assert place.y is not None
        kept = Kept(x, place.y)

        def call() -> None:
            leaf = x.detach().requires_grad_(self.needs_dx)
            cast = nullcontext() if self.autocast is None else torch.autocast(x.device.type, self.autocast)
            with torch.set_grad_enabled(self.needs_dx or any(self.needs)), cast:
                # a leaf must not be written over
                made = self.module(leaf.clone() if self.needs_dx and self.in_place else leaf)
            if not isinstance(made, Tensor) or made.shape != kept.y.shape:
                got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(
                    f"TrainStep: {self.name or 'the model'} must give a tensor {list(kept.y.shape)}; got {got}"
                )
            kept.made, kept.leaf = made, leaf
            kept.y.copy_(made.detach())

        self.apart(call)
        return kept

    def below(self, kept: Kept) -> Below:
        return NOTHING_BELOW

    def loss(
        self, x: Tensor, target: Tensor, criterion: Criterion, below: Below | None, place: Place,
        pending: Pending | None,
    ) -> tuple[Tensor, Kept, Tensor, Tensor | None]:  # fmt: skip
        kept = self.forward(x, below is not None, place)
        out = Out(place.dp, place.loss, None, place.dparameter)
        loss, dy = self.ops.loss(
            kept.y, target, criterion.kind, criterion.reduction, True, out, criterion.parameter, criterion.row_weight
        )
        assert dy is not None
        return penalised(loss, criterion.penalty, len(x)), kept, dy, None

    def backward(
        self, kept: Kept, dp: Tensor, dx: Tensor | None, scale: Scale, below: Below | None, out: Tensor | None,
        pending: Pending,
    ) -> tuple[Tensor | None, Scale, Gradients]:  # fmt: skip
        sampled = None if below is None else below.sampled
        result = kept.x.new_empty(kept.x.shape) if out is None or sampled is not None else out

        def call() -> None:
            made, leaf = kept.made, kept.leaf
            assert made is not None
            assert leaf is not None
            if made.requires_grad:
                torch.autograd.backward(made, dp.to(made.dtype) if scale is None else (dp * scale).to(made.dtype))
            kept.made = kept.leaf = None
            if below is not None:
                if leaf.grad is None:
                    result.zero_()
                else:
                    result.copy_(leaf.grad)

        self.apart(call)
        if below is None:
            return None, None, (None, None)
        if sampled is not None:
            return sample_bwd(result, sampled._replace(divisor=len(dp)), out), None, (None, None)
        return through_activation(result, below.saved, below.activation, below.dropout), None, (None, None)
