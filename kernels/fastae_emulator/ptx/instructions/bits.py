"""Bits: logic, shifts, fields, permutations (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.instructions.arithmetic import simple
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.table import Step, implements

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@implements("and or xor not", "pred|b16|b32|b64")
def logic(d: Decoder) -> Step:
    kind, opcode = d.slots[0], d.form.opcode
    plain = simple(d, kind, _LOGIC[opcode])
    if kind != "pred" or opcode not in ("and", "or"):
        return plain
    left, right, write = d.read(1, kind), d.read(2, kind), d.write(0, kind)

    def step(machine: Machine) -> None:
        """A false operand of `and` (a true one of `or`) decides, whatever the other one is."""
        a = left(machine)
        of_a = machine.take_taint()
        b = right(machine)
        of_b = machine.take_taint()
        if of_a is not None or of_b is not None:
            nowhere = np.zeros(1, np.bool_)
            of_a, of_b = nowhere if of_a is None else of_a, nowhere if of_b is None else of_b
            open_a, open_b = (a, b) if opcode == "and" else (~a, ~b)
            machine.add_taint((of_a & (of_b | open_b)) | (of_b & (of_a | open_a)), machine.taint_origin)
        write(machine, a & b if opcode == "and" else a | b)

    return step


@implements("lop3", "b32")
def lookup3(d: Decoder) -> Step:
    """Bit i of the table says what three bits of value i give."""
    a, b, c, table = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "b32"), d.integer(d.operands[4])
    write = d.write(0, "b32")

    def step(machine: Machine) -> None:
        parts = [read(machine) for read in (a, b, c)]
        result = np.zeros(1, np.uint32)
        for i in range(8):
            if table >> i & 1:
                x, y, z = (part if i >> (2 - j) & 1 else ~part for j, part in enumerate(parts))
                result = result | (x & y & z)
        write(machine, result)

    return step


@implements("shl", "b16|b32|b64")
@implements("shr", "b16|b32|b64|u16|u32|u64|s16|s32|s64")
def shift(d: Decoder) -> Step:
    """Amounts beyond the width count as the width; they are 32 bits whatever the type."""
    kind = d.slots[0]
    read, amount, write = d.read(1, kind), d.read(2, "u32"), d.write(0, kind)
    bits, dtype = SCALARS[kind].bits, np.dtype(SCALARS[kind].raw).type
    move = np.left_shift if d.form.opcode == "shl" else np.right_shift
    signed = kind[0] == "s"

    def step(machine: Machine) -> None:
        value, by = read(machine), amount(machine)
        over = by >= bits
        if not over.any():
            write(machine, move(value, by.astype(dtype)))
        elif signed:
            write(machine, move(value, np.minimum(by, bits - 1).astype(dtype)))
        else:
            write(machine, np.where(over, dtype(0), move(value, np.minimum(by, bits - 1).astype(dtype))))

    return step


@implements("shf", "l|r wrap|clamp b32")
def funnel_shift(d: Decoder) -> Step:
    direction, mode, _ = d.slots
    low, high, amount, write = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "u32"), d.write(0, "b32")

    def step(machine: Machine) -> None:
        by = amount(machine)
        by = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = (high(machine).astype(np.uint64) << np.uint64(32)) | low(machine)
        moved = both >> by if direction == "r" else (both << by) >> np.uint64(32)
        write(machine, moved.astype(np.uint32))

    return step


@implements("bfe", "u32|u64|s32|s64")
def extract(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits
    read, position, length = d.read(1, f"u{bits}"), d.read(2, "u32"), d.read(3, "u32")
    write = d.write(0, kind)

    def step(machine: Machine) -> None:
        value, at, size = np.broadcast_arrays(read(machine), position(machine) & 255, length(machine) & 255)
        wide = value.astype(np.uint64)
        if kind[0] == "s":  # the sign of the value fills what lies beyond it
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
        write(machine, result.astype(UNSIGNED[bits]).view(SCALARS[kind].raw))

    return step


@implements("bfi", "b32|b64")
def insert(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits
    field, into = d.read(1, kind), d.read(2, kind)
    position, length, write = d.read(3, "u32"), d.read(4, "u32"), d.write(0, kind)

    def step(machine: Machine) -> None:
        at, size = (position(machine) & 255).astype(np.uint64), (length(machine) & 255).astype(np.uint64)
        ones = np.where(size >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(size, np.uint64(63))) - np.uint64(1))
        up = np.minimum(at, np.uint64(63))
        mask = np.where(at >= 64, np.uint64(0), ones << up)
        moved = field(machine).astype(np.uint64) << up
        write(machine, ((into(machine) & ~mask) | (moved & mask)).astype(UNSIGNED[bits]))

    return step


@implements("prmt", "b32")
def permute(d: Decoder) -> Step:
    """Four bytes out of eight; bit 3 of a selector spreads the sign instead."""
    low, high, selector, write = d.read(1, "b32"), d.read(2, "b32"), d.read(3, "b32"), d.write(0, "b32")

    def step(machine: Machine) -> None:
        a, b, s = np.broadcast_arrays(low(machine), high(machine), selector(machine))
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(a.shape, np.uint64)
        for i in range(4):
            choice = (s >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) << np.uint64(3))) & np.uint64(255)
            byte = np.where(choice & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result |= byte << np.uint64(8 * i)
        write(machine, result.astype(np.uint32))

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
    if d.form.opcode == "popc":
        return lambda machine: write(machine, _count_ones(read(machine)))
    return lambda machine: write(machine, zeros(read(machine)))


@implements("brev", "b32|b64")
def reverse(d: Decoder) -> Step:
    kind = d.slots[0]
    bits = SCALARS[kind].bits

    def reversed_bits(value: Array) -> Array:
        planes = (value[:, None] >> np.arange(bits).astype(value.dtype)) & value.dtype.type(1)
        result: Array = (planes << np.arange(bits)[::-1].astype(value.dtype)).sum(1, dtype=value.dtype)
        return result

    return simple(d, kind, reversed_bits)
