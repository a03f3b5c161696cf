"""Bit operations: logic, shifts, fields, permutations (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.instructions.arithmetic import simple
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@implements("and or xor not", "pred|b16|b32|b64")
def logic(d: Decoder) -> Step:
    kind, opcode = d.slots[0], d.opcode
    plain = simple(d, kind, _LOGIC[opcode])
    if kind != "pred" or opcode not in ("and", "or"):
        return plain
    left, right, write = d.read(1, kind), d.read(2, kind), d.write(0, kind)

    def step(state: State) -> None:
        """Combine; a false operand of `and` (a true one of `or`) decides, even if the other one was never written."""
        a = left(state)
        of_a = state.take_taint()
        b = right(state)
        of_b = state.take_taint()
        if of_a is not None or of_b is not None:
            nowhere = np.zeros(1, np.bool_)
            of_a, of_b = nowhere if of_a is None else of_a, nowhere if of_b is None else of_b
            open_a, open_b = (a, b) if opcode == "and" else (~a, ~b)
            state.add_taint((of_a & (of_b | open_b)) | (of_b & (of_a | open_a)), state.taint_origin)
        write(state, a & b if opcode == "and" else a | b)

    return step


@implements("lop3", "b32")
def lookup3(d: Decoder) -> Step:
    """Apply a truth table: its bit i is the result for three bits of value i."""
    a, b, c, table = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "b32"), d.integer(d.operands[4])
    write = d.write(0, "b32")

    def step(state: State) -> None:
        parts = [read(state) for read in (a, b, c)]
        result = np.zeros(1, np.uint32)
        for i in range(8):
            if table >> i & 1:
                x, y, z = (part if i >> (2 - j) & 1 else ~part for j, part in enumerate(parts))
                result = result | (x & y & z)
        write(state, result)

    return step


@implements("shl", "b16|b32|b64")
@implements("shr", "b16|b32|b64|u16|u32|u64|s16|s32|s64")
def shift(d: Decoder) -> Step:
    """Shift; amounts beyond the width count as the width, and have 32 bits whatever the type."""
    kind = d.slots[0]
    read, amount, write = d.read(1, kind), d.read(2, "u32"), d.write(0, kind)
    bits, dtype = SCALARS[kind].bits, np.dtype(SCALARS[kind].raw).type
    move = np.left_shift if d.opcode == "shl" else np.right_shift
    signed = kind[0] == "s"

    def step(state: State) -> None:
        value, by = read(state), amount(state)
        over = by >= bits
        if not over.any():
            write(state, move(value, by.astype(dtype)))
        elif signed:
            write(state, move(value, np.minimum(by, bits - 1).astype(dtype)))
        else:
            write(state, np.where(over, dtype(0), move(value, np.minimum(by, bits - 1).astype(dtype))))

    return step


@implements("shf", "l|r wrap|clamp b32")
def funnel_shift(d: Decoder) -> Step:
    direction, mode, _ = d.slots
    low, high, amount, write = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "u32"), d.write(0, "b32")

    def step(state: State) -> None:
        by = amount(state)
        by = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = (high(state).astype(np.uint64) << np.uint64(32)) | low(state)
        moved = both >> by if direction == "r" else (both << by) >> np.uint64(32)
        write(state, moved.astype(np.uint32))

    return step


@implements("bfe", "u32|u64|s32|s64")
def extract(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits
    read, position, length = d.read(1, f"u{bits}"), d.read(2, "u32"), d.read(3, "u32")
    write = d.write(0, kind)

    def step(state: State) -> None:
        value, at, size = np.broadcast_arrays(read(state), position(state) & 255, length(state) & 255)
        wide = value.astype(np.uint64)
        if kind[0] == "s":  # the sign of the value fills the bits beyond it
            signed = value.view(np.dtype(f"i{bits // 8}")).astype(np.int64)
            wide = signed.view(np.uint64)
            field = (signed >> np.minimum(at, 63).astype(np.int64)).view(np.uint64)
        else:
            field = np.where(at >= 64, np.uint64(0), wide >> np.minimum(at, 63).astype(np.uint64))
        up = (np.uint64(64) - np.minimum(size, 64)) & np.uint64(63)
        if kind[0] == "s":
            last = np.minimum(at.astype(np.int64) + size - 1, bits - 1)
            sign = (value.view(np.dtype(f"i{bits // 8}")).astype(np.int64) >> np.maximum(last, 0)) & 1
            mask = np.where(
                size >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(size, 63).astype(np.uint64)) - np.uint64(1)
            )
            result = np.where(sign == 1, field | ~mask, field & mask)
            result = np.where(size == 0, np.uint64(0), result)
        else:
            result = np.where(size == 0, np.uint64(0), (field << up) >> up)
        write(state, result.astype(UNSIGNED[bits]).view(SCALARS[kind].raw))

    return step


@implements("bfi", "b32|b64")
def insert(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits
    field, into = d.read(1, kind), d.read(2, kind)
    position, length, write = d.read(3, "u32"), d.read(4, "u32"), d.write(0, kind)

    def step(state: State) -> None:
        at, size = (position(state) & 255).astype(np.uint64), (length(state) & 255).astype(np.uint64)
        ones = np.where(size >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(size, np.uint64(63))) - np.uint64(1))
        up = np.minimum(at, np.uint64(63))
        mask = np.where(at >= 64, np.uint64(0), ones << up)
        moved = field(state).astype(np.uint64) << up
        write(state, ((into(state) & ~mask) | (moved & mask)).astype(UNSIGNED[bits]))

    return step


@implements("prmt", "b32")
def permute(d: Decoder) -> Step:
    """Select four bytes out of eight; bit 3 of a selector spreads the sign instead."""
    low, high, selector, write = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "b32"), d.write(0, "b32")

    def step(state: State) -> None:
        a, b, s = np.broadcast_arrays(low(state), high(state), selector(state))
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(a.shape, np.uint64)
        for i in range(4):
            choice = (s >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) << np.uint64(3))) & np.uint64(255)
            byte = np.where(choice & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result |= byte << np.uint64(8 * i)
        write(state, result.astype(np.uint32))

    return step


def _count_ones(value: Array) -> Array:
    octets = np.ascontiguousarray(value).view(np.uint8).reshape(value.size, -1)
    return np.unpackbits(octets, axis=1).sum(1, dtype=np.uint32)


def _count_zeros(bits: int) -> Callable[[Array], Array]:
    def count(value: Array) -> Array:
        zeros = np.full(value.shape, bits, np.uint32)
        for i in range(bits):
            zeros = np.where(value >> value.dtype.type(i) & value.dtype.type(1), np.uint32(bits - 1 - i), zeros)
        return zeros

    return count


@implements("popc clz", "b32|b64")
def count_bits(d: Decoder) -> Step:
    kind = d.slots[0]
    read, write = d.read(1, kind), d.write(0, "u32")
    zeros = _count_zeros(SCALARS[kind].bits)
    if d.opcode == "popc":
        return lambda state: write(state, _count_ones(read(state)))
    return lambda state: write(state, zeros(read(state)))


@implements("brev", "b32|b64")
def reverse(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits

    def reversed_bits(value: Array) -> Array:
        planes = (value[:, None] >> np.arange(bits).astype(value.dtype)) & value.dtype.type(1)
        result: Array = (planes << np.arange(bits)[::-1].astype(value.dtype)).sum(1, dtype=value.dtype)
        return result

    return simple(d, kind, reversed_bits)
