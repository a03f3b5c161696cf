"""The last layer and its loss in one: the loss is taken in the accumulator, y is never stored.

Mathematics, shapes and dimension letters: `kernels/README.md`. What each launcher computes: `ops.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.elementwise import ACTIVATIONS
from fastae_kernels.jit import launch, tiles
from fastae_kernels.jit.activations import PAIRS
from fastae_kernels.jit.losses import LOSS_PAIRS, parameter_meta, parameter_partials, store_parameter_sums
from fastae_kernels.jit.random import dropout_tile, dropping, kept_of, state_of
from fastae_kernels.jit.sums import sum_partials
from fastae_kernels.jit.tile_ops import dot_tile, narrow, offsets, operand, plus_bias, row_sum, tile_of, workspace
from fastae_kernels.ops import Below, Criterion, Layer, Out, Pending


@triton.jit
def _counted_rows(mask_m, offs_m, counted_ptr):
    """The rows to read: below the counted ones, where those are given. Of the others nothing is read."""
    if counted_ptr is not None:
        mask_m = mask_m & (offs_m < tl.load(counted_ptr))
    return mask_m


@triton.jit
def _output_tile(
    p, target_ptr, offs_m, offs_n, mask, features, stride_tm, stride_tn,
    FORWARD: tl.constexpr, ACC: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """y = f(p), which has not been rounded, the target, and which of them count: columns below `features`, where that
    is given; if a SHARE of them does, those whose target is a number."""
    t = tl.load(target_ptr + offs_m[:, None] * stride_tm + offs_n[None, :] * stride_tn, mask=mask, other=0.0).to(ACC)
    counts = mask if features is None else mask & (offs_n < features)[None, :]
    if SHARE < 1:
        counts &= t == t
    return FORWARD(p), t, counts


@triton.jit
def _parameter_row(ptr, offs_n, mask_n, features, stride_an, ACC: tl.constexpr):
    """The loss's parameter of each column that counts, [1, N]."""
    mask = mask_n if features is None else mask_n & (offs_n < features)
    return tl.load(ptr + offs_n * stride_an, mask=mask, other=0.0).to(ACC)[None, :]


@triton.jit
def _denominator_of(
    denominator, counted_ptr, MEAN: tl.constexpr, PER_ROW: tl.constexpr, SHARE: tl.constexpr, ACC: tl.constexpr
):
    """Divisor of the sum; of a mean with rows counted in memory, `denominator` is that of one of them."""
    n = tl.cast(denominator, ACC)
    if MEAN and counted_ptr is not None:
        n = n * tl.load(counted_ptr).to(ACC)
    if SHARE < 1 and (MEAN or PER_ROW):
        n = n * tl.full((), SHARE, ACC)
    return n


@triton.jit
def _penalty(penalty_ptr, factor_ptr, parts, ROWS, BLOCK_PENALTY: tl.constexpr, ACC: tl.constexpr):
    """factor sum penalty[0 .. parts) / ROWS, in a fixed order, as [1]."""
    total = tl.zeros((BLOCK_PENALTY,), dtype=ACC)
    for first in range(0, parts, BLOCK_PENALTY):
        offs = first + tl.arange(0, BLOCK_PENALTY)
        total += tl.load(penalty_ptr + offs, mask=offs < parts, other=0.0).to(ACC)
    more = tl.sum(total[:, None], axis=0) / tl.cast(ROWS, ACC)
    if factor_ptr is not None:
        more *= tl.load(factor_ptr).to(ACC)
    return more


