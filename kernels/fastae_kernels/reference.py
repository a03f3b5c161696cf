"""The plain-PyTorch twin of every kernel: `TORCH`, the reference, the path taken on a CPU, the benchmarks' baseline.

What each op computes is declared in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastae_kernels import noise, sampling
from fastae_kernels.elementwise import ACTIVATIONS, MSE, LossKind, accumulator
from fastae_kernels.noise import Corruption, Dropout
from fastae_kernels.operands import first_operand, rows_apart
from fastae_kernels.ops import Below, Criterion, Layer, Ops, Out, Pending
from fastae_kernels.sampling import Sample, Sampled

# What `rows_apart` does to the operands of a product
Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Reference:
    """Plain PyTorch ops; `Ops` says what they compute."""

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
        y_out, p_out = (None, None) if out is None else out
        p = _linear(x, w, b, p_out if keep_p else y_out)
        y = p if not keep_p else torch.empty_like(p) if y_out is None else y_out
        ACTIVATIONS[activation].forward(p, y)
        return noise.drop(y, dropout), p if keep_p else None

    def act_bwd(
        self, dy: Tensor, saved: Tensor | None, activation: str, need_db: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        dp = dy.new_empty(dy.shape)
        ACTIVATIONS[activation].backward(dy, dp if saved is None else saved, dp)
        return dp, dp.sum(0) if need_db else None  # ATen accumulates half precision in fp32

    def linear_dgrad_act(
        self,
        dp: Tensor,
        w: Tensor,
        saved: Tensor | None,
        activation: str,
        out: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        dp = first_operand(dp)
        dx = torch.mm(dp, w) if out is None else torch.mm(dp, w, out=out)
        return through_activation(dx, saved, activation, dropout)

    def linear_sample(
        self, x: Tensor, layer: Layer, sample: Sample, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        p, _ = self.linear_act_fwd(x, layer.w, layer.b, "identity", False, None if out is None else (out[1], None))
        z = x.new_empty(len(x), sample.width) if out is None else out[0]
        return z, p, *sampling.sample(p, sample, z)

    def linear_dgrad_sample(self, dp: Tensor, w: Tensor, sampled: Sampled, out: Tensor | None = None) -> Tensor:
        dz = dp.new_empty(len(dp), w.shape[1])
        return sampling.sample_bwd(self.linear_dgrad_act(dp, w, None, "identity", dz), sampled, out)

    def linear_wgrad(
        self,
        dp: Tensor,
        x: Tensor,
        need_db: bool = False,
        scale: Tensor | float | None = None,
        out: tuple[Tensor, Tensor | None] | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        dw, db = (dp.new_empty(dp.shape[1], x.shape[1]), None) if out is None else out
        if isinstance(scale, Tensor) and scale.device.type == "cpu":
            scale = scale.item()  # which waits for nothing there
        first = first_operand(dp.t())
        if isinstance(scale, float):
            torch.addmm(dw, first, x, beta=0, alpha=scale, out=dw)
        else:
            torch.mm(first, x, out=dw)
            if scale is not None:
                dw.mul_(scale)
        if not need_db:
            return dw, None
        db = dp.sum(0) if db is None else torch.sum(dp, 0, out=db)
        return dw, db if scale is None else db.mul_(scale)

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
        wide, memory = accumulator(input), out or Out()
        n = input.shape[0] * kind.width(input.shape[1]) if reduction == "mean" else 1
        dp, loss = (t if t is not None and t.dtype == wide else None for t in (memory.dp, memory.loss))
        gradient = input.new_empty(input.shape, dtype=wide) if dp is None else dp
        da = None if memory.dparameter is None else torch.empty_like(gradient)
        y, per_row = input.to(wide), row_weight is not None
        total = kind.row.evaluate(
            y, target, parameter, kind.setting, per_row, gradient, da, None if per_row else loss
        )  # fmt: skip
        if row_weight is not None:
            total = torch.sum(total.mul_(row_weight), 0)
            gradient.mul_(row_weight.unsqueeze(1))
        total = _placed(_mean(total, n), input.dtype, memory.loss)
        if da is not None:
            _sum_columns(da, row_weight, memory.dparameter).mul_(1 / n if n else 0.0)
        if not need_dinput:
            return total, None
        return total, _placed(gradient.mul_(kind.row.factor / n if n else 0.0), input.dtype, memory.dp)

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
        w, b, activation = layer
        wide, memory = accumulator(x), out or Out()
        alone = ACTIVATIONS[activation].saves is None  # nothing but dp comes out of p
        p_out = memory.scratch if wide != x.dtype else memory.dp if alone else None
        p = _linear(x.to(wide), w.to(wide), None if b is None else b.to(wide), p_out)
        loss, dp = act_loss(p, activation, target, criterion, need_dp, x.dtype, memory)
        return sampling.penalised(loss, criterion.penalty, len(x)), dp

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
        out = Out(dparameter=dparameter)
        loss, dp = self.linear_act_loss(x, layer, target, criterion, True, out)
        assert dp is not None
        dx = self.linear_dgrad_act(dp, layer.w, below.saved, below.activation, None, below.dropout)
        if criterion.counted is not None:
            dx[int(criterion.counted) :] = 0
        return loss, dp, dx

    def stack_score(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[str],
        kind: LossKind = MSE,
        parameter: Tensor | None = None,
    ) -> Tensor:
        criterion = Criterion(kind, "none", parameter=parameter)

        def scores(prepare: Prepare) -> Tensor:
            h, w = prepare(self.through(x, weights[:-1], biases[:-1], activations[:-1], prepare), weights[-1])
            return self.linear_act_loss(h, Layer(w, biases[-1], activations[-1]), x, criterion)[0]

        return rows_apart(x, scores)

    def stack_encode(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
    ) -> Tensor:
        return rows_apart(x, lambda prepare: self.through(x, weights, biases, activations, prepare))

    def through(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[str],
        prepare: Prepare,
    ) -> Tensor:
        """The rows of x after all layers, the operands of each product prepared."""
        for w, b, activation in zip(weights, biases, activations, strict=True):
            x, _ = self.linear_act_fwd(*prepare(x, w), b, activation)
        return x

    def sum_partials(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for src, dst in pairs:
            wide = src.sum(0, dtype=accumulator(src))
            within = [slice(0, min(n, m)) for n, m in zip(wide.shape, dst.shape, strict=True)]
            if dst.dim() and within[-1].stop < dst.shape[-1]:
                dst[..., within[-1].stop :][tuple(within[:-1])] = 0
            dst[tuple(within)] = wide[tuple(within)]

    def gather(
        self,
        source: Tensor,
        rows: Tensor | None,
        out: Tensor,
        corruption: Corruption | None = None,
        clean: Tensor | None = None,
        hide: bool = False,
    ) -> None:
        if corruption is not None:
            x = source if rows is None else source.index_select(0, rows)
            noise.corrupt(source, x, corruption, out)
            if clean is not None:
                clean.copy_(x)
                if hide:
                    noise.hide(clean, corruption)
        elif rows is None:
            out.copy_(source)
        elif source.dtype == out.dtype:
            torch.index_select(source, 0, rows, out=out)
        else:
            out.copy_(source.index_select(0, rows))

    def fits_decoder(self, K: int, dtype: torch.dtype) -> bool:
        return False  # two products either way

    def fits_stack(self, dims: Sequence[int], dtype: torch.dtype) -> bool:
        return True


def through_activation(dx: Tensor, saved: Tensor | None, activation: str, dropout: Dropout | None) -> Tensor:
    """dx, the gradient by a layer's outputs, written over by that by its p."""
    noise.drop(dx, dropout)
    if saved is None:
        return dx
    f = ACTIVATIONS[activation]
    if dropout is not None and f.saves == "y":  # what was dropped has no gradient any more
        saved = torch.mul(saved, 1 - dropout.share, out=torch.empty_like(saved))
    f.backward(dx, saved, dx)
    return dx


