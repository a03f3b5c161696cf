"""Comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.scalars import Array, flush
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

Comparison = Callable[[Array, Array], Array]

_ORDERED: dict[str, Comparison] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_FLOAT = "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"


def comparison(name: str) -> Comparison:
    """Comparison by name; ordered ones are false if an operand is NaN, those with a u are true (PTX ISA 9.3.1.2)."""
    name = _UNSIGNED.get(name, name)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    plain = _ORDERED[name[:2]]
    if len(name) == 3:
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & (a == a) & (b == b)
    return plain


@implements("setp", "eq|ne|lt|le|gt|ge and|or|xor? s16|s32|s64", "eq|ne and|or|xor? b16|b32|b64")
@implements("setp", "eq|ne|lt|le|gt|ge|lo|ls|hi|hs and|or|xor? u16|u32|u64")
@implements("setp", f"{_FLOAT} and|or|xor? ftz? f32", f"{_FLOAT} and|or|xor? f64|f16|bf16|f16x2|bf16x2")
def set_predicate(d: Decoder) -> Step:
    """Set `p|q`: q is the opposite, or for packed types the upper half (PTX ISA 9.7.6.2)."""
    compare, combine, kind = d.slots[0], d.slots[1], d.slots[-1]
    packed = kind.endswith("x2")
    a, b = d.read(1, kind), d.read(2, kind)
    test = comparison(compare) if "f" in kind else _ORDERED[_UNSIGNED.get(compare, compare)]  # integers have no NaN
    names = [name.strip() for name in d.operands[0].split("|")]
    writes = [d.store(name, "pred") for name in names]
    other = d.predicate(d.operands[3]) if combine else None
    merge = _COMBINE.get(combine)
    if packed and (combine or len(names) != 2):
        raise d.refuse("packed comparisons need two predicates and no third operand")

    def step(state: State) -> None:
        left, right = a(state), b(state)
        if "ftz" in d.slots:
            left, right = flush(left), flush(right)
        result = test(left, right)
        if packed:
            writes[0](state, np.ascontiguousarray(result[:, 0]))
            writes[1](state, np.ascontiguousarray(result[:, 1]))
            return
        opposite = ~result if len(writes) == 2 else result
        if other is not None and merge is not None:
            third = other(state)
            result, opposite = merge(result, third), merge(opposite, third)
        writes[0](state, result)
        if len(writes) == 2:
            writes[1](state, opposite)

    if not packed and len(writes) == 1 and other is None and "ftz" not in d.slots:
        (write,) = writes
        return lambda state: write(state, test(a(state), b(state)))
    return step


@implements("selp", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64")
def select(d: Decoder) -> Step:
    kind = d.slots[0]
    yes, no, which, write = d.read(1, kind), d.read(2, kind), d.predicate(d.operands[3]), d.write(0, kind)

    def step(state: State) -> None:
        chosen = which(state)
        by = state.take_taint()
        left = yes(state)
        of_left = state.take_taint()
        right = no(state)
        if by is not None or of_left is not None or state.taint is not None:  # only the chosen operand counts
            of_right = state.take_taint()
            nowhere = np.zeros(1, np.bool_)
            taint = np.where(chosen, nowhere if of_left is None else of_left, nowhere if of_right is None else of_right)
            state.add_taint(taint if by is None else taint | by, state.taint_origin)
        write(state, np.where(chosen, left, right))

    return step
