"""What the checks of several public functions share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'relu'?` for the valid name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_tensors(function: str, **tensors: object) -> None:
    """Each is a torch.Tensor."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} must be a torch.Tensor; got {type(t).__name__}")


def is_dtensor(t: object) -> bool:
    """Whether t is a DTensor; what defines those is not imported for it."""
    return hasattr(t, "device_mesh")


def all_dtensors(function: str, **tensors: Tensor | None) -> bool:
    """Whether all are DTensors, which PyTorch's own ops shard; a TypeError where some are and some are not."""
    if not any(map(is_dtensor, tensors.values())):
        return False
    plain = [name for name, t in tensors.items() if t is not None and not is_dtensor(t)]
    if not plain:
        return True
    sharded = next(name for name, t in tensors.items() if is_dtensor(t))
    raise TypeError(
        f"{function}: {sharded} must be plain as {plain[0]} is; got a DTensor: call the module that fully_shard "
        "was given (for its other methods, register_fsdp_forward_method), or gather the tensor with .full_tensor()"
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks of a floating-point argument, or None where it is off or leaves x alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t as autocast hands it to an op: in `dtype`, but for fp64 and what is not floating point."""
    return t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


def check_tensors(function: str, **tensors: Tensor | None) -> None:
    """All of one supported floating-point dtype and on one device; the first argument sets the example."""
    first, *others = ((name, t) for name, t in tensors.items() if t is not None)
    name, x = first
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: {name} must be float32, float16, bfloat16 or float64; got {_short(x.dtype)}")
    for other, t in others:
        if t.dtype != x.dtype:
            raise TypeError(f"{function}: {other} must be {_short(x.dtype)} as {name} is; got {_short(t.dtype)}")
        if t.device != x.device:
            raise ValueError(f"{function}: {other} must be on {x.device} as {name} is; got {t.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
