"""The layer of a variational code with its sample and divergence, and the gradient by it: epilogues of two products.

What is computed: `ops.Ops.linear_sample`, `linear_dgrad_sample` and `kernels/README.md`. Twin: `sampling.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.jit import launch, tiles
from fastae_kernels.jit.activations import _expm1
from fastae_kernels.jit.linear_act import linear_dgrad_act
from fastae_kernels.jit.random import normal_tile
from fastae_kernels.jit.tile_ops import dot_tile, narrow, offsets, row_sum, workspace
from fastae_kernels.ops import Layer
from fastae_kernels.sampling import HIGHEST, LOWEST, Sample, Sampled, sample_bwd

_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


@triton.jit
def _bounded(log_var):
    low, high = tl.full((), _LOWEST, log_var.dtype), tl.full((), _HIGHEST, log_var.dtype)
    return tl.where(log_var < low, low, tl.where(log_var > high, high, log_var))  # NaN stays


@triton.jit
def _rows_of_w(
    x_ptr, w_ptr, b_ptr, offs_m, mask_m, offs_z, mask_z, first, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x wT + b for the rows of w from `first` on."""
    p, _ = dot_tile(
        x_ptr, w_ptr, offs_m, mask_m, first + offs_z, mask_z, 0, K,
        stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    if b_ptr is not None:
        p += tl.load(b_ptr + (first + offs_z) * stride_bn, mask=mask_z, other=0.0).to(ACC)[None, :]
    return p


@triton.jit
def _linear_sample_kernel(
    x_ptr, w_ptr, b_ptr, row_weight_ptr, state_ptr, z_ptr, p_ptr, kl_ptr, M, Z, K, width_z, width_p,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_rm,
    STREAM: tl.constexpr, PER_LATENT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[mu | log_var] = x wT + b, contiguous [M, width_p]; z = mu + exp(log_var / 2) normal, contiguous [M, width_z]; 0
    past 2 Z and Z columns. The sum over a block of rows of r KL, [row blocks] or PER_LATENT [row blocks, Z].

    The sample is made of what is stored, so that the backward pass, which reads that, has the same one.
    """
    pid = tl.program_id(0)
    offs_m, mask_m = offsets(pid, M, BLOCK_I)
    offs_z = tl.arange(0, BLOCK_J).to(tl.int64)
    mask_z = offs_z < Z
    mu = _rows_of_w(
        x_ptr, w_ptr, b_ptr, offs_m, mask_m, offs_z, mask_z, 0, K,
        stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, ACC, PRECISION, BLOCK_R,
    )  # fmt: skip
    log_var = _rows_of_w(
        x_ptr, w_ptr, b_ptr, offs_m, mask_m, offs_z, mask_z, Z, K,
        stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, ACC, PRECISION, BLOCK_R,
    )  # fmt: skip
    mask = mask_m[:, None] & mask_z[None, :]
    p_ptrs = p_ptr + offs_m[:, None] * width_p + offs_z[None, :]
    mu, log_var = narrow(mu, p_ptr.dtype.element_ty), narrow(log_var, p_ptr.dtype.element_ty)
    tl.store(p_ptrs, mu, mask=mask)
    tl.store(p_ptrs + Z, log_var, mask=mask)
    rest = offs_z + Z + Z  # less than a tile
    rest_ptrs = p_ptr + offs_m[:, None] * width_p + rest[None, :]
    tl.store(rest_ptrs, tl.zeros_like(mu), mask=mask_m[:, None] & (rest < width_p)[None, :])
    mu, log_var = mu.to(ACC), _bounded(log_var.to(ACC))
    z = mu + tl.exp(log_var * 0.5) * normal_tile(state_ptr, offs_m, 0, BLOCK_J, STREAM).to(ACC)
    z = tl.where(mask_z[None, :], z, 0.0)
    z_ptrs = z_ptr + offs_m[:, None] * width_z + offs_z[None, :]
    tl.store(z_ptrs, narrow(z, z_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_z < width_z)[None, :])
    kl = (mu * mu + (_expm1(log_var) - log_var)) * 0.5
    if row_weight_ptr is not None:
        kl *= tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)[:, None]
    kl = tl.where(mask, kl, 0.0)
    if PER_LATENT:
        tl.store(kl_ptr + pid.to(tl.int64) * Z + offs_z, tl.sum(kl, axis=0), mask=mask_z)
    else:
        tl.store(kl_ptr + pid + tl.arange(0, 1), tl.sum(row_sum(kl, mask)[:, None], axis=0))


@triton.jit
def _linear_dgrad_sample_kernel(
    dp_ptr, w_ptr, p_ptr, slope_ptr, row_weight_ptr, state_ptr, dx_ptr, M, N, Z, width_w, width_p, divisor,
    stride_pm, stride_pn, stride_wn, stride_wk, stride_qm, stride_qk, stride_sz, stride_rm,
    STREAM: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz = dp w; dx = [dz + s mu | dz n exp(log_var / 2) / 2 + s expm1(log_var) / 2], contiguous [M, width_p], with s =
    slope r / divisor; 0 past 2 Z columns, and by a log_var that was clamped."""
    offs_m, mask_m = offsets(tl.program_id(0), M, BLOCK_I)
    offs_z = tl.arange(0, BLOCK_J).to(tl.int64)
    mask_z = offs_z < Z
    dz, _ = dot_tile(
        dp_ptr, w_ptr, offs_m, mask_m, offs_z, offs_z < width_w, 0, N,
        stride_pm, stride_pn, stride_wn, stride_wk, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    mask = mask_m[:, None] & mask_z[None, :]
    rows_ptr = p_ptr + offs_m[:, None] * stride_qm
    mu = tl.load(rows_ptr + offs_z[None, :] * stride_qk, mask=mask, other=0.0).to(ACC)
    log_var = tl.load(rows_ptr + (offs_z + Z)[None, :] * stride_qk, mask=mask, other=0.0).to(ACC)
    bounded = _bounded(log_var)
    slope = (tl.load(slope_ptr + offs_z * stride_sz, mask=mask_z, other=0.0).to(ACC) / tl.cast(divisor, ACC))[None, :]
    if row_weight_ptr is not None:
        slope = slope * tl.load(row_weight_ptr + offs_m * stride_rm, mask=mask_m, other=0.0).to(ACC)[:, None]
    noise = normal_tile(state_ptr, offs_m, 0, BLOCK_J, STREAM).to(ACC)
    by_log_var = 0.5 * (dz * noise * tl.exp(bounded * 0.5) + slope * _expm1(bounded))
    by_log_var = tl.where(bounded == log_var, by_log_var, 0.0)
    dx_ptrs = dx_ptr + offs_m[:, None] * width_p + offs_z[None, :]
    tl.store(dx_ptrs, narrow(dz + slope * mu, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptrs + Z, narrow(by_log_var, dx_ptr.dtype.element_ty), mask=mask)
    rest = offs_z + Z + Z
    rest_ptrs = dx_ptr + offs_m[:, None] * width_p + rest[None, :]
    zeros = narrow(tl.zeros_like(dz), dx_ptr.dtype.element_ty)
    tl.store(rest_ptrs, zeros, mask=mask_m[:, None] & (rest < width_p)[None, :])


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def linear_sample(
    x: Tensor, layer: Layer, sample: Sample, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    (w, b, _), (M, K), Z = layer, x.shape, sample.width
    if Z > tiles.SAMPLE_WIDTH:
        raise ValueError(f"linear_sample: a code must have at most {tiles.SAMPLE_WIDTH} latents; got {Z}")
    z, p = (x.new_empty(M, Z), x.new_empty(M, 2 * Z)) if out is None else out
    assert z.is_contiguous()
    assert p.is_contiguous()
    tile = tiles.choose_sample(M, _block(max(Z, z.shape[1], p.shape[1] - 2 * Z)), K, x, w)
    programs = triton.cdiv(M, tile.rows)
    kl = workspace(x, programs, Z) if sample.per_latent else workspace(x, programs)
    launch.launch(
        _linear_sample_kernel, programs, x,
        x, w, b, sample.row_weight, sample.key.state, z, p, kl, M, Z, K, z.shape[1], p.shape[1],
        *x.stride(), *w.stride(), 0 if b is None else b.stride(0),
        0 if sample.row_weight is None else sample.row_weight.stride(0),
        STREAM=sample.key.stream, PER_LATENT=sample.per_latent,
        ACC=launch.accumulator(x.dtype), PRECISION=launch.dot_precision(x.dtype),
        BLOCK_I=tile.rows, BLOCK_J=tile.cols, BLOCK_R=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return z, p, kl, ()


def linear_dgrad_sample(dp: Tensor, w: Tensor, sampled: Sampled, out: Tensor | None = None) -> Tensor:
    (M, N), sample = dp.shape, sampled.sample
    if sample.key.drawn:  # by a twin, not counted out
        return sample_bwd(linear_dgrad_act(dp, w, None, "identity"), sampled, out)
    Z = sample.width
    width = 2 * Z if out is None else out.shape[1]
    dx = launch.output(dp, (M, width), out)
    slope, weight = sampled.slope, sample.row_weight
    tile = tiles.choose_sample(M, _block(max(Z, width - 2 * Z)), N, dp, w)
    launch.launch(
        _linear_dgrad_sample_kernel, triton.cdiv(M, tile.rows), dp,
        dp, w, sampled.p, slope, weight, sample.key.state, dx, M, N, Z, w.shape[1], width, sampled.divisor,
        *dp.stride(), *w.stride(), *sampled.p.stride(), slope.stride(0) if slope.dim() else 0,
        0 if weight is None else weight.stride(0),
        STREAM=sample.key.stream, ACC=launch.accumulator(dp.dtype), PRECISION=launch.dot_precision(dp.dtype),
        BLOCK_I=tile.rows, BLOCK_J=tile.cols, BLOCK_R=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx
