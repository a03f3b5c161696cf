"""Whether the kernels can take tensors, or PyTorch's own ops must: subclasses, transforms, exporting; TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def kernels_take(function: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether all is as kernels and `autograd.Function`s need it: dense plain tensors and no transform at work.

    Where not (a DTensor or another subclass, a sparse or nested tensor, `torch.func`, forward-mode derivatives,
    `torch.export`, whose graphs should need no fastae), the caller computes with PyTorch's own ops. Raises RuntimeError
    under `torch.jit.trace`.
    """
    if torch._C._get_tracing_state() is not None:
        refuse_torchscript(function)
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.compiler.is_compiling() and torch.compiler.is_exporting())
    ):
        return False
    if type(x) in _PLAIN and x.layout is torch.strided:
        for t in others:
            if t is not None and (type(t) not in _PLAIN or t.layout is not torch.strided):
                break
        else:
            return True
    return False


def refuse_torchscript(function: str) -> None:
    """RuntimeError that names the ways out."""
    raise RuntimeError(
        f"{function}: the caller must not be TorchScript (torch.jit.trace, torch.jit.script, "
        "torch.onnx.export(dynamo=False)), which fastae does not support; use torch.compile, torch.export.export or "
        "torch.onnx.export(dynamo=True), or undo fastae.patch by fastae.unpatch(model)"
    )
