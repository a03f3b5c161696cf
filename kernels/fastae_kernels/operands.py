"""First operands of bf16 products as oneDNN reads them safely on CPUs with AMX (uxlfoundation/oneDNN#5717).

oneDNN 3.x in PyTorch 2.13 loads whole blocks of a first operand's row and multiplies what lies past its end by 0: NaN
or inf there becomes NaN in the result. Mended upstream by oneDNN#5723, after the version that PyTorch 2.13 brings.
Measured on an Intel Xeon with amx_bf16: a view whose rows have other memory between them is read past its end where the
reduction is odd, or above 32 and not a multiple of 4, up to 254 terms, from where on oneDNN copies it; of contiguous
rows each is read into the next one where the reduction is not a multiple of 32. fp16, fp32 and second operands are
read right, and so is everything without AMX.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

COPIED_FROM = 256  # terms from which oneDNN copies a first operand itself
BLOCK = 32  # terms that one AMX instruction multiplies


@cache
def amx() -> bool:
    """Whether oneDNN multiplies bf16 with AMX here; ONEDNN_MAX_CPU_ISA can forbid it."""
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    if isa.startswith(("SSE", "AVX")) and "AMX" not in isa:
        return False
    return bool(torch.cpu._is_amx_tile_supported())


def first_operand(a: Tensor) -> Tensor:
    """a [I, R] as the first operand of a product over R: a copy where oneDNN would read past the end of its rows."""
    if a.dtype != torch.bfloat16 or not amx() or a.device.type != "cpu":
        return a
    terms = a.shape[-1]
    if terms % 4 == 0 or terms >= COPIED_FROM or a.is_contiguous() or a.mT.is_contiguous():
        return a
    return a.contiguous()


def rows_apart(x: Tensor, stack: Callable[[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]], Tensor]) -> Tensor:
    """stack(prepare), one row's NaN or inf kept out of the rows before it.

    `stack` hands the operands (x, w) of each product over their last axis to `prepare` first. What is read past a row's
    end can only turn a finite result into NaN, so a finite result is right; one that is not is made again, from
    operands filled up with zeros to whole blocks.
    """
    result = stack(lambda a, b: (a, b))
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not amx() or bool(result.isfinite().all()):
        return result
    return stack(_whole_blocks)


def _whole_blocks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    missing = -a.shape[-1] % BLOCK
    return (F.pad(a, (0, missing)), F.pad(b, (0, missing))) if missing else (a.contiguous(), b)
