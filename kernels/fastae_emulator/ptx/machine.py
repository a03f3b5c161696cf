"""The machine: registers, predicates and control flow of a batch of thread blocks that run side by side.

All threads of the batch form one vector, in block order, and one instruction is executed for all that stand at it.
Threads that diverge become fragments; the fragment at the lowest instruction runs, and fragments that meet become one.
Registers hold arrays that nobody changes in place, so a move is the copy of a reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fastae_emulator.ptx.code import Code
from fastae_emulator.ptx.counters import Tally
from fastae_emulator.ptx.errors import PtxError, UninitialisedError, UnsynchronisedError
from fastae_emulator.ptx.mbarriers import Mbarriers
from fastae_emulator.ptx.memory import GlobalMemory
from fastae_emulator.ptx.pending import Pending
from fastae_emulator.ptx.scalars import UNSIGNED, Array
from fastae_emulator.ptx.shared import SharedMemory
from fastae_emulator.ptx.tensor_memory import TensorMemory

WARP = 32
_NEVER = 1 << 60
_RUNAWAY = 100_000_000  # instructions of one batch: a loop that never ends


@dataclass
class Fragment:
    """Threads at one instruction. `warps` counts the warps among them."""

    at: int
    lanes: Array
    whole: bool
    warps: int
    idle: bool = False  # found an mbarrier incomplete: others go first
    parted: bool = False  # waits for the rest of a warp: others go first; if all wait, it is taken as it is


class Machine:
    """A batch of blocks. `block_ids` are their linear numbers in the grid."""

    def __init__(
        self, code: Code, memory: GlobalMemory, arguments: dict[str, Array], grid: tuple[int, int, int],
        block_ids: list[int], shared_bytes: int, tally: Tally,
    ) -> None:  # fmt: skip
        program = code.program
        self.code, self.program, self.memory, self.arguments, self.tally = code, program, memory, arguments, tally
        self.grid, self.block_ids, self.threads = grid, block_ids, program.threads
        self.blocks = len(block_ids)
        self.lanes = self.blocks * self.threads
        self.registers: list[Any] = [None] * len(program.registers)
        self.troubled = [True] * len(program.registers)  # some lane may not read the register
        self.unwritten: dict[int, Array] = {}  # register -> lanes that hold nothing
        self.origins: dict[int, str] = {}  # register -> why they do
        self.taint: Array | None = None  # lanes in which the operands of this instruction hold nothing
        self.taint_origin = ""
        self.thread = np.tile(np.arange(self.threads, dtype=np.uint32), self.blocks)
        self.lane = (self.thread % WARP).astype(np.int64)
        self.block = np.repeat(np.arange(self.blocks), self.threads)
        self.every = np.arange(self.lanes)
        self.warp_code = (self.thread // WARP + 1).astype(np.uint8)
        self.shared = SharedMemory(self, shared_bytes)
        self.tensor_memory = TensorMemory(self) if code.uses("tcgen05") else None
        self.pending = Pending(self)
        self.local = np.zeros((self.lanes, program.local_bytes), np.uint8)
        self.fenced: list[Any] = [None] * len(program.registers)  # as they were at the last wgmma.fence
        self.mbarriers = Mbarriers(self)
        self.carry = np.zeros(self.lanes, np.uint64)  # of add.cc and mad.cc
        self.at = 0
        self.active = np.ones(self.lanes, np.bool_)
        self.whole = True
        self._specials: dict[str, Array] = {}

    # ------------------------------------------------------------ registers

    def special(self, name: str) -> Array:
        if name not in self._specials:
            self._specials[name] = self._make_special(name).astype(np.uint32)
        return self._specials[name]

    def _make_special(self, name: str) -> Array:
        if name == "%tid.x":
            return self.thread
        if name == "%laneid":
            return self.lane
        if name == "%warpid":
            return self.thread // WARP
        what, axis = name[1:].split(".")
        number = "xyz".index(axis)
        if what == "ctaid":
            x, y, _ = self.grid
            ids = np.array(self.block_ids)[self.block]
            return (ids % x, ids // x % y, ids // (x * y))[number]
        size = {"nctaid": self.grid[number], "ntid": self.threads if number == 0 else 1}.get(what, 0)
        return np.full(self.lanes, size)

    def put(self, number: int, values: Array) -> None:
        """Write a register in the active lanes."""
        if values.shape[0] != self.lanes:
            values = np.broadcast_to(values, (self.lanes,))
        if self.troubled[number] or self.taint is not None:
            self._put_troubled(number, values)
        elif self.whole:
            self.registers[number] = values
        else:
            old = self.registers[number]
            old = old if old.dtype == values.dtype else old.view(values.dtype)
            self.registers[number] = np.where(self.active, values, old)

    def _put_troubled(self, number: int, values: Array) -> None:
        """The same, keeping account of the lanes in which the register holds nothing that may be used."""
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

    def read_troubled(self, number: int) -> Array:
        """Read a register some lanes of which may not be used: what is made of it may not be used either.

        Compilers read such lanes freely where nothing comes of it, so only a use counts: an address, a branch, a store
        to global memory, an operand of a tensor core (`require_defined`).
        """
        self.pending.check_readable(number)
        bits, missing = self.registers[number], self.unwritten.get(number)
        if bits is None:
            bits, missing = np.zeros(self.lanes, self.code.raws[number]), np.ones(self.lanes, np.bool_)
        if missing is not None:
            self.add_taint(missing, self.origins.get(number) or f"register {self.code.names[number]}")
        result: Array = bits
        return result

    def add_taint(self, lanes: Array, origin: str) -> None:
        """The operands read so far hold nothing of use in these lanes."""
        self.taint = lanes if self.taint is None else self.taint | lanes
        self.taint_origin = origin

    def take_taint(self) -> Array | None:
        taint, self.taint = self.taint, None
        return taint

    def require_defined(self, what: str) -> None:
        """Refuse if what the active lanes are about to use was never written."""
        if self.taint is not None:
            wrong = self.taint & self.active
            if wrong.any():
                what = f"{what} that depends on {self.taint_origin}, to which nothing was written"
                self.fail(UninitialisedError, what, int(np.argmax(wrong)))
            self.taint = None

    def refresh(self, number: int) -> None:
        """Whether any lane may not read the register."""
        self.troubled[number] = (
            self.registers[number] is None or number in self.unwritten or self.pending.holds_register(number)
        )

    def raw(self, number: int) -> Array:
        """The unsigned bits of a register."""
        bits: Array = self.registers[number]
        return bits.view(UNSIGNED[bits.itemsize * 8])

    # ------------------------------------------------------------ errors

    def fail(self, kind: type[PtxError], what: str, lane: int | None = None) -> NoReturn:
        """Raise with the kernel, the source line, the thread and the instruction."""
        instruction = self.program.instructions[self.at]
        who = ""
        if lane is None and self.active.any():
            lane = int(np.argmax(self.active))
        if lane is not None:
            block, thread = self.block_ids[int(self.block[lane])], int(self.thread[lane])
            who = f"; block {block}, warp {thread // WARP}, lane {thread % WARP}"
        raise kind(f"{self.program.name}, {instruction.where}: {what}{who}; `{shortened(instruction.text)}`")

    # ------------------------------------------------------------ control flow

    def run(self) -> None:
        """Until every thread has left the kernel."""
        waiting = np.zeros(self.lanes, np.bool_)
        resume: dict[int, Array] = {}  # instruction after a barrier -> its threads
        fragments = [Fragment(0, self.active, True, self.lanes // WARP)]
        executed = 0
        while fragments or resume:
            if not fragments:
                fragments = self._pass_barrier(resume)
                waiting = np.zeros(self.lanes, np.bool_)
                resume = {}
            if self.pending.progressed:
                self.pending.progressed = False
                for other in fragments:
                    other.idle = False
            order = [(other.idle, other.parted, other.at) for other in fragments]
            fragment = fragments.pop(order.index(min(order)))
            limit = min((other.at for other in fragments if other.at > fragment.at), default=_NEVER)
            if fragment.idle:
                self.pending.spin()
            ended, stopped, count = self._run_fragment(fragment, limit, alone=not fragments)
            executed += count
            if executed > _RUNAWAY:
                self.fail(UnsynchronisedError, f"still running after {_RUNAWAY} instructions")
            if stopped == "barrier":
                for part in ended:
                    waiting = waiting | part.lanes
                    resume[part.at] = resume.get(part.at, np.zeros(self.lanes, np.bool_)) | part.lanes
            elif stopped != "exit":
                for part in ended:
                    self._merge(fragments, part)
        if self.tensor_memory is not None:
            self.tensor_memory.check_end()

    def _merge(self, fragments: list[Fragment], part: Fragment) -> None:
        for other in fragments:
            if other.at == part.at:
                fragments.remove(other)
                idle = part.idle and other.idle
                part = self._fragment(part.at, part.lanes | other.lanes)
                part.idle = idle
                break
        fragments.append(part)

    @staticmethod
    def _splits_a_warp(lanes: Array) -> bool:
        of_warp = lanes.reshape(-1, WARP)
        return bool((of_warp.any(1) != of_warp.all(1)).any())

    def _fragment(self, at: int, lanes: Array) -> Fragment:
        return Fragment(at, lanes, bool(lanes.all()), int(lanes.reshape(-1, WARP).any(1).sum()))

    def _pass_barrier(self, resume: dict[int, Array]) -> list[Fragment]:
        self.shared.barrier()
        if self.tensor_memory is not None:
            self.tensor_memory.barrier()
        return [self._fragment(at, lanes) for at, lanes in resume.items()]

    def _run_fragment(self, fragment: Fragment, limit: int, alone: bool) -> tuple[list[Fragment], str, int]:
        """Run one fragment until it meets another, splits, waits or ends."""
        steps, controls, predicates, counts = (
            self.code.steps,
            self.code.controls,
            self.code.predicates,
            self.tally.issued,
        )
        lanes, whole, warps, at = fragment.lanes, fragment.whole, fragment.warps, fragment.at
        end, executed = len(steps), 0
        while at < limit:
            if at >= end:
                return [], "exit", executed
            self.at = at
            self.taint = None
            counts[at] += warps
            executed += 1
            predicate = predicates[at]
            if predicate is None:
                active, all_active = lanes, whole
            else:
                self.active, self.whole = lanes, whole
                active = predicate(self) & lanes
                self.require_defined("is guarded by a predicate")
                all_active = whole and bool(active.all())
                if not all_active and not active.any():
                    at += 1
                    continue
            self.active, self.whole = active, all_active
            control = controls[at]
            if control == "converge" and not (whole or alone or fragment.parted) and self._splits_a_warp(lanes):
                counts[at] -= warps
                return [Fragment(at, lanes, whole, warps, parted=True)], "split", executed
            if control is None or control == "converge":
                fragment.parted = False
                steps[at](self)
                at += 1
                continue
            if control == "bra":
                target = self.program.instructions[at].target
                if all_active or active is lanes or bool((active == lanes).all()):
                    if target <= at and (self.pending.spinning or not alone):
                        idle, self.pending.spinning = self.pending.spinning, False
                        return [Fragment(target, lanes, whole, warps, idle)], "split", executed
                    at = target
                    continue
                return [self._fragment(target, active), self._fragment(at + 1, lanes & ~active)], "split", executed
            if control == "exit":
                rest = lanes & ~active
                return ([self._fragment(at + 1, rest)] if rest.any() else []), "split", executed
            steps[at](self)  # the barrier checks its operands
            if active is not lanes and (active != lanes).any():
                self.fail(UnsynchronisedError, "a barrier that some threads skip by their predicate")
            return [Fragment(at + 1, lanes, whole, warps)], "barrier", executed
        return [Fragment(at, lanes, whole, warps)], "met", executed


def shortened(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
