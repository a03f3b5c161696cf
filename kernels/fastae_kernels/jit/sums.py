"""Partial results added up, and matrices brought into rows of another length: any number of them in one launch.

Mathematics, shapes and dimension letters: `kernels/README.md`. Twin: `reference.Reference.sum_partials`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import launch
from fastae_kernels.jit.tile_ops import narrow, offsets
from fastae_kernels.jit.tiles import WARP_COLUMNS

SIZES = 8  # numbers that describe a sum


@triton.jit
def _sum_flat(src_ptr, dst_ptr, pid, R, size, stride_r, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """dst[c] = sum_r src[r, c], c running through contiguous memory on both sides."""
    offs_c, mask_c = offsets(pid, size, BLOCK)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK), dtype=ACC)
    for first in range(0, R, BLOCK_R):
        rows = first + offs_r
        mask = (rows < R)[:, None] & mask_c[None, :]
        acc += tl.load(src_ptr + rows.to(tl.int64)[:, None] * stride_r + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(dst_ptr + offs_c, narrow(tl.sum(acc, axis=0), dst_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _sum_rows_of(
    src_ptr, dst_ptr, pid, R, size_i, size_j, inside, stride_r, stride_i, stride_j,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dst[i, j] = sum_r src[r, i, j]; dst is contiguous, 0 from column `inside` on."""
    tiles_j = tl.cdiv(size_j, BLOCK_J)
    offs_i, mask_i = offsets(pid // tiles_j, size_i, BLOCK_I)
    offs_j, mask_j = offsets(pid % tiles_j, size_j, BLOCK_J)
    src_ptrs = src_ptr + offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    mask = mask_i[:, None] & (offs_j < inside)[None, :]
    step_r = tl.full((), 1, tl.int64) * stride_r
    acc = tl.zeros((BLOCK_I, BLOCK_J), dtype=ACC)
    for _ in range(R):
        acc += tl.load(src_ptrs, mask=mask, other=0.0).to(ACC)
        src_ptrs += step_r
    offs = offs_i[:, None] * size_j + offs_j[None, :]
    tl.store(dst_ptr + offs, narrow(acc, dst_ptr.dtype.element_ty), mask=mask_i[:, None] & mask_j[None, :])


@triton.jit
def _sum_one(
    src_ptr, dst_ptr, pid, R, size_i, size_j, inside, stride_r, stride_i, stride_j,
    FLAT: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if src_ptr.dtype.element_ty == tl.float64 else tl.float32
    if FLAT:
        _sum_flat(src_ptr, dst_ptr, pid, R, size_j, stride_r, BLOCK_0, BLOCK_1, ACC)
    else:
        _sum_rows_of(
            src_ptr, dst_ptr, pid, R, size_i, size_j, inside, stride_r, stride_i, stride_j, BLOCK_0, BLOCK_1, ACC
        )  # fmt: skip


@triton.jit
def _sum_partials_kernel(
    srcs, dsts, sizes, FLAT: tl.constexpr, BLOCKS_0: tl.constexpr, BLOCKS_1: tl.constexpr, SIZES: tl.constexpr
):
    """Sum k is made by the programs below sizes[SIZES * k], and not by those below that of the sum before."""
    pid = tl.program_id(0)
    for k in tl.static_range(len(FLAT)):
        first = sizes[SIZES * (k - 1)] if k else 0
        if (pid >= first) & (pid < sizes[SIZES * k]):
            _sum_one(
                srcs[k], dsts[k], pid - first, sizes[SIZES * k + 1], sizes[SIZES * k + 2], sizes[SIZES * k + 3],
                sizes[SIZES * k + 4], sizes[SIZES * k + 5], sizes[SIZES * k + 6], sizes[SIZES * k + 7],
                FLAT[k], BLOCKS_0[k], BLOCKS_1[k],
            )  # fmt: skip


def sum_partials(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """For each pair (src [R, ...], dst): dst = src.sum(0), in one launch.

    src [R], [R, J] or [R, I, J] in any strides, dst contiguous and without the R; fp32 sums (fp64 for fp64), rounded
    once. dst may be narrower or have fewer rows, which drops what is left over, or be wider, which fills it with 0.
    """
    pairs = [(src, dst) for src, dst in pairs if dst.numel()]
    sizes, flat, blocks, ends = list[int](), list[bool](), list[tuple[int, int]](), [0]
    for src, dst in pairs:
        assert dst.is_contiguous(), f"dst must be contiguous; got strides {dst.stride()}"
        R, rows, columns = src.shape[0], *(1, 1, *src.shape[1:])[-2:]
        size_i, size_j = (1, 1, *dst.shape)[-2:]
        stride_i, stride_j = (0, 1, *src.stride()[1:])[-2:]
        size_i, inside = min(size_i, rows), min(size_j, columns)
        flat.append(inside == size_j and (size_j == 1 or stride_j == 1) and (size_i == 1 or stride_i == size_j))
        if flat[-1]:
            size_i, size_j = 1, size_i * size_j
        # All of them for short vectors too, or a thread would store less than 16 bytes
        block = min(WARP_COLUMNS, triton.next_power_of_2(size_j)) if size_j == 1 or not flat[-1] else WARP_COLUMNS
        blocks.append(
            (min(1024 // block, triton.next_power_of_2(R or 1)) if flat[-1] else WARP_COLUMNS // block, block)
        )
        in_rows = 1 if flat[-1] else triton.cdiv(size_i, blocks[-1][0])
        ends.append(ends[-1] + in_rows * triton.cdiv(size_j, block))
        sizes += [ends[-1], R, size_i, size_j, inside, src.stride(0), stride_i, stride_j]
    if pairs:
        launch.launch(
            _sum_partials_kernel, ends[-1], pairs[0][1],
            tuple(src for src, _ in pairs), tuple(dst for _, dst in pairs), tuple(sizes),
            FLAT=tuple(flat), BLOCKS_0=tuple(b for b, _ in blocks), BLOCKS_1=tuple(b for _, b in blocks), SIZES=SIZES,
            num_warps=1,
        )  # fmt: skip


def sum_rows(partials: Tensor, out: Tensor) -> Tensor:
    """out = the sum over the leading axis of contiguous `partials` [R, ...], rounded to out's type once."""
    sum_partials([(partials, out)])
    return out
