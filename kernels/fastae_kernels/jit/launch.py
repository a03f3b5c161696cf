"""Host side of a launch: on which device, whether it is legal, the precision of its products, its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def family() -> str:
    """The GPU family of the active Triton driver, as the tile table spells it."""
    if interpreted():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    return "ampere" if target.arch < 90 else "hopper" if target.arch < 100 else "blackwell"


def aligned(*operands: Tensor) -> bool:
    """Whether rows are multiples of 16 bytes, so that they can be copied asynchronously."""
    size = operands[0].dtype.itemsize
    return all(stride == 1 or stride * size % 16 == 0 for operand in operands for stride in operand.stride())


def output(like: Tensor, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """`out`, or a fresh tensor of that shape: kernels write contiguous outputs."""
    if out is None:
        return like.new_empty(shape)
    assert out.shape == shape, f"out must be {list(shape)}; got {list(out.shape)}"
    assert out.is_contiguous(), f"out must be contiguous; got strides {out.stride()}"
    return out


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 accumulates in fp64, everything else in fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 follows torch.get_float32_matmul_precision(), other types have only one."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or interpreted():
        return "ieee"
    target = triton.runtime.driver.active.get_current_target()
    # Of AMD's chips only the MI300 family multiplies in tf32; Triton refuses it elsewhere.
    return "tf32" if target.backend == "cuda" or str(target.arch).startswith("gfx94") else "ieee"


def product(dtype: torch.dtype) -> str:
    """How tl.dot multiplies this type: half, tf32, ieee or double."""
    return "half" if dtype.itemsize == 2 else "double" if dtype == torch.float64 else dot_precision(dtype)


def unsupported_reason(tensor: Tensor) -> str | None:
    """None if kernels can be launched on this tensor, or what is missing and what to do about it."""
    if tensor.is_meta:
        return "a meta tensor holds no data"
    if interpreted():
        return None
    try:
        device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError as error:
        return f"Triton has no active driver ({error}); use a GPU, or set TRITON_INTERPRET=1 before Python starts"
    if tensor.device.type == device.type:
        return None
    return f"the active Triton driver runs on {device.type} tensors, this one is on {tensor.device}; move it there"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(kernel: Callable[..., Any], programs: int, tensor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `programs` instances along grid axis 0 on the tensor's device; an empty grid is no launch."""
    if programs:
        with on_device(tensor):
            kernel[programs,](*args, **meta)  # type: ignore[index]