@triton.jit
def _store_sum(ptr, rows, penalty_ptr, factor_ptr, parts, ROWS, BLOCK_PENALTY: tl.constexpr, ACC: tl.constexpr):
    """The sum of [M], as a column: for sm_100, Triton 3.7 cannot compile the sum of a vector that comes from tl.dot.
    The first program's has the penalty in it, if there is one."""
    total = tl.sum(rows[:, None], axis=0)
    if penalty_ptr is not None:
        more = _penalty(penalty_ptr, factor_ptr, tl.where(tl.program_id(0) == 0, parts, 0), ROWS, BLOCK_PENALTY, ACC)
        total += more
    tl.store(ptr + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def _linear_act_loss_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, row_weight_ptr, counted_ptr, parameter_ptr, penalty_ptr, factor_ptr,
    loss_ptr, dp_ptr, dparameter_ptr, M, N, K, features, denominator, parts,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_tm, stride_tn, stride_rm, stride_an,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, FROM_P: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, PARAMETER: tl.constexpr, SETTING: tl.constexpr, SHARED: tl.constexpr,
    PER_ROW: tl.constexpr, MEAN: tl.constexpr, SHARE: tl.constexpr, BLOCK_PENALTY: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = sum row_weight VALUE(y, target) / denominator of one tile: [tiles], or PER_ROW [column tiles, M].
    dp = row_weight GRADIENT(y, target) f'(p), contiguous [M, N], and the sums of row_weight PARAMETER(y, target) are
    stored if their pointers are given.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_I, BLOCK_J, GROUP)
    offs_m, mask_m = offsets(pid_m, M, BLOCK_I)
    offs_n, mask_n = offsets(pid_n, N, BLOCK_J)
    read_m = _counted_rows(mask_m, offs_m, counted_ptr)
    p, _ = dot_tile(
        x_ptr, w_ptr, offs_m, read_m, offs_n, mask_n, 0, K,
        stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    if b_ptr is not None:
        p += tl.load(b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(ACC)[None, :]
    y, t, counts = _output_tile(
        p, target_ptr, offs_m, offs_n, read_m[:, None] & mask_n[None, :], features, stride_tm, stride_tn, FORWARD,
        ACC, SHARE,
    )  # fmt: skip
    a = None
    if parameter_ptr is not None:
        a = _parameter_row(parameter_ptr, offs_n, mask_n, features, stride_an, ACC)
    loss = row_sum(VALUE(y, t, a, SETTING), counts) / _denominator_of(
        denominator, counted_ptr, MEAN, PER_ROW, SHARE, ACC
    )
    dy = tl.where(counts, GRADIENT(y, t, a, SETTING), 0.0)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=read_m, other=0.0).to(ACC)
        loss *= row_weight
        dy *= row_weight[:, None]
    if dparameter_ptr is not None:
        da = tl.where(counts, PARAMETER(y, t, a, SETTING), 0.0)
        if row_weight_ptr is not None:
            da *= row_weight[:, None]
        store_parameter_sums(dparameter_ptr, da, tl.program_id(0), pid_m, offs_n, mask_n, N, SHARED)
    if PER_ROW:
        tl.store(loss_ptr + pid_n.to(tl.int64) * M + offs_m, loss, mask=mask_m)
    else:
        _store_sum(loss_ptr, loss, penalty_ptr, factor_ptr, parts, M, BLOCK_PENALTY, ACC)
    if dp_ptr is not None:
        dp = BACKWARD(dy, p if FROM_P else y)
        mask = mask_m[:, None] & mask_n[None, :]
        tl.store(dp_ptr + offs_m[:, None] * N + offs_n[None, :], narrow(dp, dp_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_dx(
    dx, first_k: tl.constexpr, saved_ptr, dx_ptr, state_ptr, offs_m, read_m, mask_m, K, stride_sm, stride_sk,
    BELOW: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The columns of dx from `first_k` on, a multiple of their number, through dropout and activation below."""
    BLOCK_K: tl.constexpr = dx.shape[1]
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64) + first_k
    mask_k = (offs_k < K)[None, :]
    if state_ptr is not None:
        dx *= dropout_tile(state_ptr, offs_m, first_k // BLOCK_K, BLOCK_K, DROPOUT, STREAM, ACC)
    if saved_ptr is not None:
        saved_ptrs = saved_ptr + offs_m[:, None] * stride_sm + offs_k[None, :] * stride_sk
        saved = tl.load(saved_ptrs, mask=read_m[:, None] & mask_k, other=0.0).to(ACC)
        if KEPT != 1:
            saved *= KEPT
        dx = BELOW(dx, saved)
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, narrow(dx, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k)


@triton.jit
def _decoder_loss_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, row_weight_ptr, counted_ptr, parameter_ptr, penalty_ptr, factor_ptr,
    saved_ptr, state_ptr, loss_ptr, dp_ptr, dparameter_ptr, dx_ptr, M, N, K, features, denominator, parts,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_tm, stride_tn, stride_rm, stride_sm, stride_sk,
    stride_an,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, FROM_P: tl.constexpr, BELOW: tl.constexpr,
    DROPOUT: tl.constexpr, STREAM: tl.constexpr, KEPT: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, PARAMETER: tl.constexpr, SETTING: tl.constexpr, SHARED: tl.constexpr,
    PER_ROW: tl.constexpr, MEAN: tl.constexpr, SHARE: tl.constexpr, BLOCK_PENALTY: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As above for a block of rows and all N, [row blocks] or PER_ROW [M]; and dx = (dp w) * f'(saved) of the layer
    below, contiguous [M, K]. x stays on chip, each tile of w serves both products. BLOCK_K covers K.
    """
    pid = tl.program_id(0)
    offs_m, mask_m = offsets(pid, M, BLOCK_M)
    read_m = _counted_rows(mask_m, offs_m, counted_ptr)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < K
    mask_mk = read_m[:, None] & mask_k[None, :]
    x = operand(tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask_mk, other=0.0))
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=read_m, other=0.0).to(ACC)
    loss = tl.zeros((BLOCK_M,), dtype=ACC)
    da_of_rows = tl.zeros((BLOCK_M,), dtype=ACC)
    dx = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for first_n in range(0, N, BLOCK_N):
        offs_n = tl.arange(0, BLOCK_N).to(tl.int64) + first_n
        mask_n = offs_n < N
        w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
        w = operand(tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0))
        p = tl.dot(x, tl.trans(w), input_precision=PRECISION, out_dtype=ACC)
        mask = mask_m[:, None] & mask_n[None, :]
        if b_ptr is not None:
            p = plus_bias(p, tl.load(b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(ACC), mask)
        y, t, counts = _output_tile(
            p, target_ptr, offs_m, offs_n, read_m[:, None] & mask_n[None, :], features, stride_tm, stride_tn,
            FORWARD, ACC, SHARE,
        )  # fmt: skip
        a = None
        if parameter_ptr is not None:
            a = _parameter_row(parameter_ptr, offs_n, mask_n, features, stride_an, ACC)
        loss += row_sum(VALUE(y, t, a, SETTING), counts)
        dy = tl.where(counts, GRADIENT(y, t, a, SETTING), 0.0)
        if row_weight_ptr is not None:
            dy *= row_weight[:, None]
        if dparameter_ptr is not None:
            da = tl.where(counts, PARAMETER(y, t, a, SETTING), 0.0)
            if row_weight_ptr is not None:
                da *= row_weight[:, None]
            if SHARED:
                da_of_rows += tl.sum(da, axis=1)
            else:
                store_parameter_sums(dparameter_ptr, da, pid, pid, offs_n, mask_n, N, False)
        dp = narrow(BACKWARD(dy, p if FROM_P else y), dp_ptr.dtype.element_ty)
        tl.store(dp_ptr + offs_m[:, None] * N + offs_n[None, :], dp, mask=mask)
        dx = tl.dot(operand(dp), w, dx, input_precision=PRECISION, out_dtype=ACC)
    loss = loss / _denominator_of(denominator, counted_ptr, MEAN, PER_ROW, SHARE, ACC)
    if row_weight_ptr is not None:
        loss *= row_weight
    if PER_ROW:
        tl.store(loss_ptr + offs_m, loss, mask=mask_m)
    else:
        _store_sum(loss_ptr, loss, penalty_ptr, factor_ptr, parts, M, BLOCK_PENALTY, ACC)
    if dparameter_ptr is not None and SHARED:
        _store_sum(dparameter_ptr, da_of_rows, None, None, 0, M, BLOCK_PENALTY, ACC)
    # In halves: gelu's derivative of all 256 columns at once spilled on sm_90
    HALF: tl.constexpr = BLOCK_K // 2
    left, right = tl.split(tl.permute(tl.reshape(dx, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    _store_dx(
        left, 0, saved_ptr, dx_ptr, state_ptr, offs_m, read_m, mask_m, K, stride_sm, stride_sk,
        BELOW, DROPOUT, STREAM, KEPT, ACC,
    )  # fmt: skip
    _store_dx(
        right, HALF, saved_ptr, dx_ptr, state_ptr, offs_m, read_m, mask_m, K, stride_sm, stride_sk,
        BELOW, DROPOUT, STREAM, KEPT, ACC,
    )  # fmt: skip


def _empty_loss(x: Tensor, M: int, reduction: str, dparameter: Tensor | None) -> Tensor:
    """The loss of no values: a sum of 0, a mean of NaN."""
    if dparameter is not None:
        dparameter.zero_()
    shape = (M,) if reduction == "none" else ()
    return workspace(x, *shape).fill_(0.0 if reduction == "sum" else float("nan"))


def _loss_and_partials(
    x: Tensor, partials: int, shape: tuple[int, ...], loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the [partials, *shape] numbers that add up to it: the loss itself if there is only one."""
    loss = workspace(x, *shape) if loss is None else loss
    return loss, loss if partials == 1 else workspace(x, partials, *shape)


def _denominator(M: int, N: int, criterion: Criterion) -> int:
    """Of the whole loss; of one of the counted rows, where those are in memory."""
    columns = criterion.kind.width(N if criterion.features is None else criterion.features)
    if criterion.reduction == "mean":
        return columns if criterion.counted is not None else M * columns
    return columns if criterion.reduction == "none" else 1


def _summed(
    loss: Tensor, partials: Tensor, dparameter: Tensor | None, parts: Tensor | None, pending: Pending | None
) -> Tensor:
    """The loss, and the gradient by its parameter: now, or once what `pending` holds is summed."""
    pairs = [] if partials is loss else [(partials, loss)]
    if parts is not None and dparameter is not None:
        pairs.append((parts, dparameter))
    if pending is not None:
        pending += pairs
    elif pairs:
        sum_partials(pairs)
    return loss


def _penalty_of(criterion: Criterion) -> tuple[Tensor | None, Tensor | None, int]:
    """Pointers to the parts and their factor, and how many parts."""
    penalty = criterion.penalty
    return (None, None, 0) if penalty is None else (penalty.partials, penalty.factor, penalty.partials.numel())


def _pairs(layer: Layer, criterion: Criterion) -> dict[str, object]:
    """The activation and the loss as the kernels take them."""
    value, gradient = LOSS_PAIRS[criterion.kind.name]
    forward, backward = PAIRS[layer.activation]
    return {
        "FORWARD": forward, "BACKWARD": backward, "FROM_P": ACTIVATIONS[layer.activation].saves == "p",
        "VALUE": value, "GRADIENT": gradient, "SETTING": criterion.kind.setting,
        **parameter_meta(criterion.kind, criterion.parameter),
        "PER_ROW": criterion.reduction == "none", "MEAN": criterion.reduction == "mean",
        "SHARE": criterion.share, "BLOCK_PENALTY": tiles.PENALTY_BLOCK,
    }  # fmt: skip


def linear_act_loss(
    x: Tensor,
    layer: Layer,
    target: Tensor,
    criterion: Criterion,
    need_dp: bool = False,
    out: Out | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor | None]:
    w, b, _ = layer
    (M, K), N, row_weight = x.shape, w.shape[0], criterion.row_weight
    memory = out or Out()
    dp = launch.output(x, (M, N), memory.dp) if need_dp else None
    if M * N == 0:
        return _empty_loss(x, M, criterion.reduction, memory.dparameter), dp
    tile = tiles.choose_loss(M, N, K, x, w, trained=criterion.parameter is not None)
    tiles_m, tiles_n = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.cols)
    per_row = criterion.reduction == "none"
    sums, shape = (tiles_n, (M,)) if per_row else (tiles_m * tiles_n, ())
    loss, partials = _loss_and_partials(x, sums, shape, memory.loss)
    penalty, factor, parts = _penalty_of(criterion)
    da = parameter_partials(x, memory.dparameter, tiles_m, tiles_m * tiles_n, N)
    launch.launch(
        _linear_act_loss_kernel, tiles_m * tiles_n, x,
        x, w, b, target, row_weight, criterion.counted, criterion.parameter, penalty, factor, partials, dp, da,
        M, N, K, criterion.features, _denominator(M, N, criterion), parts,
        *x.stride(), *w.stride(), 0 if b is None else b.stride(0), *target.stride(),
        0 if row_weight is None else row_weight.stride(0),
        **_pairs(layer, criterion), ACC=launch.accumulator(x.dtype), PRECISION=launch.dot_precision(x.dtype),
        **tile.meta(),
    )  # fmt: skip
    return _summed(loss, partials, memory.dparameter, da, pending), dp


def decoder_loss(
    x: Tensor,
    layer: Layer,
    target: Tensor,
    criterion: Criterion,
    below: Below,
    dparameter: Tensor | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    w, b, _ = layer
    (M, K), N, row_weight = x.shape, w.shape[0], criterion.row_weight
    saved, activation_below, dropout, _ = below
    penalty, factor, parts = _penalty_of(criterion)
    if K > tiles.DECODER_WIDTH:
        raise ValueError(f"decoder_loss: x must have at most {tiles.DECODER_WIDTH} columns; got [{M}, {K}]")
    dp, dx = x.new_empty((M, N)), x.new_empty((M, K))
    if M * N == 0:
        return _empty_loss(x, M, criterion.reduction, dparameter), dp, dx.zero_()
    tile = tiles.choose_decoder(M, N, K, x, w, trained=criterion.parameter is not None)
    per_row = criterion.reduction == "none"
    programs = triton.cdiv(M, tile.rows)
    loss, partials = _loss_and_partials(x, 1 if per_row else programs, (M,) if per_row else ())
    da = parameter_partials(x, dparameter, programs, programs, N)
    launch.launch(
        _decoder_loss_kernel, programs, x,
        x, w, b, target, row_weight, criterion.counted, criterion.parameter, penalty, factor, saved, state_of(dropout),
        partials, dp, da, dx, M, N, K, criterion.features, _denominator(M, N, criterion), parts,
        *x.stride(), *w.stride(), 0 if b is None else b.stride(0), *target.stride(),
        0 if row_weight is None else row_weight.stride(0), *((0, 0) if saved is None else saved.stride()),
        BELOW=PAIRS[activation_below][1], **dropping(dropout), KEPT=kept_of(dropout, activation_below),
        **_pairs(layer, criterion),
        ACC=launch.accumulator(x.dtype), PRECISION=launch.dot_precision(x.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _summed(loss, partials, dparameter, da, pending), dp, dx


def fits_decoder(K: int, dtype: torch.dtype) -> bool:
    """Whether `decoder_loss` keeps its registers: up to 256 columns, in fp64 (sm_90 spills beyond) up to 128."""
    return (128 if dtype == torch.float64 else tiles.DECODER_WIDTH) >= K
