"""Exchanges between the lanes of a warp: shuffles, votes, reductions, elections."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.decoder import Decoder, Read
from fastae_emulator.ptx.errors import UndefinedError, UnsynchronisedError
from fastae_emulator.ptx.scalars import SCALARS, Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_EMPTY = {"add": 0, "or": 0, "xor": 0, "and": -1}


def _check_mask(state: State, members: Read) -> None:
    """Check that the active lanes of a warp are those that the mask names (PTX ISA 9.7.9.6)."""
    mask = state.spread(members(state))
    state.require_defined("uses a member mask")
    named = (mask >> state.lane.astype(np.uint32)) & np.uint32(1) == 1
    if not state.whole:
        of_warp = np.ascontiguousarray(state.active).reshape(-1, 32)
        whole_warps = np.repeat(of_warp.any(1), 32)
        if (named & whole_warps & ~state.active).any():
            state.fail(UnsynchronisedError, "lanes that the member mask names are not active")
    if (state.active & ~named).any():
        state.fail(UndefinedError, "an active lane is not in the member mask")


@implements("shfl", "sync up|down|bfly|idx b32")
def shuffle(d: Decoder) -> Step:
    """Shuffle; the third operand holds the bound in bits 0-4, the segment mask in bits 8-12 (PTX ISA 9.7.9.6)."""
    mode = d.slots[1]
    names = [name.strip() for name in d.operands[0].split("|")]
    write = d.store(names[0], "b32")
    found = d.store(names[1], "pred") if len(names) > 1 else None
    read, by, bound = d.read(1, "b32"), d.read(2, "u32"), d.read(3, "u32")
    members = d.read(4, "b32")

    def step(state: State) -> None:
        _check_mask(state, members)
        lane, value = state.lane, state.spread(read(state))
        unwritten = state.take_taint()
        offset, control = by(state).astype(np.int64) & 31, bound(state).astype(np.int64)
        segment, clamp = (control >> 8) & 31, control & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "idx":
            source = first | (offset & ~segment)
        else:
            source = {"bfly": lane ^ offset, "up": lane - offset, "down": lane + offset}[mode]
        inside = source >= last if mode == "up" else source <= last
        position = state.every - lane + np.where(inside, source, lane)
        if not state.whole:
            inactive = state.active & ~state.active[position]
            if inactive.any():
                state.fail(UndefinedError, "shuffles from a lane that is not active", int(np.argmax(inactive)))
        if unwritten is not None:
            state.add_taint(unwritten[position], state.taint_origin)
        write(state, value[position])
        if found is not None:
            found(state, inside)

    return step


def _per_warp(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1, 32)


@implements("vote", "sync any|all|uni pred", "sync ballot b32")
def vote(d: Decoder) -> Step:
    """Vote over the active lanes of each warp."""
    mode, kind = d.slots[1:]
    read, write = d.predicate(d.operands[1]), d.write(0, kind)
    members = d.read(2, "b32")

    def step(state: State) -> None:
        _check_mask(state, members)
        ballots = read(state)
        state.require_defined("votes by a predicate")
        ayes = _per_warp(state.spread(ballots) & state.active)
        voters = _per_warp(state.active)
        if mode == "ballot":
            result = (ayes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "any":
            result = ayes.any(1)
        else:
            result = (ayes == voters).all(1)
            if mode == "uni":
                result |= ~ayes.any(1)
        write(state, np.repeat(result, 32))

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

    def step(state: State) -> None:
        _check_mask(state, members)
        value = state.spread(read(state))
        state.require_defined("reduces a value")
        value = np.where(state.active, np.abs(value) if absolute else value, empty())
        result = functions[operation].reduce(_per_warp(value), axis=1)
        write(state, np.repeat(result, 32).astype(raw))

    return step


@implements("elect", "sync")
def elect(d: Decoder) -> Step:
    """Elect one active lane of each warp: here the lowest."""
    leader_name, chosen_name = (name.strip() for name in d.operands[0].split("|"))
    leader, chosen = d.store(leader_name, "u32"), d.store(chosen_name, "pred")
    members = d.read(1, "b32")

    def step(state: State) -> None:
        _check_mask(state, members)
        lowest = np.repeat(np.argmax(_per_warp(state.active), 1), 32)
        leader(state, lowest.astype(np.uint32))
        chosen(state, state.lane == lowest)

    return step
