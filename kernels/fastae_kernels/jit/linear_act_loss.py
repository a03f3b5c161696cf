"""Decoder layer and mean squared error in one: the error is taken in the accumulator, y is stored only if asked.

Mathematics, shapes and dimension letters: `kernels/README.md`. Twins: `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import tiles
from fastae_kernels.jit.activations import PAIRS
from fastae_kernels.jit.sums import sum_rows
from fastae_kernels.jit.tile_ops import (
    dot_tile,
    narrow,
    offsets,
    operand,
    plus_bias,
    row_sum_of_squares,
    tile_of,
    workspace,
)
from fastae_kernels.reference import ACTIVATIONS, Pending

DECODER_WIDTH = 256  # the widest x of which `decoder_mse` keeps a block of rows on chip


@triton.jit
def _error_tile(
    p, target_ptr, offs_m, offs_n, mask, features, stride_tm, stride_tn,
    FORWARD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = f(p), and y - target, 0 outside the mask and from column `features` on, if that is given; the target is read
    here, and y has not been rounded."""
    target = tl.load(target_ptr + offs_m[:, None] * stride_tm + offs_n[None, :] * stride_tn, mask=mask, other=0.0)
    y = FORWARD(p)
    counts = mask if features is None else mask & (offs_n < features)[None, :]
    return y, tl.where(counts, y - target.to(ACC), 0.0)


@triton.jit
def _store_sum(ptr, rows):
    """The sum of [M], as a column: for sm_100, Triton 3.7 cannot compile the sum of a vector that comes from tl.dot."""
    tl.store(ptr + tl.arange(0, 1), tl.sum(rows[:, None], axis=0))


