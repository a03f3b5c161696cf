"""A step on static memory as the bare list of its calls: for the twins on a CPU what a captured graph is on a GPU.

At tabular sizes a step is some forty calls of one to five microseconds, and the Python that decides on them takes as
long as they do. It decides the same every time, so the sequence of calls is recorded once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Calls that read only metadata; calls that only allocate
METADATA_CALLS = frozenset({"__get__", "__len__", "dim", "size", "stride", "numel", "is_contiguous", "element_size"})
ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty"})

Call = Callable[[], object]


class Recorder(TorchFunctionMode):
    """Notes the calls that write into memory while it is active, and whether repeating them repeats the function.

    sections: (name, first call, the next one's) of those made inside `section`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.sections: list[tuple[str, int, int]] = []
        self.repeatable = True
        self._apart = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._apart:
            return result
        name = func.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or kwargs.get("out") is not None or kwargs.get("grad_input") is not None:
            self.calls.append(partial(func, *args, **kwargs))
        elif name not in METADATA_CALLS | ALLOCATIONS:
            self.repeatable &= isinstance(result, Tensor) and _is_view(result, (args, kwargs))
        return result

    def apart(self, call: Call) -> None:
        """Make a call that is to be repeated as a whole, whatever it does."""
        self.calls.append(call)
        self._apart = True
        try:
            call()
        finally:
            self._apart = False

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        first = len(self.calls)
        yield
        self.sections.append((name, first, len(self.calls)))


def _is_view(result: Tensor, arguments: Any) -> bool:
    storage = result.untyped_storage()._cdata
    return any(t.untyped_storage()._cdata == storage for t in tree_leaves(arguments) if isinstance(t, Tensor))
