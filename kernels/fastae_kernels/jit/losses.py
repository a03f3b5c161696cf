"""Mean squared error and its gradient in one pass over the data. Mathematics: `kernels/README.md`; twin:
`reference.mse`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import tiles
from fastae_kernels.jit.sums import sum_rows
from fastae_kernels.jit.tile_ops import narrow, offsets, workspace

BLOCK = 4096  # elements a program reads of each tensor; fixed, since it decides the order of the sum


@triton.jit
def _mse_kernel(
    input_ptr, target_ptr, dinput_ptr, partial_ptr, M, N, denominator,
    stride_im, stride_in, stride_tm, stride_tn,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial = sum (input - target)^2 / denominator of one tile; dinput = 2 (input - target) / denominator."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m, mask_m = offsets(pid // tiles_n, M, BLOCK_M)
    offs_n, mask_n = offsets(pid % tiles_n, N, BLOCK_N)
    mask = mask_m[:, None] & mask_n[None, :]
    input = tl.load(input_ptr + offs_m[:, None] * stride_im + offs_n[None, :] * stride_in, mask=mask, other=0.0)
    target = tl.load(target_ptr + offs_m[:, None] * stride_tm + offs_n[None, :] * stride_tn, mask=mask, other=0.0)
    difference = input.to(ACC) - target.to(ACC)
    n = tl.cast(denominator, ACC)
    tl.store(partial_ptr + pid, tl.sum(difference * difference) / n)
    if dinput_ptr is not None:
        dinput = narrow(difference * (2.0 / n), dinput_ptr.dtype.element_ty)
        tl.store(dinput_ptr + offs_m[:, None] * N + offs_n[None, :], dinput, mask=mask)


def mse(input: Tensor, target: Tensor, reduction: str, need_dinput: bool = False) -> tuple[Tensor, Tensor | None]:
    """sum (input - target)^2, divided by their number for "mean" [], and its gradient 2 (input - target) / n [M, N]."""
    loss = input.new_empty(())
    dinput = input.new_empty(input.shape) if need_dinput else None
    n = input.numel()
    if n == 0:
        return loss.fill_(float("nan") if reduction == "mean" else 0.0), dinput
    if input.is_contiguous() and target.is_contiguous():
        input, target = input.view(1, n), target.view(1, n)
    M, N = input.shape
    block_n = min(BLOCK if M == 1 else 128, triton.next_power_of_2(N))
    block_m = min(BLOCK // block_n, triton.next_power_of_2(M))
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    partials = workspace(input, programs)
    tiles.launch(
        _mse_kernel, programs, input,
        input, target, dinput, partials, M, N, n if reduction == "mean" else 1, *input.stride(), *target.stride(),
        ACC=tiles.accumulator(input.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return sum_rows(partials, loss), dinput
