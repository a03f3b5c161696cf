"""`ONEDNN`: the twins on a CPU, with oneDNN's matrix products where they are faster.

ATen multiplies fp32 matrices with MKL, which keeps to AVX2 on CPUs that are not Intel's; oneDNN uses AVX-512 there:
1024 x 784 x 256 in 1.0 ms against 2.0 on two Zen 5 cores, whose units are 512 bits wide, in 1.9 against 2.1 on two
Zen 4 cores, whose units are half of that. bf16 runs in oneDNN either way, but its own op adds the bias, and subtracts
the target, in the accumulator, where ATen first fills the result with copies of the bias: 0.87 to 1.0 of the time. Its
ops return memory of their own: `out` may stay unused. Other dtypes, and products of nothing, are the twins'.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastae_kernels.elementwise import ACTIVATIONS, MSE, LossKind, sum_of_squares
from fastae_kernels.noise import Dropout, drop
from fastae_kernels.operands import first_operand, rows_apart
from fastae_kernels.ops import Criterion, Layer, Ops, Out, Pending
from fastae_kernels.reference import Prepare, Reference, act_loss, reduced, through_activation
from fastae_kernels.sampling import penalised

# Multiply-adds from which oneDNN wins with full and with half units; a call costs 12 us more than `torch.addmm`.
SMALLEST = {True: 1 << 23, False: 1 << 24}
# A block's rows stay in the cache from layer to layer: in fp32 784-256-128 x 4,096 runs 1.15 times as fast as whole on
# two Zen 4 cores, in bf16 as fast. Narrow rows come in longer blocks, or the calls decide.
SCORE_ROWS, SCORE_VALUES = 1024, 1 << 20
# Values of a last weight that is brought into oneDNN's own layout once, not at each call: 0.96 of the time in bf16 at
# 784-256-128 and four blocks. It takes 100 us at any size.
PACKED = 1 << 17


@cache
def available() -> bool:
    """Whether this build of PyTorch has the oneDNN ops."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# dtype -> what its products gain here, where they gain
WHY = {
    torch.float32: "oneDNN multiplies fp32 with AVX-512 on this CPU, MKL with AVX2",
    torch.bfloat16: "oneDNN multiplies bf16, and adds the bias and subtracts the target before rounding",
}


def unsupported_reason(dtype: torch.dtype, multiply_adds: int) -> str | None:
    """None if a layer whose products have that many multiply-adds gains here, or why it does not."""
    if dtype not in WHY:
        return "oneDNN is for fp32 and bf16"
    if not available():
        return "this build of PyTorch has no oneDNN"
    if dtype == torch.float32:
        if multiply_adds < (least := SMALLEST[_full_width()]):
            return f"less than {least / 1e6:.1f} million multiply-adds: a call of oneDNN costs more than it saves"
        return None if _fp32_pays() else "MKL multiplies fp32 as fast on this CPU"
    if multiply_adds == 0:
        return "nothing to multiply"
    return None if _has_bf16() else "oneDNN has no bf16 on this CPU"


@cache
def _fp32_pays() -> bool:
    """On an AVX-512 CPU that is not Intel's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return "GenuineIntel" not in _cpuinfo()


@cache
def _full_width() -> bool:
    """Whether an AMD CPU's AVX-512 units are 512 bits wide: Zen 5's, which came with AVX-VNNI; Zen 4 has neither."""
    return "avx_vnni" in _cpuinfo().split()


@cache
def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


@cache
def _has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a product of that dtype on this CPU: without AVX-512 it has none in half precision."""
    if not available() or dtype == torch.float32:
        return available()
    has_fp16 = dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return has_fp16 or (dtype == torch.bfloat16 and _has_bf16())


