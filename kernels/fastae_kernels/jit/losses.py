"""Each loss as a pair of jit functions, and the loss of a whole array with its gradient in one pass.

`<name>_value(y, t, a, SETTING)` is the loss of each value, `<name>_gradient(y, t, a, SETTING)` its derivative by y in
units of the loss's factor (`elementwise.LOSSES[name].factor`), and `<name>_parameter(y, t, a, SETTING)`, of a loss that
has one, that by its parameter. Arguments are fp32 or fp64 tiles, of which a is a row [1, N], or None where there is no
parameter. SETTING is the loss's number (huber's delta), a constant of the compiled kernel, so that fp64 has all its
digits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels import elementwise
from fastae_kernels.elementwise import LossKind
from fastae_kernels.jit import launch
from fastae_kernels.jit.activations import _log1p_unit, _sigmoid
from fastae_kernels.jit.negative_binomial import nb_gradient, nb_parameter, nb_value  # noqa: F401 (the tables find them)
from fastae_kernels.jit.sums import sum_partials, sum_rows
from fastae_kernels.jit.tile_ops import narrow, offsets, workspace
from fastae_kernels.jit.tiles import LOSS_BLOCK, LOSS_BLOCK_TRAINED
from fastae_kernels.ops import Out


@triton.jit
def mse_value(y, t, a, SETTING: tl.constexpr):
    e = y - t
    return e * e


@triton.jit
def mse_gradient(y, t, a, SETTING: tl.constexpr):
    return y - t


@triton.jit
def mae_value(y, t, a, SETTING: tl.constexpr):
    return tl.abs(y - t)


@triton.jit
def mae_gradient(y, t, a, SETTING: tl.constexpr):
    e = y - t
    return (e > 0).to(e.dtype) - (e < 0).to(e.dtype)  # as torch.sign: 0 at 0, and for NaN


@triton.jit
def _clamped(e, SETTING: tl.constexpr):
    delta = tl.full((), SETTING, e.dtype)  # a number that a comparison meets becomes fp32
    return tl.where(e > delta, delta, tl.where(e < -delta, -delta, e))


@triton.jit
def huber_value(y, t, a, SETTING: tl.constexpr):
    e = y - t
    c = _clamped(e, SETTING)
    return c * (e - c * 0.5)  # e^2 / 2 inside +-delta, delta (|e| - delta / 2) outside


@triton.jit
def huber_gradient(y, t, a, SETTING: tl.constexpr):
    return _clamped(y - t, SETTING)


@triton.jit
def _precision(p, a, SETTING: tl.constexpr):
    """1 / sigma^2 from s = log sigma^2, which is the parameter, or the setting where there is none."""
    return tl.exp(-tl.full((1, 1), SETTING, p.dtype)) if a is None else tl.exp(-a)


@triton.jit
def gaussian_value(p, t, a, SETTING: tl.constexpr):
    e = p - t
    plain: tl.constexpr = a is None and SETTING == 0.0
    value = e * e * 0.5 if plain else e * e * (_precision(p, a, SETTING) * 0.5)
    if a is not None:
        value += a * 0.5
    return value


@triton.jit
def gaussian_gradient(p, t, a, SETTING: tl.constexpr):
    e = p - t
    if a is not None or SETTING != 0.0:
        e *= _precision(p, a, SETTING)
    return e


@triton.jit
def gaussian_parameter(p, t, a, SETTING: tl.constexpr):
    e = p - t
    return 0.5 - e * e * (_precision(p, a, SETTING) * 0.5)


@triton.jit
def bernoulli_value(p, t, a, SETTING: tl.constexpr):
    return tl.where(p < 0, 0.0, p) - t * p + _log1p_unit(tl.exp(-tl.abs(p)))


@triton.jit
def bernoulli_gradient(p, t, a, SETTING: tl.constexpr):
    return _sigmoid(p) - t


@triton.jit
def poisson_value(p, t, a, SETTING: tl.constexpr):
    return tl.exp(p) - t * p


@triton.jit
def poisson_gradient(p, t, a, SETTING: tl.constexpr):
    return tl.exp(p) - t


#: name -> (value, gradient)
LOSS_PAIRS = {name: (globals()[f"{name}_value"], globals()[f"{name}_gradient"]) for name in elementwise.LOSSES}
#: name -> the gradient by the parameter, of the losses that have one
LOSS_PARAMETERS = {name: globals()[f"{name}_parameter"] for name in LOSS_PAIRS if f"{name}_parameter" in globals()}


# ---------------------------------------------------------------- the loss of an array


@triton.jit
def store_parameter_sums(ptr, da, pid, pid_m, offs_n, mask_n, N, SHARED: tl.constexpr):
    """The sums over the rows of a tile's gradients by the parameter: one for each column, ptr [row tiles, N], or
    SHARED of all of them, ptr [programs]."""
    if SHARED:
        # As a column: for sm_100, Triton 3.7 cannot compile the sum of a vector that comes from tl.dot
        tl.store(ptr + pid + tl.arange(0, 1), tl.sum(tl.sum(da, axis=1)[:, None], axis=0))
    else:
        tl.store(ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(da, axis=0), mask=mask_n)


@triton.jit
def _loss_kernel(
    input_ptr, target_ptr, row_weight_ptr, dinput_ptr, partial_ptr, parameter_ptr, dparameter_ptr, M, N, denominator,
    stride_im, stride_in, stride_tm, stride_tn, stride_rm, stride_an,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr, PARAMETER: tl.constexpr, SETTING: tl.constexpr, FACTOR: tl.constexpr,
    SHARED: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial = sum row_weight VALUE of one tile / denominator; dinput = its derivative by the input, dparameter the
    sums of those by the parameter."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m, mask_m = offsets(pid // tiles_n, M, BLOCK_M)
    offs_n, mask_n = offsets(pid % tiles_n, N, BLOCK_N)
    mask = mask_m[:, None] & mask_n[None, :]
    input = tl.load(input_ptr + offs_m[:, None] * stride_im + offs_n[None, :] * stride_in, mask=mask, other=0.0)
    target = tl.load(target_ptr + offs_m[:, None] * stride_tm + offs_n[None, :] * stride_tn, mask=mask, other=0.0)
    y, t = input.to(ACC), target.to(ACC)
    n = tl.cast(denominator, ACC)
    a = None
    if parameter_ptr is not None:
        a = tl.load(parameter_ptr + offs_n * stride_an, mask=mask_n, other=0.0).to(ACC)[None, :]
    values = VALUE(y, t, a, SETTING)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)[:, None]
        values *= row_weight
    tl.store(partial_ptr + pid, tl.sum(tl.where(mask, values, 0.0)) / n)
    if dinput_ptr is not None:
        dinput = GRADIENT(y, t, a, SETTING) * (FACTOR / n)
        if row_weight_ptr is not None:
            dinput *= row_weight
        dinput = narrow(dinput, dinput_ptr.dtype.element_ty)
        tl.store(dinput_ptr + offs_m[:, None] * N + offs_n[None, :], dinput, mask=mask)
    if dparameter_ptr is not None:
        da = PARAMETER(y, t, a, SETTING) / n
        if row_weight_ptr is not None:
            da *= row_weight
        da = tl.where(mask, da, 0.0)
        store_parameter_sums(dparameter_ptr, da, pid, pid // tiles_n, offs_n, mask_n, N, SHARED)


def parameter_partials(like: Tensor, dparameter: Tensor | None, row_tiles: int, programs: int, N: int) -> Tensor | None:
    """What `store_parameter_sums` fills, to be added up into `dparameter`; None if that is not wanted."""
    if dparameter is None:
        return None
    return workspace(like, programs, 1) if dparameter.numel() == 1 else workspace(like, row_tiles, N)


def parameter_meta(kind: LossKind, parameter: Tensor | None) -> dict[str, object]:
    """The launch arguments of a loss's parameter."""
    return {
        "stride_an": 0 if parameter is None or parameter.numel() == 1 else parameter.stride(0),
        "PARAMETER": None if parameter is None else LOSS_PARAMETERS[kind.name],
        "SHARED": parameter is not None and parameter.numel() == 1,
    }


