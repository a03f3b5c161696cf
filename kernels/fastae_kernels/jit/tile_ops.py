"""Jit helpers shared by the kernels: the order of tiles, the main loop of a matrix product, narrowing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import launch

# Triton's interpreter multiplies the bit patterns of bf16 in tl.dot (triton#11584) and truncates fp32 -> bf16 where
# hardware rounds to nearest even. Compiled code never sees the branches that this constant guards.
_INTERPRETED = tl.constexpr(launch.interpreted())


@triton.jit
def operand(tile):
    """A tile as tl.dot wants it."""
    if _INTERPRETED and tile.dtype == tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round an accumulator to the type it is stored in."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest_even = (bits.to(tl.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits16 = tl.where(value == value, nearest_even, 0x7FC0).to(tl.uint16)
        return bits16.to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def tile_of(pid, size_i, size_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, GROUP: tl.constexpr):
    """The tile (i, j) of an [size_i, size_j] output of a program: GROUP row tiles at a time, to share columns in L2."""
    tiles_i = tl.cdiv(size_i, BLOCK_I)
    tiles_j = tl.cdiv(size_j, BLOCK_J)
    in_group = GROUP * tiles_j
    first_i = pid // in_group * GROUP
    group = tl.minimum(tiles_i - first_i, GROUP)
    return first_i + pid % in_group % group, pid % in_group // group


@triton.jit
def offsets(pid, extent, BLOCK: tl.constexpr):
    """The int64 indices of tile `pid` along an axis, and which of them lie inside it."""
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < extent


@triton.jit
def dot_tile(
    a_ptr, b_ptr, offs_i, mask_i, offs_j, mask_j, start, stop,
    stride_ai, stride_ar, stride_br, stride_bj,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, SUM_A: tl.constexpr = False,
):  # fmt: skip
    """sum over r in [start, stop) of a[i, r] b[r, j], as [I, J]; with SUM_A also that of a[i, r], as [I].

    a is summed without being read from shared memory: where wgmma shares a tile with other readers, Triton 3.7.1 gives
    it one stage too few, and the copy for the next one overwrites what the product still reads. 16-bit values are
    summed by a product with ones, which is exact; others are loaded a second time, out of L2.
    """
    BLOCK_I: tl.constexpr = offs_i.shape[0]
    BLOCK_J: tl.constexpr = offs_j.shape[0]
    BY_PRODUCT: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 16
    offs_r = tl.arange(0, BLOCK_R)
    first_r = offs_r.to(tl.int64) + start
    a_ptrs = a_ptr + offs_i[:, None] * stride_ai + first_r[None, :] * stride_ar
    b_ptrs = b_ptr + first_r[:, None] * stride_br + offs_j[None, :] * stride_bj
    step_a = tl.full((), BLOCK_R, tl.int64) * stride_ar  # a stride of a transposed view times BLOCK_R can pass 2^31
    step_b = tl.full((), BLOCK_R, tl.int64) * stride_br
    acc = tl.zeros((BLOCK_I, BLOCK_J), dtype=ACC)
    again_ptrs = a_ptr + first_r[:, None] * stride_ar + offs_i[None, :] * stride_ai
    a_sum = tl.zeros((BLOCK_I, 16) if BY_PRODUCT else (BLOCK_R, BLOCK_I), dtype=ACC)
    for r in range(start, stop, BLOCK_R):
        mask_r = offs_r < stop - r
        a = operand(tl.load(a_ptrs, mask=mask_i[:, None] & mask_r[None, :], other=0.0))
        b = operand(tl.load(b_ptrs, mask=mask_r[:, None] & mask_j[None, :], other=0.0))
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if SUM_A:
            if BY_PRODUCT:
                a_sum = tl.dot(a, tl.full((BLOCK_R, 16), 1.0, a.dtype), a_sum, out_dtype=ACC)  # in each of 16 columns
            else:
                a_sum += tl.load(again_ptrs, mask=mask_r[:, None] & mask_i[None, :], other=0.0).to(ACC)
                again_ptrs += step_a
        a_ptrs += step_a
        b_ptrs += step_b
    if BY_PRODUCT:
        a_sum = tl.trans(tl.where(tl.arange(0, 16)[None, :] == 0, a_sum, 0.0))
    return acc, tl.sum(a_sum, axis=0)


@triton.jit
def plus_bias(p, b, mask):
    """p + b [J] inside the mask, b outside, for a p [I, J] straight from tl.dot.

    Not p + b: Triton would start the product's accumulator from b, and LLVM fills that behind the wgmma.fence which has
    to come after (PTX ISA 8.6, wgmma.fence).
    """
    return tl.where(mask, p, 0.0) + b[None, :]


@triton.jit
def row_sum(tile, mask):
    """sum over j of tile[i, j] inside the mask, as [I].

    Masked behind the products that the tile is made of: a product next to an addition becomes one fused multiply-add,
    and in a sum across threads each then rounds another term, so that two threads that hold the same row store
    different last bits.
    """
    return tl.sum(tl.where(mask, tile, 0.0), axis=1)


def workspace(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised accumulators: fp32, or fp64 for fp64."""
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