class OneDNN(Reference):
    """The twins, where a product gains on oneDNN's."""

    def linear_act_fwd(
        self,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        activation: str,
        keep_p: bool = False,
        out: tuple[Tensor, Tensor | None] | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if not _takes(x, w, bf16=True):
            return super().linear_act_fwd(x, w, b, activation, keep_p, out, dropout)
        p = _linear(x, w, b)  # its own relu would turn NaN into 0
        y = p if not keep_p else torch.empty_like(p) if out is None else out[0]
        ACTIVATIONS[activation].forward(p, y)
        return drop(y, dropout), p if keep_p else None

    def linear_dgrad_act(
        self,
        dp: Tensor,
        w: Tensor,
        saved: Tensor | None,
        activation: str,
        out: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        if not _takes(dp, w):
            return super().linear_dgrad_act(dp, w, saved, activation, out, dropout)
        return through_activation(_linear(dp, w.t(), None), saved, activation, dropout)

    def linear_wgrad(
        self,
        dp: Tensor,
        x: Tensor,
        need_db: bool = False,
        scale: Tensor | float | None = None,
        out: tuple[Tensor, Tensor | None] | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        # oneDNN copies dpT on one thread, some 1 ns a value: full units gain that back over 512 columns of x, half
        # units never
        if not (_takes(dp, x) and _full_width() and x.shape[1] >= 512):
            return super().linear_wgrad(dp, x, need_db, scale, out)
        dw = _linear(dp.t(), x.t(), None)
        db = None
        if need_db:
            db = dp.sum(0) if out is None or out[1] is None else torch.sum(dp, 0, out=out[1])
        if scale is not None:
            dw.mul_(scale)
            if db is not None:
                db.mul_(scale)
        return dw, db

    def linear_act_loss(
        self,
        x: Tensor,
        layer: Layer,
        target: Tensor,
        criterion: Criterion,
        need_dp: bool = False,
        out: Out | None = None,
        pending: Pending | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        w, b, activation = layer
        if not _takes(x, w, bf16=True):
            return super().linear_act_loss(x, layer, target, criterion, need_dp, out)
        memory, features = out or Out(), criterion.features
        bias = None if b is None else b.contiguous()
        if (
            ACTIVATIONS[activation].saves is None
            and criterion.kind == MSE
            and criterion.counted is None
            and criterion.share == 1
        ):
            _keep_freed_memory()
            pointwise = torch.ops.mkldnn._linear_pointwise
            e = pointwise.binary(first_operand(x), target.contiguous(), w, bias, "sub")
            if features is not None:
                e[:, features:] = 0
            loss = _mean_square(e, criterion, memory)
            if need_dp and criterion.row_weight is not None:
                e.mul_(criterion.row_weight.unsqueeze(1))
            return penalised(loss, criterion.penalty, len(x)), e if need_dp else None
        p = _linear(x.float(), w.float(), None if bias is None else bias.float())
        loss, dp = act_loss(p, activation, target, criterion, need_dp, x.dtype, memory)
        return penalised(loss, criterion.penalty, len(x)), dp

    def stack_score(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[str],
        kind: LossKind = MSE,
        parameter: Tensor | None = None,
    ) -> Tensor:
        criterion = Criterion(kind, "none", parameter=parameter)
        wide = torch.promote_types(x.dtype, torch.float32)
        errors = x.new_empty(len(x), dtype=wide)
        most = max(SCORE_ROWS, SCORE_VALUES // max(x.shape[1], *(w.shape[0] for w in weights), 1))
        block = -(-len(x) // -(-max(len(x), 1) // most)) or 1  # alike, since oneDNN prepares itself for each new shape
        scratch = x.new_empty(min(len(x), block), x.shape[1], dtype=wide) if wide != x.dtype else None
        w = packed = weights[-1]
        lean = ACTIVATIONS[activations[-1]].saves is None and kind == MSE
        if len(x) > 2 * block and w.numel() >= PACKED and lean and _takes(x, w, True):
            packed = torch.ops.mkldnn._reorder_linear_weight(w, block)
        for rows, out in zip(x.split(block), errors.split(block), strict=True):

            def scores(prepare: Prepare, rows: Tensor = rows) -> Tensor:
                h, last = prepare(self.through(rows, weights[:-1], biases[:-1], activations[:-1], prepare), w)
                layer = Layer(packed if last is w else last, biases[-1], activations[-1])
                memory = None if scratch is None else Out(scratch=scratch[: len(rows)])
                return self.linear_act_loss(h, layer, rows, criterion, out=memory)[0]

            out.copy_(rows_apart(rows, scores))
        return errors


def _mean_square(e: Tensor, criterion: Criterion, memory: Out) -> Tensor:
    """The reduced loss of a difference, in half precision by way of fp32: torch.dot in bf16 takes 50 times as long."""
    M, N = len(e), e.shape[1] if criterion.features is None else criterion.features
    if e.dtype == torch.bfloat16:
        scratch = torch.empty(e.shape, device=e.device) if memory.scratch is None else memory.scratch
        e = scratch.copy_(e)
    per_row = criterion.reduction == "none" or criterion.row_weight is not None
    return reduced(sum_of_squares(e, per_row, None if per_row else memory.loss), M, N, criterion, memory.loss)


def _takes(a: Tensor, b: Tensor, bf16: bool = False) -> bool:
    """bf16 only where there is a bias or a target for oneDNN to take in: its bare products are ATen's too."""
    here = a.dtype == torch.float32 or (bf16 and a.dtype == torch.bfloat16 and _has_bf16())
    return here and a.numel() > 0 and b.numel() > 0


@cache
def _keep_freed_memory() -> None:
    """glibc returns the top of its heap to the system when twice the largest mapped block ever freed lies free there,
    32 MiB at most: a step that frees its results would get their pages anew each time, 1,600 page faults of 19 ms at
    784-256-128 x 1,024. So one block is freed that nobody wrote to (`bytes` asks calloc, `bytearray` would
    fill it): of Python's, since a torch mode may be at work."""
    bytes((32 << 20) - (1 << 16))


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    _keep_freed_memory()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(
        first_operand(x), w, None if b is None else b.contiguous(), "none", [], ""
    )
    return y


ONEDNN: Ops = OneDNN()
