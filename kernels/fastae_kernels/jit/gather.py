"""Rows gathered with noise on them, and as they are beside: one pass over the source.

What is computed: `ops.Ops.gather` and `kernels/README.md`. Twin: `reference.Reference.gather`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import launch
from fastae_kernels.jit.random import normal_tile, uniform_tile, unit, words
from fastae_kernels.jit.tile_ops import narrow, offsets
from fastae_kernels.jit.tiles import GATHER_TILE
from fastae_kernels.noise import CORRUPTIONS, Corruption
from fastae_kernels.reference import TORCH


@triton.jit
def mask(x, r, AMOUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where(r < AMOUNT, 0.0, x)


@triton.jit
def drop(x, r, AMOUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where(r < AMOUNT, 0.0, x) * (1.0 / (1.0 - AMOUNT))


@triton.jit
def salt_pepper(x, r, AMOUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    low, high = tl.full((), LOW, x.dtype), tl.full((), HIGH, x.dtype)
    return tl.where(r < AMOUNT * 0.5, low, tl.where(r >= 1.0 - AMOUNT * 0.5, high, x))


@triton.jit
def gaussian(x, r, AMOUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    noisy = x + r.to(x.dtype) * AMOUNT
    if LOW is not None:
        low, high = tl.full((), LOW, x.dtype), tl.full((), HIGH, x.dtype)
        noisy = tl.where(noisy < low, low, tl.where(noisy > high, high, noisy))  # NaN stays
    return noisy


#: name -> x with noise made of r, normal for "gaussian", uniform for the others
NOISES = {name: globals()[name] for name in CORRUPTIONS}


@triton.jit
def _gather_kernel(
    source_ptr, rows_ptr, out_ptr, clean_ptr, state_ptr, groups_ptr, M, N, source_rows,
    stride_sm, stride_sn, stride_om, stride_cm,
    NOISE: tl.constexpr, NORMAL: tl.constexpr, SWAP: tl.constexpr, HIDE: tl.constexpr,
    AMOUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, STREAM: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = source[rows] with noise, clean = source[rows], NaN where nothing was masked if HIDE."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    offs_m, mask_m = offsets(tl.program_id(0) // tiles_n, M, BLOCK_M)
    offs_n, mask_n = offsets(pid_n, N, BLOCK_N)
    inside = mask_m[:, None] & mask_n[None, :]
    rows = offs_m
    if rows_ptr is not None:
        rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=0)
    columns = source_ptr + offs_n[None, :] * stride_sn
    x = tl.load(columns + rows[:, None] * stride_sm, mask=inside, other=0.0).to(ACC)
    if SWAP:
        group = offs_n
        if groups_ptr is not None:
            group = tl.load(groups_ptr + offs_n, mask=mask_n, other=0)
        chance, other, _, _ = words(state_ptr, offs_m, group, STREAM)
        chosen = inside & (unit(chance) < AMOUNT)
        others = (other.to(tl.uint64) * source_rows.to(tl.uint64)) >> 32
        swapped = tl.load(columns + others.to(tl.int64) * stride_sm, mask=chosen, other=0.0).to(ACC)
        noisy = tl.where(chosen, swapped, x)
    else:
        if NORMAL:
            r = normal_tile(state_ptr, offs_m, pid_n, BLOCK_N, STREAM)
        else:
            r = uniform_tile(state_ptr, offs_m, pid_n, BLOCK_N, STREAM)
        noisy = NOISE(x, r, AMOUNT, LOW, HIGH)
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :], narrow(noisy, out_ptr.dtype.element_ty), mask=inside
    )
    if clean_ptr is not None:
        if HIDE:
            x = tl.where(r < AMOUNT, x, float("nan"))
        clean = narrow(x, clean_ptr.dtype.element_ty)
        tl.store(clean_ptr + offs_m[:, None] * stride_cm + offs_n[None, :], clean, mask=inside)


def gather(
    source: Tensor,
    rows: Tensor | None,
    out: Tensor,
    corruption: Corruption | None = None,
    clean: Tensor | None = None,
    hide: bool = False,
) -> None:
    if corruption is None:  # ATen's index_select: there is nothing to fuse into a plain gather
        TORCH.gather(source, rows, out)
        return
    (M, N), c = out.shape, corruption
    assert out.stride(1) == 1, f"out must have rows in one piece; got strides {out.stride()}"
    assert clean is None or clean.stride(1) == 1, "clean must have rows in one piece"
    bounded = c.low > -math.inf or c.high < math.inf
    block_n = min(GATHER_TILE[1], triton.next_power_of_2(max(N, 4)))
    block_m = min(GATHER_TILE[0] * GATHER_TILE[1] // block_n, triton.next_power_of_2(max(M, 1)))
    launch.launch(
        _gather_kernel, triton.cdiv(M, block_m) * triton.cdiv(N, block_n), source,
        source, rows, out, clean, c.key.state, c.groups, M, N, len(source),
        *source.stride(), out.stride(0), 0 if clean is None else clean.stride(0),
        NOISE=NOISES.get(c.kind), NORMAL=c.kind == "gaussian", SWAP=c.kind == "swap", HIDE=hide,
        AMOUNT=c.amount, LOW=c.low if bounded or c.kind == "salt_pepper" else None, HIGH=c.high, STREAM=c.key.stream,
        ACC=launch.accumulator(source.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
