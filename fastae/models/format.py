"""Shared by saving and loading: the classes that have files, the modules of a description, checks for NaN and inf."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)

# The name in a file -> the class that it makes; a class joins by `class C(Autoencoder, saved_as="fastae.C")`
MODELS: dict[str, type] = {}
VERSION = 1

# dtype -> (integers of its size, the bits that all are set in NaN and inf, and in no other number)
EXPONENTS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
}
_AT_ONCE = 1 << 16  # numbers looked at together: they stay in the cache


class _Uninitialised(TorchFunctionMode):
    """While it is entered, `torch.nn.init` leaves parameters as they are: initial values of no use take most time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(kind: Callable[..., Model], config: dict[str, Any]) -> Model:
    """Make the modules that the constructor makes, on the meta device: nothing is allocated, no random number drawn."""
    with _Uninitialised():
        return kind(**config, device="meta")


def tensors_of(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """List what a state_dict holds: name -> (the module's dict that holds it, its key there)."""
    return {
        f"{prefix}.{key}" if prefix else key: (holder, key)
        for prefix, module in model.named_modules()
        for holder in (module._parameters, module._buffers)
        for key, tensor in holder.items()
        if tensor is not None and key not in module._non_persistent_buffers_set
    }


def listed(differences: list[str], most: int = 4) -> str:
    """Join them in one line; from the `most`-th on they are counted."""
    more = len(differences) - most
    return "; ".join([*differences[:most], *([f"and {more} more"] if more > 0 else [])])


def memory_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU. (`tensor.numpy()` would forbid FSDP to resize its storage.)"""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def not_finite(name: str, tensor: Tensor) -> str | None:
    """Count NaN and inf in a contiguous tensor on the CPU: None if there are none."""
    integers, exponent = EXPONENTS[tensor.dtype]
    bits = np.frombuffer(memory_of(tensor), integers)
    if all((bits[i : i + _AT_ONCE] & exponent).max() < exponent for i in range(0, len(bits), _AT_ONCE)):
        return None
    return _counted(name, "NaN or inf", (bits & exponent) == exponent, tensor.shape)


def zero_scale(scale: Tensor) -> str | None:
    """Count zeros in a scaler's scale: None if there are none."""
    zeros = (scale == 0).numpy()
    return _counted("scaler.scale", "0", zeros, scale.shape) if zeros.any() else None


def _counted(name: str, what: str, bad: np.ndarray[Any, Any], shape: torch.Size) -> str:
    places = np.flatnonzero(bad)
    first = [int(index) for index in np.unravel_index(places[0], shape)]
    return f"{what} in {name}: {len(places)} of {bad.size}, the first at {first}"
