"""Checks of the arguments of public functions, and whether kernels support them or PyTorch's own ops must compute."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'relu'?` for the valid name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(str(name), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def whole_number(function: str, name: str, value: object, least: int | None = None) -> int:
    """The value as an int. Raises TypeError for what is no whole number, ValueError below `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{function}: {name} must be a whole number; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{function}: {name} must be at least {least}; got {number}")
    return number


def seed_number(function: str, value: object) -> int:
    """The value as a seed of PyTorch's generators. Raises as `whole_number` does, ValueError beyond their range."""
    seed = whole_number(function, "seed", value)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{function}: seed must be a whole number of 64 bits; got {seed}")
    return seed


def admit(
    function: str, names: Sequence[str], tensors: Sequence[Any], optional: Container[str] = ()
) -> tuple[Sequence[Any], bool]:
    """The tensors (None where optional) as an op takes them, and whether the kernels support them.

    They come back as autocast casts the arguments of `F.linear`. Where kernels do not support them (a DTensor or
    another subclass, a sparse or nested tensor, `torch.func`, forward-mode derivatives, `torch.export`, whose graphs
    should need no fastae), the caller computes with PyTorch's own ops.

    Raises TypeError for what is no tensor, not floating point, of mixed dtypes or partly DTensors, ValueError for mixed
    devices, RuntimeError under TorchScript.
    """
    first = tensors[0]
    if type(first) in _PLAIN and not special():
        dtype, device, lacks = first.dtype, first.device, False
        for t in tensors:
            if t is None:
                lacks = True
            elif type(t) not in _PLAIN or t.dtype is not dtype or t.layout is not torch.strided or t.device != device:
                break
        else:
            whole = not lacks or all(t is not None or n in optional for n, t in zip(names, tensors, strict=True))
            if whole and dtype in FLOATS:
                return tensors, True
    given = dict(zip(names, tensors, strict=True))
    require_tensors(function, **{name: t for name, t in given.items() if t is not None or name not in optional})
    if (cast := autocast_dtype(first)) is not None:
        given = {name: None if t is None else autocast(t, cast) for name, t in given.items()}
    check_tensors(function, **given)
    supported = supports_kernels(function, *given.values())
    if not supported:
        all_dtensors(function, **given)
    return list(given.values()), supported


def special() -> bool:
    """Whether a transform, a trace or autocast may be at work."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


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


def supports_kernels(function: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether all is as kernels and `autograd.Function`s need it: dense plain tensors and no transform at work.

    Raises RuntimeError under `torch.jit.trace`.
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
