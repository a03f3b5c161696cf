"""Moves, loads and stores: mov, ld, st."""

from __future__ import annotations

import re

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.errors import MisalignedError, OutOfBoundsError
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_TYPES = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
_HINT = (
    "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate? L2::64B|L2::128B|L2::256B?"
)


@implements("mov", "pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64")
def move(d: Decoder) -> Step:
    """Move a register, pack a vector into one register, or unpack it (PTX ISA 9.7.9.4).

    Compilers pack with a half that is never used, so a pack counts as unwritten only if both halves are.
    """
    kind = d.slots[0]
    targets, sources = d.vector(d.operands[0]), d.vector(d.operands[1])
    if len(targets) == len(sources):
        pairs = [(d.store(t, kind), d.bits(s, kind)) for t, s in zip(targets, sources, strict=True)]
        if len(pairs) == 1:
            ((write, read),) = pairs
            return lambda state: write(state, read(state))
        raise d.refuse("moves of several registers at once")
    bits, many = SCALARS[kind].bits, max(len(targets), len(sources))
    if min(len(targets), len(sources)) != 1 or bits % many:
        raise d.refuse("neither packs nor unpacks")
    part = f"b{bits // many}"
    if len(sources) > 1:
        reads, write = [d.bits(s, part) for s in sources], d.store(targets[0], f"b{bits}")
        if many == 2:
            low, high = reads
            whole, shift = UNSIGNED[bits], UNSIGNED[bits](bits // 2)

            def pair(state: State) -> None:
                lower = low(state)
                of_lower = state.take_taint()
                value = lower | (high(state).astype(whole) << shift)
                if of_lower is None:
                    state.taint = None
                elif state.taint is not None:
                    state.taint = state.taint & of_lower
                write(state, value)

            return pair

        def pack(state: State) -> None:
            parts = np.broadcast_arrays(*[read(state) for read in reads])
            state.taint = None
            write(state, np.stack(parts, 1).view(UNSIGNED[bits])[:, 0])

        return pack
    whole_read, writes = d.bits(sources[0], f"b{bits}"), [d.store(t, part) for t in targets]

    def unpack(state: State) -> None:
        parts = np.ascontiguousarray(whole_read(state)).view(UNSIGNED[bits // many]).reshape(-1, many)
        for i, write in enumerate(writes):
            write(state, np.ascontiguousarray(parts[:, i]))

    return unpack


@implements("ld", f"param {_TYPES}")
def load_parameter(d: Decoder) -> Step:
    kind, name = d.slots[1], re.fullmatch(r"\[\s*([\w$]+)\s*\]", d.operands[1])
    if name is None:
        raise d.refuse("parameters are loaded from their start")
    write, unsigned, raw = d.write(0, kind), UNSIGNED[SCALARS[kind].bits], SCALARS[kind].raw
    return lambda state: write(state, state.arguments[name.group(1)].view(unsigned)[:1].view(raw))


def _targets(d: Decoder, operand: str) -> list[str]:
    names = d.vector(operand)
    wanted = next((int(slot[1:]) for slot in d.slots if re.fullmatch(r"v\d", slot)), 1)
    if len(names) != wanted:
        raise d.refuse(f"{wanted} registers needed")
    return names


@implements("ld", f"global nc? {_HINT} v2|v4|v8? {_TYPES}", f"volatile global v2|v4? {_TYPES}")
@implements(
    "ld", f"acquire|relaxed cta|gpu|sys|cluster global {_HINT} {_TYPES}", f"global cg|ca|cs|lu|cv v2|v4? {_TYPES}"
)
def load_global(d: Decoder) -> Step:
    kind, address = d.slots[-1], d.address(d.operands[1])
    writes, width = [d.store(name, kind) for name in _targets(d, d.operands[0])], SCALARS[kind].bits // 8
    raw, count = SCALARS[kind].raw, len(writes)

    def step(state: State) -> None:
        got = state.memory.load(state, address(state), count, width)
        for write, values in zip(writes, got, strict=True):
            write(state, values.view(raw))

    return step


@implements("st", f"global {_HINT} v2|v4|v8? {_TYPES}", f"volatile global v2|v4? {_TYPES}")
@implements("st", f"release|relaxed cta|gpu|sys|cluster global {_HINT} {_TYPES}", f"global wb|cg|cs|wt v2|v4? {_TYPES}")
def store_global(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(state: State) -> None:
        at, values = address(state), _rows(state, [read(state) for read in reads])
        state.require_defined("stores a value")
        state.memory.store(state, at, values)

    return step


def _rows(state: State, values: list[Array]) -> Array:
    return np.stack([state.spread(value) for value in values])


@implements("ld", f"volatile? shared|shared::cta v2|v4? {_TYPES}")
def load_shared(d: Decoder) -> Step:
    kind, address = d.slots[-1], d.address(d.operands[1])
    writes, width = [d.store(name, kind) for name in _targets(d, d.operands[0])], SCALARS[kind].bits // 8
    raw, count = SCALARS[kind].raw, len(writes)

    def step(state: State) -> None:
        lanes, own = state.own(address(state))
        got, missing = state.shared.load(own, lanes, count, width)
        if not state.whole:
            every = np.zeros((count, state.lanes), got.dtype)
            every[:, lanes] = got
            got = every
        for i, write in enumerate(writes):
            if missing is not None:
                lost = np.zeros(state.lanes, np.bool_)
                lost[lanes] = missing[i]
                state.taint, state.taint_origin = lost, "shared memory"
            write(state, got[i].view(raw))

    return step


@implements("st", f"volatile? shared|shared::cta v2|v4? {_TYPES}")
def store_shared(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(state: State) -> None:
        lanes, own = state.own(address(state))
        rows, missing = [], []
        for read in reads:
            rows.append(read(state))
            missing.append(state.take_taint())
        values = _rows(state, rows)
        state.shared.store(own, lanes, values if state.whole else values[:, lanes], _lost(state, missing, lanes))

    return step


def _lost(state: State, missing: list[Array | None], lanes: Array) -> Array | None:
    """Mask [registers, lanes] of registers that were never written; None if all were."""
    if all(part is None for part in missing):
        return None
    return np.stack([np.zeros(lanes.size, np.bool_) if part is None else part[lanes] for part in missing])


@implements("ld", f"local v2|v4? {_TYPES}")
def load_local(d: Decoder) -> Step:
    kind, address = d.slots[-1], d.address(d.operands[1])
    writes, width = [d.store(name, kind) for name in _targets(d, d.operands[0])], SCALARS[kind].bits // 8
    raw = SCALARS[kind].raw

    def step(state: State) -> None:
        lanes, at = _local(state, address(state), len(writes) * width, "reads")
        got = np.zeros((state.lanes, len(writes) * width), np.uint8)
        got[lanes] = state.local[lanes[:, None], at[:, None] + np.arange(len(writes) * width)]
        values = got.view(UNSIGNED[width * 8])
        for i, write in enumerate(writes):
            write(state, np.ascontiguousarray(values[:, i]).view(raw))

    return step


@implements("st", f"local v2|v4? {_TYPES}")
def store_local(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(state: State) -> None:
        values = np.ascontiguousarray(_rows(state, [read(state) for read in reads]).T).view(np.uint8)
        lanes, at = _local(state, address(state), values.shape[1], "writes")
        state.local[lanes[:, None], at[:, None] + np.arange(values.shape[1])] = values[lanes]

    return step


def _local(state: State, addresses: Array, width: int, verb: str) -> tuple[Array, Array]:
    lanes, own = state.own(addresses)
    size = state.program.local_bytes
    if own.min() < 0 or own.max() + width > size:
        first = int(np.argmax((own < 0) | (own + width > size)))
        what = f"{verb} {width} bytes at byte {int(own[first])} of local memory, which has {size}"
        state.fail(OutOfBoundsError, what, int(lanes[first]))
    if (own % width).any():
        first = int(np.argmax(own % width != 0))
        state.fail(MisalignedError, f"{verb} {width} bytes of local memory at {int(own[first])}", int(lanes[first]))
    return lanes, own
