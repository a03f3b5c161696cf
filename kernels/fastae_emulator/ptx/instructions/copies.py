"""Asynchronous copies into shared memory (cp.async, PTX ISA 9.7.9.25) and mbarriers (9.7.13.15)."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.errors import MisalignedError, UndefinedError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_PREFETCH = "L2::64B|L2::128B|L2::256B?"


@implements("cp", f"async ca|cg shared|shared::cta global {_PREFETCH}")
def copy(d: Decoder) -> Step:
    """Copy asynchronously; bytes beyond the source size, the fourth operand, become zero."""
    width = d.integer(d.operands[2])
    if width not in ((16,) if d.slots[1] == "cg" else (4, 8, 16)) or len(d.operands) > 4:
        raise d.refuse("cp.async of this size or with these operands")
    target, source = d.address(d.operands[0]), d.address(d.operands[1])
    wanted = d.read(3, "u32") if len(d.operands) == 4 else None
    unit = min(8, width)

    def step(state: State) -> None:
        active, whole = state.active, state.whole
        lanes, to = state.own(target(state))
        start = state.spread(source(state))
        sizes = state.spread(wanted(state)) if wanted else np.full(state.lanes, width)
        if (sizes[lanes] > width).any():
            state.fail(UndefinedError, f"cp.async of more than {width} bytes")
        got = np.zeros((width // unit, state.lanes), f"u{unit}")
        for size in np.unique(sizes[lanes]):
            if size == 0:
                continue
            state.active = active & (sizes == size)
            state.whole = whole and bool(state.active.all())
            if size == width:
                got = np.where(state.active, state.memory.load(state, start, width // unit, unit), got)
            else:
                got = np.where(state.active, _partial(state, start, int(size), width, unit), got)
        state.active, state.whole = active, whole
        at = state.shared.index(to, lanes, width, "copies")
        elements = at // unit + np.arange(width // unit)[:, None]
        state.pending.issue(lanes, elements, unit, got[:, lanes])

    return step


def _partial(state: State, addresses: Array, size: int, width: int, unit: int) -> Array:
    """Load the first `size` bytes, the rest being zero; the address must be aligned for the whole copy."""
    wrong = state.active & (addresses % width != 0)
    if wrong.any():
        state.fail(MisalignedError, f"copies from an address that is no multiple of {width}", int(np.argmax(wrong)))
    octets = np.zeros((state.lanes, width), np.uint8)
    octets[:, :size] = state.memory.load(state, addresses, size, 1).T
    return octets.view(f"u{unit}").T


@implements("cp", "async commit_group")
def commit(d: Decoder) -> Step:
    return lambda state: state.pending.commit_copies()


@implements("cp", "async wait_group", "async wait_all")
def wait(d: Decoder) -> Step:
    allowed = d.integer(d.operands[0]) if d.operands else None
    return lambda state: state.pending.wait_copies(allowed)


# ------------------------------------------------------------ mbarriers

_SPACE = "shared|shared::cta"


@implements("mbarrier", f"init {_SPACE} b64", f"inval {_SPACE} b64")
def set_up(d: Decoder) -> Step:
    address, create = d.address(d.operands[0]), d.slots[0] == "init"
    count = d.integer(d.operands[1]) if create else 0
    return lambda state: state.mbarriers.set_up(address(state), count if create else None)


@implements("mbarrier", f"arrive {_SPACE} b64")
def arrive(d: Decoder) -> Step:
    if d.operands[0] != "_" or len(d.operands) != 2:
        raise d.refuse("the state and the count of an arrival")
    address = d.address(d.operands[1])
    return lambda state: state.mbarriers.arrive(address(state), covers=False)


@implements("mbarrier", f"try_wait|test_wait parity {_SPACE} b64")
def try_wait(d: Decoder) -> Step:
    write, address, parity = d.write(0, "pred"), d.address(d.operands[1]), d.read(2, "u32")
    return lambda state: write(state, state.mbarriers.test(address(state), parity(state)))
