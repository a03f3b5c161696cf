"""A whole stack of layers in one kernel: a block of rows is carried through all of them and never leaves the chip.

Mathematics, shapes and dimension letters: `kernels/README.md`. What each launcher computes: `ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.jit import launch, tiles
from fastae_kernels.jit.activations import PAIRS
from fastae_kernels.jit.linear_act import linear_act_fwd
from fastae_kernels.jit.linear_act_loss import linear_act_loss
from fastae_kernels.jit.losses import LOSS_PAIRS, parameter_meta
from fastae_kernels.jit.tile_ops import dot_tile, narrow, offsets, operand, row_sum, workspace
from fastae_kernels.jit.tiles import STACK_WIDTH
from fastae_kernels.ops import Criterion, Layer


@triton.jit
def _activate(p, b_ptr, stride_bn, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """f(p + b), rounded as it would be in memory; 0 beyond WIDTH, where inf in x would leave NaN."""
    BLOCK: tl.constexpr = p.shape[1]
    offs_n = tl.arange(0, BLOCK)
    mask_n = offs_n < WIDTH
    if b_ptr is not None:
        p += tl.load(b_ptr + offs_n.to(tl.int64) * stride_bn, mask=mask_n, other=0.0).to(p.dtype)[None, :]
    return narrow(tl.where(mask_n[None, :], ACTIVATION(p), 0.0), dtype)


@triton.jit
def _first_layer(
    x_ptr, w_ptr, b_ptr, offs_m, mask_m, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_bn,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The rows after the first layer, [M, BLOCK]: the one that reads x, of any width, in steps."""
    offs_n, mask_n = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK) < WIDTH
    p, _ = dot_tile(
        x_ptr, w_ptr, offs_m, mask_m, offs_n, mask_n, 0, K,
        stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    return _activate(p, b_ptr, stride_bn, WIDTH, ACTIVATION, x_ptr.dtype.element_ty)


@triton.jit
def _weights(
    w_ptr, offs_n, mask_n, first_k: tl.constexpr, stride_wn, stride_wk, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The weights of columns [first_k, first_k + BLOCK) of the layer below, as wT [BLOCK, N]."""
    offs_k = tl.arange(0, BLOCK).to(tl.int64) + first_k
    ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    return operand(tl.load(ptrs, mask=(offs_k < WIDTH)[:, None] & mask_n[None, :], other=0.0))


@triton.jit
def _add_product(
    p, h, w_ptr, offs_n, mask_n, first_k: tl.constexpr, stride_wn, stride_wk,
    BELOW: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p + h wT, h being the columns from `first_k` on; halved until CHUNK of them, whose weights fit on chip."""
    BLOCK: tl.constexpr = h.shape[1]
    if BLOCK > CHUNK:
        HALF: tl.constexpr = BLOCK // 2
        left, right = tl.split(tl.permute(tl.reshape(h, (h.shape[0], 2, HALF)), (0, 2, 1)))
        p = _add_product(p, left, w_ptr, offs_n, mask_n, first_k, stride_wn, stride_wk, BELOW, CHUNK, PRECISION)
        p = _add_product(p, right, w_ptr, offs_n, mask_n, first_k + HALF, stride_wn, stride_wk, BELOW, CHUNK, PRECISION)
    else:
        w = _weights(w_ptr, offs_n, mask_n, first_k, stride_wn, stride_wk, BELOW, BLOCK)
        p = tl.dot(operand(h), w, p, input_precision=PRECISION, out_dtype=p.dtype)
    return p


@triton.jit
def _next_layer(
    h, w_ptr, b_ptr, stride_wn, stride_wk, stride_bn,
    BELOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """h [M, below] through one more layer, [M, BLOCK]."""
    offs_n, mask_n = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, BLOCK) < WIDTH
    p = tl.zeros((h.shape[0], BLOCK), dtype=ACC)
    p = _add_product(p, h, w_ptr, offs_n, mask_n, 0, stride_wn, stride_wk, BELOW, CHUNK, PRECISION)
    return _activate(p, b_ptr, stride_bn, WIDTH, ACTIVATION, h.dtype)


@triton.jit
def _carry(
    x_ptr, weights, biases, strides, offs_m, mask_m, K, stride_xm, stride_xk, activations,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The rows after all layers of WIDTHS. strides: of w along N, of w along K, of b, layer by layer."""
    h = _first_layer(
        x_ptr, weights[0], biases[0], offs_m, mask_m, K, stride_xm, stride_xk, strides[0], strides[1], strides[2],
        WIDTHS[0], BLOCKS[0], activations[0], ACC, PRECISION, BLOCK_R,
    )  # fmt: skip
    for layer in tl.static_range(1, len(WIDTHS)):
        h = _next_layer(
            h, weights[layer], biases[layer], strides[3 * layer], strides[3 * layer + 1], strides[3 * layer + 2],
            WIDTHS[layer - 1], WIDTHS[layer], BLOCKS[layer], activations[layer], ACC, PRECISION, CHUNK,
        )  # fmt: skip
    return h


@triton.jit
def _stack_encode_kernel(
    x_ptr, weights, biases, strides, y_ptr, M, K, stride_xm, stride_xk, activations,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = the rows of x after all layers, contiguous [M, last of WIDTHS]."""
    offs_m, mask_m = offsets(tl.program_id(0), M, BLOCK_M)
    y = _carry(
        x_ptr, weights, biases, strides, offs_m, mask_m, K, stride_xm, stride_xk, activations,
        WIDTHS, BLOCKS, CHUNK, ACC, PRECISION, BLOCK_R,
    )  # fmt: skip
    N: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    BLOCK_N: tl.constexpr = y.shape[1]
    offs_n = tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y, mask=mask)


@triton.jit
def _stack_score_kernel(
    x_ptr, weights, biases, strides, last_w_ptr, last_b_ptr, parameter_ptr, score_ptr, M, K, denominator,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_an, activations, LAST: tl.constexpr,
    VALUE: tl.constexpr, SETTING: tl.constexpr,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """score = the loss of each row against x, its mean or sum, [M]: hidden layers as above, the last tile by tile."""
    offs_m, mask_m = offsets(tl.program_id(0), M, BLOCK_M)
    h = _carry(
        x_ptr, weights, biases, strides, offs_m, mask_m, K, stride_xm, stride_xk, activations,
        WIDTHS, BLOCKS, CHUNK, ACC, PRECISION, BLOCK_R,
    )  # fmt: skip
    BELOW: tl.constexpr = WIDTHS[len(WIDTHS) - 1]
    BLOCK_K: tl.constexpr = h.shape[1]
    h = operand(h)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    for first_n in range(0, K, BLOCK_N):
        offs_n = tl.arange(0, BLOCK_N).to(tl.int64) + first_n
        mask_n = offs_n < K
        w = _weights(last_w_ptr, offs_n, mask_n, 0, stride_wn, stride_wk, BELOW, BLOCK_K)
        p = tl.dot(h, w, input_precision=PRECISION, out_dtype=ACC)
        if last_b_ptr is not None:
            p += tl.load(last_b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(ACC)[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xk, mask=mask, other=0.0)
        a = None
        if parameter_ptr is not None:
            a = tl.load(parameter_ptr + offs_n * stride_an, mask=mask_n, other=0.0).to(ACC)[None, :]
        total += row_sum(VALUE(LAST(p), x.to(ACC), a, SETTING), mask)
    tl.store(score_ptr + offs_m, total / tl.cast(denominator, ACC), mask=mask_m)


def _hidden(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], tile: tiles.Tile
) -> dict[str, Any]:
    """The launch arguments that carry rows through these layers."""
    widths = tuple(w.shape[0] for w in weights)
    blocks = tuple(max(16, triton.next_power_of_2(n)) for n in widths)
    return {
        "weights": tuple(weights),
        "biases": tuple(biases),
        "strides": tuple(
            stride
            for w, b in zip(weights, biases, strict=True)
            for stride in (*w.stride(), 0 if b is None else b.stride(0))
        ),
        "activations": tuple(PAIRS[name][0] for name in activations),
        "WIDTHS": widths,
        "BLOCKS": blocks,
        "CHUNK": tiles.STACK_CHUNK[launch.product(x.dtype)],
        "ACC": launch.accumulator(x.dtype),
        "PRECISION": launch.dot_precision(x.dtype),
        "BLOCK_M": tile.rows,
        "BLOCK_R": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _check(what: str, widths: Sequence[int]) -> None:
    if any(width > STACK_WIDTH for width in widths):
        raise ValueError(f"{what} must have at most {STACK_WIDTH} features; got {list(widths)}")


def stack_score(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    kind: LossKind = MSE,
    parameter: Tensor | None = None,
) -> Tensor:
    """Every hidden layer has at most 256 features."""
    if len(weights) == 1:
        criterion = Criterion(kind, "none", parameter=parameter)
        return linear_act_loss(x, Layer(weights[0], biases[0], activations[0]), x, criterion)[0]
    M, K = x.shape
    _check("stack_score: hidden layers", [w.shape[0] for w in weights[:-1]])
    score = workspace(x, M)
    if K == 0:
        return score.fill_(float("nan"))
    tile = tiles.choose_stack(M, K, x, parameter is not None)
    w, b = weights[-1], biases[-1]
    launch.launch(
        _stack_score_kernel, triton.cdiv(M, tile.rows), x,
        x_ptr=x, last_w_ptr=w, last_b_ptr=b, parameter_ptr=parameter, score_ptr=score,
        M=M, K=K, denominator=kind.width(K),
        stride_xm=x.stride(0), stride_xk=x.stride(1),
        stride_wn=w.stride(0), stride_wk=w.stride(1), stride_bn=0 if b is None else b.stride(0),
        stride_an=parameter_meta(kind, parameter)["stride_an"],
        LAST=PAIRS[activations[-1]][0], VALUE=LOSS_PAIRS[kind.name][0], SETTING=kind.setting, BLOCK_N=tile.cols,
        **_hidden(x, weights[:-1], biases[:-1], activations[:-1], tile),
    )  # fmt: skip
    return score


def stack_encode(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> Tensor:
    """Every layer has at most 256 features."""
    if len(weights) == 1:
        return linear_act_fwd(x, weights[0], biases[0], activations[0])[0]
    M, K = x.shape
    _check("stack_encode: every layer", [w.shape[0] for w in weights])
    y = x.new_empty((M, weights[-1].shape[0]))
    tile = tiles.choose_stack(M, K, x)
    launch.launch(
        _stack_encode_kernel, triton.cdiv(M, tile.rows) if y.numel() else 0, x,
        x_ptr=x, y_ptr=y, M=M, K=K, stride_xm=x.stride(0), stride_xk=x.stride(1),
        **_hidden(x, weights, biases, activations, tile),
    )  # fmt: skip
    return y


def fits_stack(dims: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether hidden rows of a stack of these widths (input, hidden ..., output) fit on chip: 256, in fp64 128."""
    return max(dims[1:-1], default=0) <= (STACK_WIDTH // 2 if dtype == torch.float64 else STACK_WIDTH)
