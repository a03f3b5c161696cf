"""Triton's interpreter, without the search that it begins every call of a jit function with."""

import inspect

import triton.language as tl
from triton.runtime import interpreter

# It looks through all of `tl` for builtins to replace, a quarter of what these tests take: which there are stays the
# same, so they are looked up once. What is replaced, and when, is Triton's own.
_places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
_builtins = {place: [name for name, m in inspect.getmembers(place) if tl.core.is_builtin(m)] for place in _places}
_search = interpreter._patch_builtin


def _replace(place: object, builder: object, scope: object) -> None:
    if place not in _builtins:
        _search(place, builder, scope)
        return
    for name in _builtins[place]:
        member = getattr(place, name)
        if tl.core.is_builtin(member):  # not in a call from a kernel, whose replacements stand already
            interpreter._patch_attr(place, name, member, builder, scope)


interpreter._patch_builtin = _replace