def act_loss(
    p: Tensor, activation: str, target: Tensor, criterion: Criterion, need_dp: bool, dtype: torch.dtype, out: Out
) -> tuple[Tensor, Tensor | None]:
    """Second half of `linear_act_loss`, from p [M, N] on, which it may write over; dp comes in `dtype`."""
    f = ACTIVATIONS[activation]
    if criterion.counted is not None:  # the others may hold NaN, which no factor of 0 takes away
        rows = min(int(criterion.counted), len(p))
        p[rows:] = 0
        if criterion.row_weight is not None:
            criterion = criterion._replace(row_weight=_inside(criterion.row_weight, rows))
    y = torch.empty_like(p) if f.saves == "p" else p
    f.forward(p, y)
    gradient = torch.empty_like(y) if need_dp and f.saves == "y" else y
    loss = evaluated(y, target, criterion, gradient, out)
    if not need_dp:
        return loss, None
    dp = gradient
    if criterion.row_weight is not None:
        dp.mul_(criterion.row_weight.unsqueeze(1))
    if f.saves is not None:
        f.backward(dp, p if f.saves == "p" else y, dp)
    return loss, _placed(dp, dtype, out.dp)


def evaluated(y: Tensor, target: Tensor, criterion: Criterion, gradient: Tensor, memory: Out) -> Tensor:
    """The reduced loss of y [M, N], in `memory.loss` if it is a scalar; dL/dy in units of the loss's factor, without
    row weights, into `gradient`, which may be y."""
    kind, reduction, row_weight, features, counted, share, _, a = criterion
    rows, columns = y.shape
    if share < 1:
        return _of_counted_values(y, target, criterion, gradient, memory)
    per_row = reduction == "none" or row_weight is not None
    out, wanted = None if per_row else memory.loss, memory.dparameter is not None
    if features is None and counted is None:
        da = torch.empty_like(y) if wanted else None
        total = kind.row.evaluate(y, target, a, kind.setting, per_row, gradient, da, out)
        if da is not None:
            _sum_columns(da, row_weight, memory.dparameter)
        return reduced(total, rows, columns, criterion, memory.loss)
    rows = rows if counted is None else min(int(counted), rows)
    columns = columns if features is None else min(features, columns)
    y, target = y[:rows, :columns].contiguous(), target[:rows, :columns].contiguous()
    inside, da = torch.empty_like(y), torch.empty_like(y) if wanted else None
    total = kind.row.evaluate(y, target, a, kind.setting, per_row, inside, da, out)
    gradient.zero_()[:rows, :columns] = inside
    if da is not None:
        _sum_columns(da, None if row_weight is None else row_weight[:rows], memory.dparameter)
    if per_row:
        whole = total.new_zeros(len(gradient))
        whole[:rows] = total
        total = whole
    return reduced(total, rows, columns, criterion, memory.loss)


