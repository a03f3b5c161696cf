"""Poisoned buffers: full of NaN between two fences, so that missing writes and writes outside show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FENCE = 4096  # elements on either side

# A NaN that no computation starts from: an element with these bits was never written, or was computed from one that was
# not (the payload of a NaN survives arithmetic on most hardware).
_PATTERNS = {
    torch.float64: (torch.int64, 0x7FF8_5A5A_5A5A_5A5A),
    torch.float32: (torch.int32, 0x7FDA_5A5A),
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
}


def fill(t: Tensor) -> Tensor:
    """Write the poison over a contiguous tensor."""
    bits, pattern = _PATTERNS[t.dtype]
    t.view(bits).fill_(pattern)
    return t


def is_poison(t: Tensor) -> Tensor:
    """Mask of the elements of a contiguous tensor that still hold the poison."""
    bits, pattern = _PATTERNS[t.dtype]
    return t.view(bits) == pattern


@dataclass
class Poison:
    """Buffers made since `poisoned()` began."""

    buffers: list[tuple[Tensor, torch.Size]] = field(default_factory=list)

    def fenced(self, shape: torch.Size, dtype: torch.dtype, device: Any) -> Tensor:
        buffer = fill(_EMPTY(shape.numel() + 2 * FENCE, dtype=dtype, device=device))
        self.buffers.append((buffer, shape))
        return buffer[FENCE : FENCE + shape.numel()].view(shape)

    def broken(self) -> str:
        """Describe the fence that was written over; empty if none was."""
        for buffer, shape in self.buffers:
            before, after = ~is_poison(buffer[:FENCE]), ~is_poison(buffer[FENCE + shape.numel() :])
            if before.any() or after.any():
                side, where = ("after", after.nonzero()[0]) if after.any() else ("before", FENCE - before.nonzero()[-1])
                count = int(before.sum() + after.sum())
                return f"{count} elements written outside a buffer {_describe(buffer, shape)}, one {int(where)} {side}"
        return ""

    def unwritten(self) -> str:
        """Describe the buffer that was not written whole; empty if all were."""
        for buffer, shape in self.buffers:
            left = is_poison(buffer[FENCE : FENCE + shape.numel()])
            if left.any():
                where = [int(i) for i in left.view(shape).nonzero()[0]] if shape else []
                return f"{int(left.sum())} elements of a buffer {_describe(buffer, shape)} never written, as at {where}"
        return ""


def _describe(buffer: Tensor, shape: torch.Size) -> str:
    return f"{list(shape)} of {str(buffer.dtype).removeprefix('torch.')}"


_EMPTY, _NEW_EMPTY, _EMPTY_LIKE = torch.empty, torch.Tensor.new_empty, torch.empty_like


@contextmanager
def poisoned(complete: bool = False) -> Iterator[Poison]:
    """Make `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return poisoned, fenced floating-point tensors.

    Raises AssertionError at the end if a fence was written over and, with `complete`, if anything inside a buffer was
    not written. Calls that name more than a dtype (and, for `torch.empty`, a device) are left alone.
    """
    poison = Poison()

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **others: Any) -> Tensor:
        wanted = dtype or torch.get_default_dtype()
        if others or wanted not in _PATTERNS:
            return _EMPTY(*size, dtype=dtype, device=device, **others)
        return poison.fenced(_shape(size), wanted, device)

    def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        wanted = dtype or like.dtype
        if others or wanted not in _PATTERNS:  # the interpreter's own copies name a device
            return _NEW_EMPTY(like, *size, dtype=wanted, **others)
        return poison.fenced(_shape(size), wanted, like.device)

    def empty_like(like: Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        wanted = dtype or like.dtype
        if others or wanted not in _PATTERNS:
            return _EMPTY_LIKE(like, dtype=wanted, **others)
        return poison.fenced(like.shape, wanted, like.device)

    _install(empty, new_empty, empty_like)
    try:
        yield poison
    finally:
        _install(_EMPTY, _NEW_EMPTY, _EMPTY_LIKE)
    problem = poison.broken() or (poison.unwritten() if complete else "")
    if problem:
        raise AssertionError(problem)


def _install(empty: Any, new_empty: Any, empty_like: Any) -> None:
    torch.empty, torch.empty_like = empty, empty_like
    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]


def _shape(size: tuple[Any, ...]) -> torch.Size:
    return torch.Size(size[0] if len(size) == 1 and isinstance(size[0], tuple | list) else size)