@triton.jit
def _linear_act_mse_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, row_weight_ptr, loss_ptr, dp_ptr, y_ptr, M, N, K, features, denominator,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_tm, stride_tn, stride_rm,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, FROM_P: tl.constexpr, PER_ROW: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """loss = sum row_weight (y - target)^2 / denominator of one tile: [tiles], or PER_ROW [column tiles, M].
    dp = row_weight (y - target) f'(p) and y are contiguous [M, N], each stored if its pointer is given.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_I, BLOCK_J, GROUP)
    offs_m, mask_m = offsets(pid_m, M, BLOCK_I)
    offs_n, mask_n = offsets(pid_n, N, BLOCK_J)
    p, _ = dot_tile(
        x_ptr, w_ptr, offs_m, mask_m, offs_n, mask_n, 0, K,
        stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    if b_ptr is not None:
        p += tl.load(b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(ACC)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y, error = _error_tile(p, target_ptr, offs_m, offs_n, mask, features, stride_tm, stride_tn, FORWARD, ACC)
    offs = offs_m[:, None] * N + offs_n[None, :]
    if y_ptr is not None:
        tl.store(y_ptr + offs, narrow(y, y_ptr.dtype.element_ty), mask=mask)
    loss = row_sum_of_squares(error, mask) / tl.cast(denominator, ACC)
    dy = error
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)
        loss *= row_weight
        dy *= row_weight[:, None]
    if PER_ROW:
        tl.store(loss_ptr + pid_n.to(tl.int64) * M + offs_m, loss, mask=mask_m)
    else:
        _store_sum(loss_ptr + tl.program_id(0), loss)
    if dp_ptr is not None:
        dp = BACKWARD(dy, p if FROM_P else y)
        tl.store(dp_ptr + offs, narrow(dp, dp_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_dx(
    dx, first_k: tl.constexpr, saved_ptr, dx_ptr, offs_m, mask_m, K, stride_sm, stride_sk,
    BELOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The columns of dx from `first_k` on, through the activation below."""
    BLOCK_K: tl.constexpr = dx.shape[1]
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64) + first_k
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offs_m[:, None] * stride_sm + offs_k[None, :] * stride_sk, mask=mask, other=0.0)
        dx = BELOW(dx, saved.to(ACC))
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decoder_mse_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, row_weight_ptr, saved_ptr, loss_ptr, dp_ptr, dx_ptr,
    M, N, K, features, denominator,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_tm, stride_tn, stride_rm, stride_sm, stride_sk,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, FROM_P: tl.constexpr, BELOW: tl.constexpr, PER_ROW: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As above for a block of rows and all N, [row blocks] or PER_ROW [M]; and dx = (dp w) * f'(saved) of the layer
    below, contiguous [M, K]. x stays on chip, each tile of w serves both products. BLOCK_K covers K.
    """
    pid = tl.program_id(0)
    offs_m, mask_m = offsets(pid, M, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < K
    mask_mk = mask_m[:, None] & mask_k[None, :]
    x = operand(tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk, mask=mask_mk, other=0.0))
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)
    loss = tl.zeros((BLOCK_M,), dtype=ACC)
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
        y, error = _error_tile(p, target_ptr, offs_m, offs_n, mask, features, stride_tm, stride_tn, FORWARD, ACC)
        loss += row_sum_of_squares(error, mask)
        dy = error
        if row_weight_ptr is not None:
            dy *= row_weight[:, None]
        dp = narrow(BACKWARD(dy, p if FROM_P else y), dp_ptr.dtype.element_ty)
        tl.store(dp_ptr + offs_m[:, None] * N + offs_n[None, :], dp, mask=mask)
        dx = tl.dot(operand(dp), w, dx, input_precision=PRECISION, out_dtype=ACC)
    loss = loss / tl.cast(denominator, ACC)
    if row_weight_ptr is not None:
        loss *= row_weight
    if PER_ROW:
        tl.store(loss_ptr + offs_m, loss, mask=mask_m)
    else:
        _store_sum(loss_ptr + pid, loss)
    # In halves: gelu's derivative of all 256 columns at once spilled on sm_90
    HALF: tl.constexpr = BLOCK_K // 2
    left, right = tl.split(tl.permute(tl.reshape(dx, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    _store_dx(left, 0, saved_ptr, dx_ptr, offs_m, mask_m, K, stride_sm, stride_sk, BELOW, ACC)
    _store_dx(right, HALF, saved_ptr, dx_ptr, offs_m, mask_m, K, stride_sm, stride_sk, BELOW, ACC)


def _empty_loss(x: Tensor, M: int, reduction: str) -> Tensor:
    """The loss of no values: a sum of 0, a mean of NaN."""
    shape = (M,) if reduction == "none" else ()
    return workspace(x, *shape).fill_(0.0 if reduction == "sum" else float("nan"))


def _loss_and_partials(
    x: Tensor, partials: int, shape: tuple[int, ...], loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and the [partials, *shape] numbers that add up to it: the loss itself if there is only one."""
    loss = workspace(x, *shape) if loss is None else loss
    return loss, loss if partials == 1 else workspace(x, partials, *shape)


def _denominator(M: int, features: int, reduction: str) -> int:
    return {"mean": M * features, "sum": 1, "none": features}[reduction]


def _summed(loss: Tensor, partials: Tensor, pending: Pending | None) -> Tensor:
    """The loss: now, or once what `pending` holds is summed."""
    if partials is loss:
        return loss
    if pending is None:
        return sum_rows(partials, loss)
    pending.append((partials, loss))
    return loss


