"""State of a batch of blocks: registers, which of their lanes hold nothing, and the memories.

Registers hold arrays that nobody changes in place, so a move is the copy of a reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.counters import Tally
from fastae_emulator.ptx.errors import UninitialisedError
from fastae_emulator.ptx.mbarriers import Mbarriers
from fastae_emulator.ptx.memory import GlobalMemory
from fastae_emulator.ptx.pending import Pending
from fastae_emulator.ptx.scalars import UNSIGNED, Array
from fastae_emulator.ptx.shared import SharedMemory
from fastae_emulator.ptx.tensor_memory import TensorMemory
from fastae_emulator.ptx.text import Program


class State(Batch):
    """Batch with its registers and memories: all that an instruction reads and changes."""

    def __init__(
        self, program: Program, grid: tuple[int, int, int], block_ids: list[int], tally: Tally, memory: GlobalMemory,
        arguments: dict[str, Array], shared_bytes: int,
    ) -> None:  # fmt: skip
        super().__init__(program, grid, block_ids, tally)
        self.memory, self.arguments = memory, arguments
        self.shared = SharedMemory(self, shared_bytes)
        self.tensor_memory = TensorMemory(self, self.shared) if program.uses("tcgen05") else None
        self.pending = Pending(self, self.shared)
        self.mbarriers = Mbarriers(self, self.shared, self.tensor_memory)
        self.local = np.zeros((self.lanes, program.local_bytes), np.uint8)
        self.names = list(program.registers)
        self.registers: list[Any] = [None] * len(self.names)
        self.has_undefined = [True] * len(self.names)  # some lane may not read the register
        self.unwritten: dict[int, Array] = {}  # register -> lanes that hold nothing
        self.origins: dict[int, str] = {}  # register -> why they do
        self.taint: Array | None = None  # lanes in which the operands of this instruction hold nothing
        self.taint_origin = ""
        self.fenced: list[Any] = [None] * len(self.names)  # the registers at the last wgmma.fence
        self.carry = np.zeros(self.lanes, np.uint64)  # of add.cc and mad.cc

    # ------------------------------------------------------------ registers

    def put(self, number: int, values: Array) -> None:
        """Write a register in the active lanes."""
        if values.shape[0] != self.lanes:
            values = np.broadcast_to(values, (self.lanes,))
        if self.has_undefined[number] or self.taint is not None:
            self._put_undefined(number, values)
        elif self.whole:
            self.registers[number] = values
        else:
            old = self.registers[number]
            old = old if old.dtype == values.dtype else old.view(values.dtype)
            self.registers[number] = np.where(self.active, values, old)

    def _put_undefined(self, number: int, values: Array) -> None:
        """Write a register, and note in which of its lanes nothing may be used."""
        self.pending.check_writable(number)
        old = self.registers[number]
        missing = np.ones(self.lanes, np.bool_) if old is None else self.unwritten.pop(number, np.zeros(1, np.bool_))
        self.registers[number] = (
            values if self.whole or old is None else np.where(self.active, values, old.view(values.dtype))
        )
        missing = (missing & ~self.active) if self.taint is None else np.where(self.active, self.taint, missing)
        if missing.any():
            self.unwritten[number] = np.broadcast_to(missing, (self.lanes,))
            if self.taint is not None:
                self.origins[number] = self.taint_origin
        else:
            self.origins.pop(number, None)
        self.refresh(number)

    def read_undefined(self, number: int) -> Array:
        """Read a register some lanes of which may not be used, nor may anything computed from them.

        Compilers read such lanes freely where nothing comes of it, so only a use counts: an address, a branch, a store
        to global memory, an operand of a tensor core (`require_defined`).
        """
        self.pending.check_readable(number)
        bits, missing = self.registers[number], self.unwritten.get(number)
        if bits is None:
            width = self.program.registers[self.names[number]]
            bits = np.zeros(self.lanes, np.bool_ if width == 1 else UNSIGNED[width])
            missing = np.ones(self.lanes, np.bool_)
        if missing is not None:
            self.add_taint(missing, self.origins.get(number) or f"register {self.names[number]}")
        result: Array = bits
        return result

    def refresh(self, number: int) -> None:
        """Find out anew whether any lane may not read the register."""
        self.has_undefined[number] = (
            self.registers[number] is None or number in self.unwritten or self.pending.holds_register(number)
        )

    def raw(self, number: int) -> Array:
        """Unsigned bits of a register."""
        bits: Array = self.registers[number]
        return bits.view(UNSIGNED[bits.itemsize * 8])

    def hold(self, kind: str, results: list[int], sources: list[int], consumed: Array) -> None:
        """Keep the active lanes' registers from use until `release` (see `Pending.hold`)."""
        self.pending.hold(kind, results, sources, consumed)
        for number in {*results, *sources}:
            self.has_undefined[number] = True

    def release(self, kind: str, allowed: int | None = None) -> None:
        """Wait, in the active lanes, for all but `allowed` groups of instructions that hold registers."""
        for number in self.pending.release(kind, allowed):
            self.refresh(number)

    # ------------------------------------------------------------ taint

    def add_taint(self, lanes: Array, origin: str) -> None:
        """Note that the operands read so far hold nothing of use in these lanes."""
        self.taint = lanes if self.taint is None else self.taint | lanes
        self.taint_origin = origin

    def take_taint(self) -> Array | None:
        """Return the taint of the operands read so far, and forget it."""
        taint, self.taint = self.taint, None
        return taint

    def require_defined(self, what: str) -> None:
        """Refuse values that the active lanes are about to use and that were never written."""
        if self.taint is not None:
            wrong = self.taint & self.active
            if wrong.any():
                what = f"{what} that depends on {self.taint_origin}, to which nothing was written"
                self.fail(UninitialisedError, what, int(np.argmax(wrong)))
            self.taint = None

    # ------------------------------------------------------------ barriers

    def barrier(self) -> None:
        """Forget which warps used which bytes: all threads are here."""
        self.shared.barrier()
        if self.tensor_memory is not None:
            self.tensor_memory.barrier()
