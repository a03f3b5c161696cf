"""Linear layer with activation: forward, activation backward, data gradient, weight gradient.

Mathematics, shapes and dimension letters: `kernels/README.md`. What each launcher computes: `ops.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import launch, tiles
from fastae_kernels.jit.activations import PAIRS
from fastae_kernels.jit.random import dropout_tile, dropping, kept_of, state_of
from fastae_kernels.jit.sums import sum_partials, sum_rows
from fastae_kernels.jit.tile_ops import dot_tile, narrow, offsets, tile_of, workspace
from fastae_kernels.noise import Dropout
from fastae_kernels.ops import Pending
from fastae_kernels.reference import through_activation
from fastae_kernels.splits import split_rows as split_rows_of


@triton.jit
def _linear_act_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, p_ptr, state_ptr, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p = x wT + b; y = f(p), or what DROPOUT leaves of it if state_ptr is given. y and p are contiguous [M, N]; p is
    stored if p_ptr is given."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_I, BLOCK_J, GROUP)
    offs_m, mask_m = offsets(pid_m, M, BLOCK_I)
    offs_n, mask_n = offsets(pid_n, N, BLOCK_J)
    p, _ = dot_tile(
        x_ptr, w_ptr, offs_m, mask_m, offs_n, mask_n, 0, K,
        stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    if b_ptr is not None:
        p += tl.load(b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if p_ptr is not None:
        tl.store(p_ptr + offs, narrow(p, p_ptr.dtype.element_ty), mask=mask)
    y = ACTIVATION(p)
    if state_ptr is not None:
        y *= dropout_tile(state_ptr, offs_m, pid_n, BLOCK_J, DROPOUT, STREAM, ACC)
    tl.store(y_ptr + offs, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _act_bwd_kernel(
    dy_ptr, saved_ptr, dp_ptr, db_ptr, M, N,
    stride_ym, stride_yn, stride_sm, stride_sn,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dp = dy * f'(p), contiguous [M, N]; if db_ptr is given, the column sums of each row block, [row blocks, N]."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    offs_m, mask_m = offsets(pid_m, M, BLOCK_M)
    offs_n, mask_n = offsets(tl.program_id(0) % tiles_n, N, BLOCK_N)
    mask = mask_m[:, None] & mask_n[None, :]
    dp = tl.load(dy_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn, mask=mask, other=0.0).to(ACC)
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offs_m[:, None] * stride_sm + offs_n[None, :] * stride_sn, mask=mask, other=0.0)
        dp = ACTIVATION(dp, saved.to(ACC))
    tl.store(dp_ptr + offs_m[:, None] * N + offs_n[None, :], narrow(dp, dp_ptr.dtype.element_ty), mask=mask)
    if db_ptr is not None:
        db = tl.sum(tl.where(mask, dp, 0.0), axis=0)
        tl.store(db_ptr + pid_m.to(tl.int64) * N + offs_n, db, mask=mask_n)


@triton.jit
def _linear_dgrad_act_kernel(
    dp_ptr, w_ptr, saved_ptr, dx_ptr, state_ptr, M, N, K,
    stride_pm, stride_pn, stride_wn, stride_wk, stride_sm, stride_sk,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, KEPT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = (dp w) * f'(...) of the layer below, contiguous [M, K]; through its DROPOUT first if state_ptr is given.
    What f' is written from is KEPT times what was saved."""
    pid_m, pid_k = tile_of(tl.program_id(0), M, K, BLOCK_I, BLOCK_J, GROUP)
    offs_m, mask_m = offsets(pid_m, M, BLOCK_I)
    offs_k, mask_k = offsets(pid_k, K, BLOCK_J)
    dx, _ = dot_tile(
        dp_ptr, w_ptr, offs_m, mask_m, offs_k, mask_k, 0, N,
        stride_pm, stride_pn, stride_wn, stride_wk, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    mask = mask_m[:, None] & mask_k[None, :]
    if state_ptr is not None:
        dx *= dropout_tile(state_ptr, offs_m, pid_k, BLOCK_J, DROPOUT, STREAM, ACC)
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offs_m[:, None] * stride_sm + offs_k[None, :] * stride_sk, mask=mask, other=0.0)
        saved = saved.to(ACC)
        if KEPT != 1:
            saved *= KEPT
        dx = ACTIVATION(dx, saved)
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_wgrad_kernel(
    dp_ptr, x_ptr, dw_ptr, db_ptr, scale_ptr, M, N, K, split_rows,
    stride_pm, stride_pn, stride_xm, stride_xk,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dw = scale dpT x and db = scale sum over rows of dp, for the rows of one split: contiguous [splits, N, K] and
    [splits, N]; scale is 1 if scale_ptr is not given."""
    tiles_nk = tl.cdiv(N, BLOCK_I) * tl.cdiv(K, BLOCK_J)
    split = tl.program_id(0) // tiles_nk
    pid_n, pid_k = tile_of(tl.program_id(0) % tiles_nk, N, K, BLOCK_I, BLOCK_J, GROUP)
    offs_n, mask_n = offsets(pid_n, N, BLOCK_I)
    offs_k, mask_k = offsets(pid_k, K, BLOCK_J)
    start = split * split_rows
    stop = tl.minimum(start + split_rows, M)
    if (
        db_ptr is not None and pid_k == 0
    ):  # one column of tiles sums dp as it passes; a branch inside the loop would stop its pipelining
        dw, db = dot_tile(
            dp_ptr, x_ptr, offs_n, mask_n, offs_k, mask_k, start, stop,
            stride_pn, stride_pm, stride_xm, stride_xk, BLOCK_R, ACC, PRECISION, SUM_A=True,
        )  # fmt: skip
        if scale_ptr is not None:
            db *= tl.load(scale_ptr).to(ACC)
        tl.store(db_ptr + split.to(tl.int64) * N + offs_n, narrow(db, db_ptr.dtype.element_ty), mask=mask_n)
    else:
        dw, _ = dot_tile(
            dp_ptr, x_ptr, offs_n, mask_n, offs_k, mask_k, start, stop,
            stride_pn, stride_pm, stride_xm, stride_xk, BLOCK_R, ACC, PRECISION,
        )  # fmt: skip
    if scale_ptr is not None:
        dw *= tl.load(scale_ptr).to(ACC)
    offs = split.to(tl.int64) * N * K + offs_n[:, None] * K + offs_k[None, :]
    tl.store(dw_ptr + offs, narrow(dw, dw_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()  # type: ignore[return-value]


def linear_act_fwd(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    activation: str,
    keep_p: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor | None]:
    (M, K), N = x.shape, w.shape[0]
    y_out, p_out = (None, None) if out is None else out
    y = launch.output(x, (M, N), y_out)
    p = launch.output(x, (M, N), p_out) if keep_p else None
    tile = tiles.choose(M, N, K, x, w)
    launch.launch(
        _linear_act_fwd_kernel, triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols), x,
        x, w, b, y, p, state_of(dropout), M, N, K, *x.stride(), *w.stride(), 0 if b is None else b.stride(0),
        ACTIVATION=PAIRS[activation][0], **dropping(dropout),
        ACC=launch.accumulator(x.dtype), PRECISION=launch.dot_precision(x.dtype),
        **tile.meta(),
    )  # fmt: skip
    return y, p


def act_bwd(dy: Tensor, saved: Tensor | None, activation: str, need_db: bool = False) -> tuple[Tensor, Tensor | None]:
    M, N = dy.shape
    dp = dy.new_empty((M, N))
    block_n = min(128, triton.next_power_of_2(max(N, 1)))
    block_m = min(tiles.ACT_BWD_BYTES // max(dy.itemsize, 4) // block_n, triton.next_power_of_2(max(M, 1)))
    rows = triton.cdiv(M, block_m)
    partials = workspace(dy, rows, N) if need_db else None
    launch.launch(
        _act_bwd_kernel, rows * triton.cdiv(N, block_n), dy,
        dy, saved, dp, partials, M, N, *dy.stride(), *_strides(saved),
        ACTIVATION=PAIRS[activation][1], ACC=launch.accumulator(dy.dtype), BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return dp, None if partials is None else sum_rows(partials, dy.new_empty(N))


def linear_dgrad_act(
    dp: Tensor,
    w: Tensor,
    saved: Tensor | None,
    activation: str,
    out: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    (M, N), K = dp.shape, w.shape[1]
    if dropout is not None and dropout.key.drawn:  # by a twin, not counted out
        return through_activation(linear_dgrad_act(dp, w, None, "identity", out), saved, activation, dropout)
    dx = launch.output(dp, (M, K), out)
    tile = tiles.choose(M, K, N, dp, w, table=tiles.DGRAD_TILES)
    launch.launch(
        _linear_dgrad_act_kernel, triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.cols), dp,
        dp, w, saved, dx, state_of(dropout), M, N, K, *dp.stride(), *w.stride(), *_strides(saved),
        ACTIVATION=PAIRS[activation][1], **dropping(dropout), KEPT=kept_of(dropout, activation),
        ACC=launch.accumulator(dp.dtype), PRECISION=launch.dot_precision(dp.dtype),
        **tile.meta(),
    )  # fmt: skip
    return dx


def linear_wgrad(
    dp: Tensor,
    x: Tensor,
    need_db: bool = False,
    scale: Tensor | float | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    pending: Pending | None = None,
) -> tuple[Tensor, Tensor | None]:
    scale = workspace(dp).fill_(scale) if isinstance(scale, float) else scale
    (M, N), K = dp.shape, x.shape[1]
    dw, db = (dp.new_empty((N, K)), None) if out is None else out
    db = None if not need_db else dp.new_empty(N) if db is None else db
    assert dw.is_contiguous(), f"out must be contiguous; got strides {dw.stride()}"
    if K == 0:  # no tile of dw to sum db beside
        if db is not None:
            linear_wgrad(dp, dp.new_zeros((M, 1)), True, scale, (dp.new_empty((N, 1)), db), pending)
        return dw, db
    tile = tiles.choose(N, K, M, dp, x, table=tiles.WGRAD_TILES)
    programs = triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.cols)
    splits, split_rows = split_rows_of(M, N, K)
    whole = splits == 1 and dw.shape == (N, K)
    dw_out = dw if whole else workspace(dp, splits, N, K)
    db_out = db if whole or db is None else workspace(dp, splits, N)
    launch.launch(
        _linear_wgrad_kernel, splits * programs, dp,
        dp, x, dw_out, db_out, scale, M, N, K, split_rows, *dp.stride(), *x.stride(),
        ACC=launch.accumulator(dp.dtype), PRECISION=launch.dot_precision(dp.dtype), **tile.meta(),
    )  # fmt: skip
    if not whole:
        parts = [(dw_out, dw)] if db is None or db_out is None else [(dw_out, dw), (db_out, db)]
        if pending is None:
            sum_partials(parts)
        else:
            pending += parts
    return dw, db