def _sum_columns(da: Tensor, row_weight: Tensor | None, out: Tensor | None) -> Tensor:
    """The gradient by the loss's parameter, of each column or of all in one, from that of each value [M, N]."""
    assert out is not None
    if row_weight is not None:
        da.mul_(row_weight.unsqueeze(1))
    return torch.sum(da if out.numel() == da.shape[1] else da.view(-1, 1), 0, out=out)


def _of_counted_values(y: Tensor, target: Tensor, criterion: Criterion, gradient: Tensor, memory: Out) -> Tensor:
    """`evaluated` where targets are NaN that do not count: with 1/2 in their place on both sides, whose loss is then
    taken away."""
    kind, reduction, row_weight, features, counted, *_, a = criterion
    rows = len(y) if counted is None else min(int(counted), len(y))
    columns = y.shape[1] if features is None else min(features, y.shape[1])
    missing = target[:rows, :columns].isnan()
    p, t = (side[:rows, :columns].masked_fill(missing, 0.5) for side in (y, target))
    inside, da = torch.empty_like(p), None if memory.dparameter is None else torch.empty_like(p)
    sums = kind.row.evaluate(p, t, a, kind.setting, True, inside, da, None)
    half = y.new_full((columns, 1), 0.5)
    of_column = None if a is None else a.view(-1, 1)
    at_half = kind.row.evaluate(half, half, of_column, kind.setting, True, torch.empty_like(half), None, None)
    gradient.zero_()[:rows, :columns] = inside.masked_fill_(missing, 0)
    if da is not None:
        _sum_columns(da.masked_fill_(missing, 0), None if row_weight is None else row_weight[:rows], memory.dparameter)
    of_rows = y.new_zeros(len(y))
    of_rows[:rows] = sums - torch.mv(missing.to(y.dtype), at_half)
    total = of_rows if reduction == "none" or row_weight is not None else of_rows.sum()
    return reduced(total, rows, columns, criterion)


def _inside(t: Tensor, *sizes: int) -> Tensor:
    """t, 0 from these sizes on."""
    inside = tuple(map(slice, sizes))
    whole = t.new_zeros(t.shape)
    whole[inside] = t[inside]
    return whole


def reduced(total: Tensor, rows: int, columns: int, criterion: Criterion, out: Tensor | None = None) -> Tensor:
    """The loss from its sum [] or sums of rows [M], over that many rows and columns that count."""
    kind, reduction, row_weight, *_ = criterion
    width: float = kind.width(columns)
    if criterion.share < 1:
        width *= criterion.share
    if row_weight is not None:
        total = total.mul_(row_weight)
    if reduction == "none":
        return total.div_(width)
    if row_weight is not None:
        total = torch.sum(total, 0, out=out)
    return _mean(total, rows * width if reduction == "mean" else 1)


def _placed(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The result in `out`, where it may be already, or in `dtype`."""
    return result.to(dtype) if out is None else out if out is result else out.copy_(result)


def _mean(total: Tensor, n: float) -> Tensor:
    return total.div_(n) if n else total.fill_(float("nan"))  # the mean of nothing is NaN, as in torch


def _linear(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor | None) -> Tensor:
    x = first_operand(x)
    out = x.new_empty(x.shape[0], w.shape[0]) if out is None else out  # unlike F.linear, out= ops ignore autocast
    return torch.mm(x, w.t(), out=out) if b is None else torch.addmm(b, x, w.t(), out=out)


TORCH: Ops = Reference()