def loss(
    input: Tensor,
    target: Tensor,
    kind: LossKind,
    reduction: str,
    need_dinput: bool = False,
    out: Out | None = None,
    parameter: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    memory = out or Out()
    total = input.new_empty(()) if memory.loss is None else memory.loss
    dinput = launch.output(input, tuple(input.shape), memory.dp) if need_dinput else None
    values = input.numel()
    if values == 0:
        if memory.dparameter is not None:
            memory.dparameter.zero_()
        return total.fill_(float("nan") if reduction == "mean" else 0.0), dinput
    n = input.shape[0] * kind.width(input.shape[1]) if reduction == "mean" else 1
    flat = row_weight is None and (parameter is None or parameter.numel() == 1)
    if input.is_contiguous() and target.is_contiguous() and flat:
        input, target = input.view(1, values), target.view(1, values)
    M, N = input.shape
    block = LOSS_BLOCK if parameter is None else LOSS_BLOCK_TRAINED
    block_n = min(block if M == 1 else 128, triton.next_power_of_2(N))
    block_m = min(block // block_n, triton.next_power_of_2(M))
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    partials = workspace(input, programs)
    parts = parameter_partials(input, memory.dparameter, triton.cdiv(M, block_m), programs, N)
    value, gradient = LOSS_PAIRS[kind.name]
    launch.launch(
        _loss_kernel, programs, input,
        input, target, row_weight, dinput, partials, parameter, parts, M, N, n, *input.stride(), *target.stride(),
        0 if row_weight is None else row_weight.stride(0),
        VALUE=value, GRADIENT=gradient, SETTING=kind.setting, FACTOR=kind.row.factor, **parameter_meta(kind, parameter),
        ACC=launch.accumulator(input.dtype), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    if parts is None:
        return sum_rows(partials, total), dinput
    assert memory.dparameter is not None
    sum_partials([(partials, total), (parts, memory.dparameter)])
    return total, dinput
