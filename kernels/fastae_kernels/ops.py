"""The ops of the library, declared once: what every implementation (`reference`, `onednn`, `jit`) computes.

Letters: M rows, K in_features, N out_features; x [M, K], w [N, K], b [N], p = x wT + b, y = f(p), target t; gradients
dy, dp, dx, dw, db. The mathematics is in `kernels/README.md`. Tensors are 2-D and of one dtype; results are contiguous,
and fresh unless `out` is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.noise import Corruption, Dropout
from fastae_kernels.sampling import Penalty, Sample, Sampled

# (src [R, ...], dst): dst is still to become src.sum(0); `sum_partials` makes many of them in one launch
Pending = list[tuple[Tensor, Tensor]]


class Layer(NamedTuple):
    """f(x wT + b): w [N, K], b [N] or None, the name of f."""

    w: Tensor
    b: Tensor | None
    activation: str


class Below(NamedTuple):
    """The layer under another one: its activation, what that f' is written from (its y, its p, or nothing), and the
    dropout of its outputs: a y that is saved is what that has left. Or a code that was sampled, which
    `linear_dgrad_sample` takes."""

    saved: Tensor | None
    activation: str
    dropout: Dropout | None = None
    sampled: Sampled | None = None


class Criterion(NamedTuple):
    """A loss and how it is reduced: "mean" over all values, "sum", or "none": each row's mean [M].

    row_weight: [M] or None, a factor of each row's loss; a mean still divides by the number of values.
    features: the columns of y that count where rows of memory are longer; the others have no error.
    counted: [] int64 on the device, the rows that count: the others have no error, and a mean divides by these.
    share: below 1, values whose target is NaN do not count, and a mean divides by this share of the values.
    penalty: what the reduced loss is raised by.
    parameter: of a loss that has one, in fp32 (fp64 for fp64): of each column that counts [N], or of all [1].
    """

    kind: LossKind = MSE
    reduction: str = "mean"
    row_weight: Tensor | None = None
    features: int | None = None
    counted: Tensor | None = None
    share: float = 1.0
    penalty: Penalty | None = None
    parameter: Tensor | None = None


class Out(NamedTuple):
    """Memory for the results of a loss: dp [M, N], the scalar loss [], and fp32 of dp's shape to compute in.

    dparameter: for the gradient by the loss's parameter, in its shape and dtype, contiguous; it is made where there is
    a place for it. Like dp, it has the row weights in and lacks what dp lacks.
    """

    dp: Tensor | None = None
    loss: Tensor | None = None
    scratch: Tensor | None = None
    dparameter: Tensor | None = None


class Ops(Protocol):
    """One implementation of every op."""

    def linear_act_fwd(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        activation: str,
        keep_p: bool = False,
        out: tuple[Tensor, Tensor | None] | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """y = f(x wT + b) [M, N] or what `dropout` leaves of it, and p = x wT + b [M, N] if it is to be kept; `out` is
        for (y, p)."""
        ...

    def act_bwd(
        self, dy: Tensor, saved: Tensor | None, activation: str, need_db: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """dp = dy * f'(p) [M, N], and db = the sum of dp over the rows [N] if it is asked for."""
        ...

    def linear_dgrad_act(
        self,
        dp: Tensor,
        w: Tensor,
        saved: Tensor | None,
        activation: str,
        out: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """dx = (dp w) * f'(...) [M, K]: the gradient handed to the layer below, through its dropout and activation."""
        ...

    def linear_sample(
        self, x: Tensor, layer: Layer, sample: Sample, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """A variational code: z [M, Z], p = [mu | log sigma^2] = x wT + b [M, 2 Z], and partial sums over the rows of
        r KL, [R] or, of each latent, [R, Z]. `out` is for (z, p) and may have longer rows, which are 0 there. What an
        implementation has made on the way, and wants to see again in `Sampled.saved`, comes last."""
        ...

    def linear_dgrad_sample(self, dp: Tensor, w: Tensor, sampled: Sampled, out: Tensor | None = None) -> Tensor:
        """The gradient by p [M, 2 Z] of a code whose z is what dp [M, N] and w [N, Z] belong to, and of its KL."""
        ...

    def linear_wgrad(
        self,
        dp: Tensor,
        x: Tensor,
        need_db: bool = False,
        scale: Tensor | float | None = None,
        out: tuple[Tensor, Tensor | None] | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """dw = scale dpT x [N, K], and db = scale times the sum of dp over the rows [N] if it is asked for.

        `scale` is a number or a 0-d tensor on the device, multiplied in the accumulator: what a loss leaves out of dp.
        `out`, contiguous, is for (dw, db), in their own dtype; it may lack the last rows and columns, which are
        dropped. `pending` takes what is still to be summed for the results to be there; an implementation may leave
        nothing.
        """
        ...

    def loss(
        self,
        input: Tensor,
        target: Tensor,
        kind: LossKind,
        reduction: str,
        need_dinput: bool = False,
        out: Out | None = None,
        parameter: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of input [M, N] against target, summed, divided by the number of values for "mean" []; and its
        gradient by the input, in full. `out` is for both, the gradient as `dp`, and for that by the parameter;
        row_weight [M] as in `Criterion`."""
        ...

    def linear_act_loss(
        self,
        x: Tensor,
        layer: Layer,
        target: Tensor,
        criterion: Criterion,
        need_dp: bool = False,
        out: Out | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of y = f(x wT + b) against target [M, N], and dp [M, N].

        The loss is fp32, or fp64 for fp64. dp = row_weight dL/dy f'(p) lacks the loss's scale u (`LossKind.scale`),
        which `linear_wgrad` puts in: near convergence dp u is below the smallest fp16. y is compared before it is
        rounded. `out.dparameter` gets the sum over the rows of row_weight dL/da, once what is `pending` is summed.
        """
        ...

    def decoder_loss(
        self,
        x: Tensor,
        layer: Layer,
        target: Tensor,
        criterion: Criterion,
        below: Below,
        dparameter: Tensor | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`linear_act_loss` and, from its dp, dx = (dp w) * f'(...) of the layer below: (loss, dp [M, N], dx [M, K]).

        What `below` saved may be x itself. `dparameter` is the place that `Out` has for it.
        """
        ...

    def stack_score(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[str],
        kind: LossKind = MSE,
        parameter: Tensor | None = None,
    ) -> Tensor:
        """Each row's mean loss against x after all layers, [M, K] -> [M]; fp32, or fp64 for fp64."""
        ...

    def stack_encode(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
    ) -> Tensor:
        """The rows of x [M, K] after all layers, [M, N]."""
        ...

    def sum_partials(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """For each pair (src [R, ...], dst): dst = src.sum(0), summed in fp32 (fp64 for fp64) and rounded once.

        dst may be narrower or have fewer rows, which drops what is left over, or be wider, which fills it with 0.
        """
        ...

    def gather(
        self,
        source: Tensor,
        rows: Tensor | None,
        out: Tensor,
        corruption: Corruption | None = None,
        clean: Tensor | None = None,
        hide: bool = False,
    ) -> None:
        """out = source[rows], or source itself, in out's dtype; rows are int64 indices [M].

        With a corruption of these rows; `clean` is then filled with the rows as they are, or, to `hide` what `mask` has
        left, with NaN there.
        """
        ...

    def fits_decoder(self, K: int, dtype: torch.dtype) -> bool:
        """Whether `decoder_loss` gains over `linear_act_loss` and `linear_dgrad_act` for inputs of this width."""
        ...

    def fits_stack(self, dims: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether `stack_score` and `stack_encode` take layers of these widths (input, hidden ..., output)."""
        ...
