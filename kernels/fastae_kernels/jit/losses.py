"""Each loss as a pair of jit functions, and the loss of a whole array with its gradient in one pass.

`<name>_value(y, t, SETTING)` is the loss of each value, `<name>_gradient(y, t, SETTING)` its derivative by y in units
of the loss's factor (`elementwise.LOSSES[name].factor`). Arguments are fp32 or fp64 tiles; SETTING is the loss's number
(huber's delta), a constant of the compiled kernel, so that fp64 has all its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels import elementwise
from fastae_kernels.elementwise import LossKind
from fastae_kernels.jit import launch
from fastae_kernels.jit.activations import _log1p_unit, _sigmoid
from fastae_kernels.jit.sums import sum_rows
from fastae_kernels.jit.tile_ops import narrow, offsets, workspace
from fastae_kernels.jit.tiles import LOSS_BLOCK
from fastae_kernels.ops import Out


@triton.jit
def mse_value(y, t, SETTING: tl.constexpr):
    e = y - t
    return e * e


@triton.jit
def mse_gradient(y, t, SETTING: tl.constexpr):
    return y - t


@triton.jit
def mae_value(y, t, SETTING: tl.constexpr):
    return tl.abs(y - t)


@triton.jit
def mae_gradient(y, t, SETTING: tl.constexpr):
    e = y - t
    return (e > 0).to(e.dtype) - (e < 0).to(e.dtype)  # as torch.sign: 0 at 0, and for NaN


@triton.jit
def _clamped(e, SETTING: tl.constexpr):
    delta = tl.full((), SETTING, e.dtype)  # a number that a comparison meets becomes fp32
    return tl.where(e > delta, delta, tl.where(e < -delta, -delta, e))


@triton.jit
def huber_value(y, t, SETTING: tl.constexpr):
    e = y - t
    c = _clamped(e, SETTING)
    return c * (e - c * 0.5)  # e^2 / 2 inside +-delta, delta (|e| - delta / 2) outside


@triton.jit
def huber_gradient(y, t, SETTING: tl.constexpr):
    return _clamped(y - t, SETTING)


@triton.jit
def gaussian_value(p, t, SETTING: tl.constexpr):
    e = p - t
    return e * e * 0.5


@triton.jit
def gaussian_gradient(p, t, SETTING: tl.constexpr):
    return p - t


@triton.jit
def bernoulli_value(p, t, SETTING: tl.constexpr):
    return tl.where(p < 0, 0.0, p) - t * p + _log1p_unit(tl.exp(-tl.abs(p)))


@triton.jit
def bernoulli_gradient(p, t, SETTING: tl.constexpr):
    return _sigmoid(p) - t


@triton.jit
def poisson_value(p, t, SETTING: tl.constexpr):
    return tl.exp(p) - t * p


@triton.jit
def poisson_gradient(p, t, SETTING: tl.constexpr):
    return tl.exp(p) - t


#: name -> (value, gradient)
LOSS_PAIRS = {name: (globals()[f"{name}_value"], globals()[f"{name}_gradient"]) for name in elementwise.LOSSES}


# ---------------------------------------------------------------- the loss of an array


@triton.jit
def _loss_kernel(
    input_ptr, target_ptr, row_weight_ptr, dinput_ptr, partial_ptr, M, N, denominator,
    stride_im, stride_in, stride_tm, stride_tn, stride_rm,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, SETTING: tl.constexpr, FACTOR: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial = sum row_weight VALUE of one tile / denominator; dinput = its derivative by the input."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m, mask_m = offsets(pid // tiles_n, M, BLOCK_M)
    offs_n, mask_n = offsets(pid % tiles_n, N, BLOCK_N)
    mask = mask_m[:, None] & mask_n[None, :]
    input = tl.load(input_ptr + offs_m[:, None] * stride_im + offs_n[None, :] * stride_in, mask=mask, other=0.0)
    target = tl.load(target_ptr + offs_m[:, None] * stride_tm + offs_n[None, :] * stride_tn, mask=mask, other=0.0)
    y, t = input.to(ACC), target.to(ACC)
    n = tl.cast(denominator, ACC)
    values = VALUE(y, t, SETTING)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)[:, None]
        values *= row_weight
    tl.store(partial_ptr + pid, tl.sum(tl.where(mask, values, 0.0)) / n)
    if dinput_ptr is not None:
        dinput = GRADIENT(y, t, SETTING) * (FACTOR / n)
        if row_weight_ptr is not None:
            dinput *= row_weight
        dinput = narrow(dinput, dinput_ptr.dtype.element_ty)
        tl.store(dinput_ptr + offs_m[:, None] * N + offs_n[None, :], dinput, mask=mask)


def loss(
    input: Tensor,
    target: Tensor,
    kind: LossKind,
    reduction: str,
    need_dinput: bool = False,
    out: Out | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    memory = out or Out()
    total = input.new_empty(()) if memory.loss is None else memory.loss
    dinput = launch.output(input, tuple(input.shape), memory.dp) if need_dinput else None
    values = input.numel()
    if values == 0:
        return total.fill_(float("nan") if reduction == "mean" else 0.0), dinput
    n = input.shape[0] * kind.width(input.shape[1]) if reduction == "mean" else 1
    if row_weight is None and input.is_contiguous() and target.is_contiguous():
        input, target = input.view(1, values), target.view(1, values)
    M, N = input.shape
    block_n = min(LOSS_BLOCK if M == 1 else 128, triton.next_power_of_2(N))
    block_m = min(LOSS_BLOCK // block_n, triton.next_power_of_2(M))
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    partials = workspace(input, programs)
    value, gradient = LOSS_PAIRS[kind.name]
    launch.launch(
        _loss_kernel, programs, input,
        input, target, row_weight, dinput, partials, M, N, n, *input.stride(), *target.stride(),
        0 if row_weight is None else row_weight.stride(0),
        VALUE=value, GRADIENT=gradient, SETTING=kind.setting, FACTOR=kind.row.factor,
        ACC=launch.accumulator(input.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return sum_rows(partials, total), dinput
