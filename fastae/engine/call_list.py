"""A step on static memory as the bare list of its calls: for the twins on a CPU what a captured graph is on a GPU.

At tabular sizes a step is some forty calls of one to five microseconds, and the Python that decides on them takes as
long as they do. It decides the same every time, so the calls are noted once and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What tells of a tensor without reading its numbers, and memory that some later call fills.
_TELL = frozenset({"__get__", "__len__", "dim", "size", "stride", "numel", "is_contiguous", "element_size"})
_MEMORY = frozenset({"empty", "empty_like", "new_empty"})


class Replay:
    """The calls that wrote into memory while a function ran, to be made again on the same memory."""

    def __init__(self, calls: list[Callable[[], object]], memory: Sequence[Tensor]) -> None:
        self._calls, self._memory = calls, memory
        self._addresses = [t.data_ptr() for t in memory]

    def holds(self) -> bool:
        """Whether the tensors are still where they were; `Module.to`, say, moves parameters."""
        return [t.data_ptr() for t in self._memory] == self._addresses

    def __call__(self) -> None:
        for call in self._calls:
            call()


def record(function: Callable[[], object], memory: Sequence[Tensor]) -> Replay | None:
    """Run `function` and note its calls; None if some made new memory or read numbers, and so cannot be repeated.

    `memory`: tensors whose storage others may replace.
    """
    with _Recorder() as recorder:
        function()
    return Replay(recorder.calls, memory) if recorder.repeatable else None


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.repeatable = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or "out" in kwargs or "grad_input" in kwargs:
            self.calls.append(partial(func, *args, **kwargs))
        elif name not in _TELL | _MEMORY:
            self.repeatable &= isinstance(result, Tensor) and _is_view(result, (args, kwargs))
        return result


def _is_view(result: Tensor, arguments: Any) -> bool:
    storage = result.untyped_storage()._cdata
    return any(t.untyped_storage()._cdata == storage for t in tree_leaves(arguments) if isinstance(t, Tensor))
