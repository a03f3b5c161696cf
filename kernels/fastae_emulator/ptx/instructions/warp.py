"""Between the lanes of a warp: shuffles, votes, reductions, elections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.decoder import Decoder, Read
from fastae_emulator.ptx.errors import UndefinedError, UnsynchronisedError
from fastae_emulator.ptx.scalars import SCALARS, Array
from fastae_emulator.ptx.table import Step, implements

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine

_EMPTY = {"add": 0, "or": 0, "xor": 0, "and": -1}


def _check_mask(machine: Machine, members: Read) -> None:
    """The active lanes of a warp have to be those that the mask names (PTX ISA 9.7.9.6)."""
    mask = np.broadcast_to(members(machine), (machine.lanes,))
    machine.require_defined("uses a member mask")
    named = (mask >> machine.lane.astype(np.uint32)) & np.uint32(1) == 1
    if not machine.whole:
        of_warp = np.ascontiguousarray(machine.active).reshape(-1, 32)
        whole_warps = np.repeat(of_warp.any(1), 32)
        if (named & whole_warps & ~machine.active).any():
            machine.fail(UnsynchronisedError, "lanes that the member mask names are not active")
    if (machine.active & ~named).any():
        machine.fail(UndefinedError, "an active lane is not in the member mask")


@implements("shfl", "sync up|down|bfly|idx b32")
def shuffle(d: Decoder) -> Step:
    """PTX ISA 9.7.9.6: the third operand holds the bound in bits 0-4, the segment mask in bits 8-12."""
    mode = d.slots[1]
    names = [name.strip() for name in d.operands[0].split("|")]
    write = d.store(names[0], "b32")
    found = d.store(names[1], "pred") if len(names) > 1 else None
    read, by, bound = d.read(1, "b32"), d.read(2, "u32"), d.read(3, "u32")
    members = d.read(4, "b32")

    def step(machine: Machine) -> None:
        _check_mask(machine, members)
        lane, value = machine.lane, np.broadcast_to(read(machine), (machine.lanes,))
        unwritten = machine.take_taint()
        offset, control = by(machine).astype(np.int64) & 31, bound(machine).astype(np.int64)
        segment, clamp = (control >> 8) & 31, control & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "idx":
            source = first | (offset & ~segment)
        else:
            source = {"bfly": lane ^ offset, "up": lane - offset, "down": lane + offset}[mode]
        inside = source >= last if mode == "up" else source <= last
        position = machine.every - lane + np.where(inside, source, lane)
        if not machine.whole:
            idle = machine.active & ~machine.active[position]
            if idle.any():
                machine.fail(UndefinedError, "shuffles from a lane that is not active", int(np.argmax(idle)))
        if unwritten is not None:
            machine.add_taint(unwritten[position], machine.taint_origin)
        write(machine, value[position])
        if found is not None:
            found(machine, inside)

    return step


def _per_warp(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1, 32)


@implements("vote", "sync any|all|uni pred", "sync ballot b32")
def vote(d: Decoder) -> Step:
    """Over the active lanes of each warp."""
    mode, kind = d.slots[1:]
    read, write = d.predicate(d.operands[1]), d.write(0, kind)
    members = d.read(2, "b32")

    def step(machine: Machine) -> None:
        _check_mask(machine, members)
        ballots = read(machine)
        machine.require_defined("votes by a predicate")
        ayes = _per_warp(np.broadcast_to(ballots, (machine.lanes,)) & machine.active)
        voters = _per_warp(machine.active)
        if mode == "ballot":
            result = (ayes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "any":
            result = ayes.any(1)
        else:
            result = (ayes == voters).all(1)
            if mode == "uni":
                result |= ~ayes.any(1)
        write(machine, np.repeat(result, 32))

    return step


@implements("redux", "sync add|min|max u32|s32", "sync and|or|xor b32", "sync min|max abs? NaN? f32")
def reduce(d: Decoder) -> Step:
    operation, kind = d.slots[1], d.slots[-1]
    read, write = d.read(1, kind), d.write(0, kind)
    raw = np.dtype(SCALARS[kind].raw)
    members = d.read(2, "b32")
    absolute, nan = "abs" in d.slots, "NaN" in d.slots

    def empty() -> Array:
        if operation in _EMPTY:
            return np.array([_EMPTY[operation]]).astype(raw)
        if kind == "f32":
            return np.array([np.nan], raw) if not nan else np.array([np.inf if operation == "min" else -np.inf], raw)
        limits = np.iinfo(raw)
        return np.array([limits.max if operation == "min" else limits.min], raw)

    functions = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.minimum if nan or kind != "f32" else np.fmin, "max": np.maximum if nan or kind != "f32" else np.fmax,
    }  # fmt: skip

    def step(machine: Machine) -> None:
        _check_mask(machine, members)
        value = np.broadcast_to(read(machine), (machine.lanes,))
        machine.require_defined("reduces a value")
        value = np.where(machine.active, np.abs(value) if absolute else value, empty())
        result = functions[operation].reduce(_per_warp(value), axis=1)
        write(machine, np.repeat(result, 32).astype(raw))

    return step


@implements("elect", "sync")
def elect(d: Decoder) -> Step:
    """One active lane of each warp: here the lowest."""
    leader_name, chosen_name = (name.strip() for name in d.operands[0].split("|"))
    leader, chosen = d.store(leader_name, "u32"), d.store(chosen_name, "pred")
    members = d.read(1, "b32")

    def step(machine: Machine) -> None:
        _check_mask(machine, members)
        lowest = np.repeat(np.argmax(_per_warp(machine.active), 1), 32)
        leader(machine, lowest.astype(np.uint32))
        chosen(machine, machine.lane == lowest)

    return step
