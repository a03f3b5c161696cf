"""Atomic operations on global and shared memory, one thread after another in the order of their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.errors import RaceError
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_ORDER = "relaxed|acquire|release|acq_rel? cta|gpu|sys|cluster?"
# Triton writes `.global.gpu.acq_rel.add`, the PTX ISA `.acq_rel.gpu.global.add`; ptxas takes both.
_PLACES = (
    f"{_ORDER} global|shared|shared::cta",
    "global|shared|shared::cta cta|gpu|sys|cluster? relaxed|acquire|release|acq_rel?",
)
_KINDS = (
    "add u32|s32|u64|f32|f64", "add noftz f16|bf16|f16x2|bf16x2", "min|max u32|s32|u64|s64",
    "and|or|xor b32|b64", "exch b32|b64", "inc|dec u32",
)  # fmt: skip

_FORMS = [f"{place} {kind}" for place in _PLACES for kind in _KINDS]
_CAS = [f"{place} cas b16|b32|b64" for place in _PLACES]

_UPDATE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, x: old + x,
    "min": lambda old, x: np.minimum(old, x),
    "max": lambda old, x: np.maximum(old, x),
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - old.dtype.type(1)),
}


@implements("red", *_FORMS)
def reduce(d: Decoder) -> Step:
    return _atomic(d, "_", d.operands[0], d.operands[1:])


@implements("atom", *_FORMS, *_CAS)
def atomic(d: Decoder) -> Step:
    return _atomic(d, d.operands[0], d.operands[1], d.operands[2:])


def _atomic(d: Decoder, target: str, place: str, operands: tuple[str, ...]) -> Step:
    kind = d.slots[-1]
    operation = next(slot for slot in d.slots if slot in _UPDATE or slot == "cas")
    scalar, address = SCALARS[kind], d.address(place)
    reads, write = [d.bits(operand, kind) for operand in operands], d.store(target, f"b{scalar.bits}")
    in_shared, width = "global" not in d.slots, scalar.bits // 8

    def update(old: Array, given: list[Array]) -> Array:
        if operation == "cas":
            return np.where(old == given[0], given[1], old)
        return scalar.encode(_UPDATE[operation](scalar.decode(old), scalar.decode(given[0]))).view(old.dtype)

    def step(state: State) -> None:
        addresses = state.spread(address(state))
        given = [state.spread(read(state)) for read in reads]
        state.require_defined("updates memory with a value")
        result = np.zeros(state.lanes, UNSIGNED[scalar.bits])
        if state.tally.counting and not in_shared:
            lanes = np.flatnonzero(state.active)
            state.memory.count_request(state.tally, addresses[lanes], lanes, width, write=True)
        for lane in np.flatnonzero(state.active).tolist():
            cell = _cell(state, addresses[lane : lane + 1], lane, width, in_shared).view(scalar.raw)
            old = cell.copy()
            result[lane : lane + 1] = old.view(result.dtype)
            cell[:] = update(old, [value[lane : lane + 1] for value in given])
        write(state, result)

    return step


def _cell(state: State, address: Array, lane: int, width: int, in_shared: bool) -> Array:
    """View of the bytes that one lane updates, checked."""
    lanes = np.array([lane])
    if in_shared:
        shared = state.shared
        at = int(shared.index(address, lanes, width, "updates")[0])
        owner = shared.writer[at : at + width]
        if ((owner != 0) & (owner != state.warp_code[lane])).any():
            state.fail(
                RaceError, f"updates byte {int(address[0])} of shared memory: written since the last barrier", lane
            )
        return shared.data[at : at + width]
    found, offsets = state.memory.find(state, address, lanes, width, write=True)
    if found.written is not None:
        found.written[int(offsets[0]) : int(offsets[0]) + width] = 1
    return found.data[int(offsets[0]) : int(offsets[0]) + width]
