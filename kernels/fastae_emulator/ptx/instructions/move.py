"""Registers and memory: mov, ld, st."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.errors import MisalignedError, OutOfBoundsError
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.table import Step, implements

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine

_TYPES = "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
_HINT = (
    "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate? L2::64B|L2::128B|L2::256B?"
)


@implements("mov", "pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64")
def move(d: Decoder) -> Step:
    """Also packs a vector into one register, or unpacks it (PTX ISA 9.7.9.4).

    Compilers pack with a half that is never used, so a pack counts as unwritten only if both halves are.
    """
    kind = d.slots[0]
    targets, sources = d.vector(d.operands[0]), d.vector(d.operands[1])
    if len(targets) == len(sources):
        pairs = [(d.store(t, kind), d.bits(s, kind)) for t, s in zip(targets, sources, strict=True)]
        if len(pairs) == 1:
            ((write, read),) = pairs
            return lambda machine: write(machine, read(machine))
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

            def pair(machine: Machine) -> None:
                lower = low(machine)
                of_lower = machine.take_taint()
                value = lower | (high(machine).astype(whole) << shift)
                if of_lower is None:
                    machine.taint = None
                elif machine.taint is not None:
                    machine.taint = machine.taint & of_lower
                write(machine, value)

            return pair

        def pack(machine: Machine) -> None:
            parts = np.broadcast_arrays(*[read(machine) for read in reads])
            machine.taint = None
            write(machine, np.stack(parts, 1).view(UNSIGNED[bits])[:, 0])

        return pack
    whole_read, writes = d.bits(sources[0], f"b{bits}"), [d.store(t, part) for t in targets]

    def unpack(machine: Machine) -> None:
        parts = np.ascontiguousarray(whole_read(machine)).view(UNSIGNED[bits // many]).reshape(-1, many)
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(parts[:, i]))

    return unpack


@implements("ld", f"param {_TYPES}")
def load_parameter(d: Decoder) -> Step:
    kind, name = d.slots[1], re.fullmatch(r"\[\s*([\w$]+)\s*\]", d.operands[1])
    if name is None:
        raise d.refuse("parameters are loaded from their start")
    write, unsigned, raw = d.write(0, kind), UNSIGNED[SCALARS[kind].bits], SCALARS[kind].raw
    return lambda machine: write(machine, machine.arguments[name.group(1)].view(unsigned)[:1].view(raw))


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

    def step(machine: Machine) -> None:
        got = machine.memory.load(machine, address(machine), count, width)
        for write, values in zip(writes, got, strict=True):
            write(machine, values.view(raw))

    return step


@implements("st", f"global {_HINT} v2|v4|v8? {_TYPES}", f"volatile global v2|v4? {_TYPES}")
@implements("st", f"release|relaxed cta|gpu|sys|cluster global {_HINT} {_TYPES}", f"global wb|cg|cs|wt v2|v4? {_TYPES}")
def store_global(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(machine: Machine) -> None:
        at, values = address(machine), _rows(machine, [read(machine) for read in reads])
        machine.require_defined("stores a value")
        machine.memory.store(machine, at, values)

    return step


def _rows(machine: Machine, values: list[Array]) -> Array:
    return np.stack([np.broadcast_to(value, (machine.lanes,)) for value in values])


def _own(machine: Machine, addresses: Array) -> tuple[Array, Array]:
    """The active lanes, and their addresses."""
    addresses = np.broadcast_to(addresses, (machine.lanes,))
    if machine.whole:
        return machine.every, addresses
    lanes = np.flatnonzero(machine.active)
    return lanes, addresses[lanes]


@implements("ld", f"volatile? shared|shared::cta v2|v4? {_TYPES}")
def load_shared(d: Decoder) -> Step:
    kind, address = d.slots[-1], d.address(d.operands[1])
    writes, width = [d.store(name, kind) for name in _targets(d, d.operands[0])], SCALARS[kind].bits // 8
    raw, count = SCALARS[kind].raw, len(writes)

    def step(machine: Machine) -> None:
        lanes, own = _own(machine, address(machine))
        got, missing = machine.shared.load(own, lanes, count, width)
        if not machine.whole:
            every = np.zeros((count, machine.lanes), got.dtype)
            every[:, lanes] = got
            got = every
        for i, write in enumerate(writes):
            if missing is not None:
                lost = np.zeros(machine.lanes, np.bool_)
                lost[lanes] = missing[i]
                machine.taint, machine.taint_origin = lost, "shared memory"
            write(machine, got[i].view(raw))

    return step


@implements("st", f"volatile? shared|shared::cta v2|v4? {_TYPES}")
def store_shared(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(machine: Machine) -> None:
        lanes, own = _own(machine, address(machine))
        rows, missing = [], []
        for read in reads:
            rows.append(read(machine))
            missing.append(machine.take_taint())
        values = _rows(machine, rows)
        machine.shared.store(own, lanes, values if machine.whole else values[:, lanes], _lost(machine, missing, lanes))

    return step


def _lost(machine: Machine, missing: list[Array | None], lanes: Array) -> Array | None:
    """[registers, lanes] whether a register was never written; None if all were."""
    if all(part is None for part in missing):
        return None
    return np.stack([np.zeros(lanes.size, np.bool_) if part is None else part[lanes] for part in missing])


@implements("ld", f"local v2|v4? {_TYPES}")
def load_local(d: Decoder) -> Step:
    kind, address = d.slots[-1], d.address(d.operands[1])
    writes, width = [d.store(name, kind) for name in _targets(d, d.operands[0])], SCALARS[kind].bits // 8
    raw = SCALARS[kind].raw

    def step(machine: Machine) -> None:
        lanes, at = _local(machine, address(machine), len(writes) * width, "reads")
        got = np.zeros((machine.lanes, len(writes) * width), np.uint8)
        got[lanes] = machine.local[lanes[:, None], at[:, None] + np.arange(len(writes) * width)]
        values = got.view(UNSIGNED[width * 8])
        for i, write in enumerate(writes):
            write(machine, np.ascontiguousarray(values[:, i]).view(raw))

    return step


@implements("st", f"local v2|v4? {_TYPES}")
def store_local(d: Decoder) -> Step:
    kind, address = f"b{SCALARS[d.slots[-1]].bits}", d.address(d.operands[0])
    reads = [d.bits(name, kind) for name in _targets(d, d.operands[1])]

    def step(machine: Machine) -> None:
        values = np.ascontiguousarray(_rows(machine, [read(machine) for read in reads]).T).view(np.uint8)
        lanes, at = _local(machine, address(machine), values.shape[1], "writes")
        machine.local[lanes[:, None], at[:, None] + np.arange(values.shape[1])] = values[lanes]

    return step


def _local(machine: Machine, addresses: Array, width: int, verb: str) -> tuple[Array, Array]:
    lanes, own = _own(machine, addresses)
    size = machine.program.local_bytes
    if own.min() < 0 or own.max() + width > size:
        first = int(np.argmax((own < 0) | (own + width > size)))
        what = f"{verb} {width} bytes at byte {int(own[first])} of local memory, which has {size}"
        machine.fail(OutOfBoundsError, what, int(lanes[first]))
    if (own % width).any():
        first = int(np.argmax(own % width != 0))
        machine.fail(MisalignedError, f"{verb} {width} bytes of local memory at {int(own[first])}", int(lanes[first]))
    return lanes, own
