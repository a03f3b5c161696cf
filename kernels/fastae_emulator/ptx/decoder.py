"""Decoder of operands: functions that read and write registers, made once for each instruction of a program."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from fastae_emulator.ptx.errors import UnknownInstructionError
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array, Scalar
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.text import Instruction, Program

Read = Callable[[State], Array]
Write = Callable[[State, Array], None]

_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
_ADDRESS = re.compile(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


class Decoder:
    """Instruction with its qualifiers by slot; `read`, `write` and `address` resolve its operands."""

    def __init__(
        self, program: Program, instruction: Instruction, slots: tuple[str, ...], numbers: dict[str, int]
    ) -> None:
        self.program = program
        self.instruction = instruction
        self.opcode, self.slots, self.operands = instruction.opcode, slots, instruction.operands
        self.numbers = numbers  # register name -> number

    def refuse(self, why: str) -> UnknownInstructionError:
        at = self.instruction
        return UnknownInstructionError(f"{self.program.name}, {at.where}: {why}, in `{at.text}`")

    def vector(self, operand: str) -> list[str]:
        """Elements of `{a, b}`; a plain operand is a vector of one."""
        if operand.startswith("{"):
            return [element.strip() for element in operand.strip("{} ").split(",")]
        return [operand]

    def register(self, name: str) -> int:
        if name not in self.numbers:
            raise self.refuse(f"{name!r} is no register")
        return self.numbers[name]

    def width(self, name: str) -> int:
        return self.program.registers[name]

    # ------------------------------------------------------------ reading

    def bits(self, operand: str, kind: str) -> Read:
        """Raw bits of an operand, in the numpy type of `kind`."""
        scalar = SCALARS[kind]
        if operand in self.numbers:
            return self._read_register(operand, scalar)
        if _SPECIAL.fullmatch(operand):
            if scalar.bits != 32:
                raise self.refuse("special registers have 32 bits here")
            raw = scalar.raw
            return lambda state: state.special(operand).view(raw)
        if operand in self.program.symbols:
            value = np.array([self.program.symbols[operand]], UNSIGNED[scalar.bits]).view(scalar.raw)
        else:
            value = self._constant(operand, scalar)
        return lambda state: value

    def read(self, index: int, kind: str) -> Read:
        """Operand `index` as values to compute with."""
        return self.value(self.operands[index], kind)

    def value(self, operand: str, kind: str) -> Read:
        raw, decode = self.bits(operand, kind), SCALARS[kind].decode
        if kind in ("f16", "bf16", "f16x2", "bf16x2", "f32x2"):
            return lambda state: decode(raw(state))
        return raw

    def _read_register(self, name: str, scalar: Scalar) -> Read:
        number, raw, have = self.register(name), scalar.raw, self.width(name)
        if have == scalar.bits:

            def same(state: State) -> Array:
                bits: Array = state.read_undefined(number) if state.has_undefined[number] else state.registers[number]
                return bits if bits.dtype == raw else bits.view(raw)

            return same
        if have < scalar.bits or scalar.bits == 1:
            raise self.refuse(f"{name} has {have} bits, {scalar.bits} are read")
        unsigned, narrow = UNSIGNED[have], UNSIGNED[scalar.bits]

        def low(state: State) -> Array:
            bits: Array = state.read_undefined(number) if state.has_undefined[number] else state.registers[number]
            return bits.view(unsigned).astype(narrow).view(raw)

        return low

    def _constant(self, operand: str, scalar: Scalar) -> Array:
        bits: Array
        try:
            if scalar.bits == 1:
                return np.array([bool(int(operand, 0))])
            if operand[:2] in ("0f", "0F"):
                bits = np.array([int(operand[2:], 16)], np.uint32)
            elif operand[:2] in ("0d", "0D"):
                bits = np.array([int(operand[2:], 16)], np.uint64)
            else:
                number = int(operand.rstrip("U"), 0) & ((1 << scalar.bits) - 1)
                bits = np.array([number], UNSIGNED[scalar.bits])
        except ValueError:
            raise self.refuse(f"operand {operand!r} not implemented") from None
        if bits.itemsize * 8 != scalar.bits:
            raise self.refuse(f"{operand!r} has {bits.itemsize * 8} bits, {scalar.bits} are read")
        return bits.view(scalar.raw)

    def integer(self, operand: str) -> int:
        """Value of an operand that has to be a constant."""
        return int(self._constant(operand, SCALARS["s64"]).view(np.int64)[0])

    def predicate(self, operand: str) -> Read:
        """Predicate operand, `!p` being its negation."""
        if operand.startswith("!"):
            inner = self.bits(operand[1:].strip(), "pred")
            return lambda state: ~inner(state)
        return self.bits(operand, "pred")

    # ------------------------------------------------------------ writing

    def write(self, index: int, kind: str) -> Write:
        return self.store(self.operands[index], kind)

    def store(self, operand: str, kind: str) -> Write:
        """Round values to `kind` and put them into a register; a wider one is extended (PTX ISA 9.4.1)."""
        scalar = SCALARS[kind]
        if operand == "_":
            return lambda state, values: None
        number, have, encode = self.register(operand), self.width(operand), scalar.encode
        if have == scalar.bits:
            if kind in ("f16", "bf16", "f16x2", "bf16x2", "f32x2"):
                return lambda state, values: state.put(number, encode(values))
            return lambda state, values: state.put(number, values)
        if have < scalar.bits or scalar.bits == 1:
            raise self.refuse(f"{operand} has {have} bits, {scalar.bits} are written")
        wide = np.dtype(f"i{have // 8}") if kind[0] == "s" else UNSIGNED[have]
        raw = scalar.raw if kind[0] == "s" else UNSIGNED[scalar.bits]
        return lambda state, values: state.put(number, encode(values).view(raw).astype(wide))

    # ------------------------------------------------------------ addresses

    def address(self, operand: str) -> Read:
        """Address `[register + offset]` or `[symbol + offset]` as int64; in tensor memory it is row << 16 | column."""
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            raise self.refuse(f"address {operand!r} not implemented")
        base, offset = found.group(1), np.int64(int(found.group(2) or "0", 0))
        if base in self.numbers and self.width(base) == 64:
            read = self.bits(base, "s64")
        else:
            narrow = self.bits(base, "u32")

            def read(state: State) -> Array:
                return narrow(state).astype(np.int64)

        def address(state: State) -> Array:
            value = read(state)
            if state.taint is not None:
                state.require_defined("uses an address")
            return value + offset

        return address