def linear_act_mse(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    activation: str,
    reduction: str,
    row_weight: Tensor | None = None,
    need_dp: bool = False,
    need_y: bool = False,
    out: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    features: int | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The squared error of y = f(x wT + b) against target [M, N]; dp, and y [M, N] if it is to be kept.

    The loss is sum_ij row_weight_i (y - target)^2, divided by M N for "mean" []; for "none" each row's mean [M]. It is
    fp32, or fp64 for fp64. dp = row_weight (y - target) f'(p) [M, N] lacks the loss's 2 / n; `out`, contiguous, is
    for dp and the loss. Columns from `features` on are padding: their error is 0, and N counts the others. `pending`
    takes what is still to be summed for the loss to be there.
    """
    (M, K), N = x.shape, w.shape[0]
    dp_out, _, loss_out = (None, None, None) if out is None else out
    dp = tiles.output(x, (M, N), dp_out) if need_dp else None
    y = x.new_empty((M, N)) if need_y else None
    if M * N == 0:
        return _empty_loss(x, M, reduction), dp, y
    tile = tiles.choose(M, N, K, x, w, table=tiles.LOSS_TILES)
    tiles_m, tiles_n = triton.cdiv(M, tile.rows), triton.cdiv(N, tile.cols)
    per_row = reduction == "none"
    parts, shape = (tiles_n, (M,)) if per_row else (tiles_m * tiles_n, ())
    loss, partials = _loss_and_partials(x, parts, shape, loss_out)
    tiles.launch(
        _linear_act_mse_kernel, tiles_m * tiles_n, x,
        x, w, b, target, row_weight, partials, dp, y, M, N, K, features, _denominator(M, features or N, reduction),
        *x.stride(), *w.stride(), 0 if b is None else b.stride(0), *target.stride(),
        0 if row_weight is None else row_weight.stride(0),
        FORWARD=PAIRS[activation][0], BACKWARD=PAIRS[activation][1], FROM_P=ACTIVATIONS[activation].saves == "p",
        PER_ROW=per_row, ACC=tiles.accumulator(x.dtype), PRECISION=tiles.dot_precision(x.dtype), **tile.meta(),
    )  # fmt: skip
    return _summed(loss, partials, pending), dp, y


def decoder_mse(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    activation: str,
    reduction: str,
    saved: Tensor | None,
    below: str,
    row_weight: Tensor | None = None,
    features: int | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_act_mse` and, from its dp, dx = (dp w) * f'(...) of the layer below: (loss, dp [M, N], dx [M, K]).

    `saved` and `below` are that layer's, as in `linear_dgrad_act`; `saved` may be x itself. K is at most 256.
    """
    (M, K), N = x.shape, w.shape[0]
    if K > DECODER_WIDTH:
        raise ValueError(f"decoder_mse: x must have at most {DECODER_WIDTH} columns; got [{M}, {K}]")
    dp, dx = x.new_empty((M, N)), x.new_empty((M, K))
    if M * N == 0:
        return _empty_loss(x, M, reduction), dp, dx.zero_()
    tile = tiles.choose_decoder(M, N, K, x, w)
    per_row = reduction == "none"
    programs = triton.cdiv(M, tile.rows)
    loss, partials = _loss_and_partials(x, 1 if per_row else programs, (M,) if per_row else ())
    tiles.launch(
        _decoder_mse_kernel, programs, x,
        x, w, b, target, row_weight, saved, partials, dp, dx, M, N, K, features,
        _denominator(M, features or N, reduction),
        *x.stride(), *w.stride(), 0 if b is None else b.stride(0), *target.stride(),
        0 if row_weight is None else row_weight.stride(0), *((0, 0) if saved is None else saved.stride()),
        FORWARD=PAIRS[activation][0], BACKWARD=PAIRS[activation][1], FROM_P=ACTIVATIONS[activation].saves == "p",
        BELOW=PAIRS[below][1], PER_ROW=per_row,
        ACC=tiles.accumulator(x.dtype), PRECISION=tiles.dot_precision(x.dtype),
        BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _summed(loss, partials, pending), dp, dx


def fits_decoder_mse(K: int, dtype: torch.dtype) -> bool:
    """Whether `decoder_mse` keeps its registers: up to 256 columns, in fp64 (sm_90 spills beyond) up to 128."""
    return (128 if dtype == torch.float64 else DECODER_WIDTH) >= K
