"""What is still under way: copies into shared memory, and registers that tensor cores will write or still read.

Groups are counted for each thread, as the instruction set does (PTX ISA 9.7.9.25, 9.7.15.7): threads whose loops differ
in length do not wait for each other's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.errors import InFlightError, UnsynchronisedError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.shared import ARRIVING, CONSUMED, SEVERAL

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine


@dataclass
class Copy:
    """Bytes that a cp.async will put into shared memory: [units, lanes] elements of `unit` bytes."""

    lanes: Array
    elements: Array
    unit: int
    values: Array
    group: Array  # of each lane


@dataclass
class Hold:
    """Registers of some lanes that an instruction will still write (`results`) or read (`sources`)."""

    kind: str  # wgmma or tcgen05.ld
    results: frozenset[int]
    sources: frozenset[int]
    lanes: Array
    group: Array
    consumed: Array  # positions in shared memory that it reads


class Pending:
    """Of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.copies: list[Copy] = []
        self.holds: list[Hold] = []
        self.copy_groups = np.zeros(machine.lanes, np.int64)  # committed so far
        self.product_groups = np.zeros(machine.lanes, np.int64)
        self.spinning = False  # the last try_wait failed everywhere
        self.progressed = False  # an mbarrier changed since somebody looked
        self._spins = 0

    # ------------------------------------------------------------ cp.async

    def issue(self, lanes: Array, elements: Array, unit: int, values: Array) -> None:
        shared = self.machine.shared
        shared.check_write(elements, lanes, unit)
        shared.mark(elements, unit, ARRIVING, True)
        self.copies.append(Copy(lanes, elements, unit, values, self.copy_groups[lanes]))

    def commit_copies(self) -> None:
        self.copy_groups = self.copy_groups + self.machine.active

    def wait_copies(self, allowed: int | None) -> None:
        """Until at most `allowed` groups of each active thread are under way; None: none, committed or not."""
        shared, active, rest = self.machine.shared, self.machine.active, []
        for copy in self.copies:
            done = active[copy.lanes]
            if allowed is not None:
                done = done & (copy.group < self.copy_groups[copy.lanes] - allowed)
            if done.all():
                shared.mark(copy.elements, copy.unit, ARRIVING, False)
                shared.land(copy.elements, copy.lanes, copy.unit, copy.values)
                continue
            if done.any():
                shared.mark(copy.elements[:, done], copy.unit, ARRIVING, False)
                shared.land(copy.elements[:, done], copy.lanes[done], copy.unit, copy.values[:, done])
                keep = ~done
                copy = Copy(
                    copy.lanes[keep], copy.elements[:, keep], copy.unit, copy.values[:, keep], copy.group[keep]
                )  # fmt: skip
            rest.append(copy)
        self.copies = rest

    # ------------------------------------------------------------ registers in flight

    def hold(self, kind: str, results: list[int], sources: list[int], consumed: Array) -> None:
        """The active lanes' registers are under way until `release`."""
        lanes = self.machine.active.copy()
        self.holds.append(
            Hold(kind, frozenset(results), frozenset(sources), lanes, self.product_groups.copy(), consumed)
        )
        self.consume(consumed)
        for number in {*results, *sources}:
            self.machine.troubled[number] = True

    def commit_products(self) -> None:
        self.product_groups = self.product_groups + self.machine.active

    def release(self, kind: str, allowed: int | None = None) -> None:
        """The active lanes have waited for all but `allowed` groups."""
        freed: set[int] = set()
        consumed = [np.zeros(0, np.int64)]
        for hold in [hold for hold in self.holds if hold.kind == kind]:
            done = self.machine.active & hold.lanes
            if allowed is not None:
                done = done & (hold.group < self.product_groups - allowed)
            if not done.any():
                continue
            hold.lanes = hold.lanes & ~done
            if not hold.lanes.any():
                self.holds.remove(hold)
                consumed.append(hold.consumed)
            freed |= hold.results | hold.sources
        for number in freed:
            self.machine.refresh(number)
        self.give_back(np.concatenate(consumed))

    def consume(self, positions: Array) -> None:
        """Bytes of shared memory that a product reads from now on."""
        self.machine.shared.flags[positions] |= CONSUMED

    def give_back(self, consumed: Array, behind_barrier: bool = True) -> None:
        """Bytes of shared memory that a product has read: free again, for those who did not wait behind a barrier."""
        shared = self.machine.shared
        shared.flags[consumed] &= ~CONSUMED
        if behind_barrier:
            shared.reader[consumed] = SEVERAL
            shared.touched = True
        for hold in self.holds:
            shared.flags[hold.consumed] |= CONSUMED
        if self.machine.tensor_memory is not None:
            for product in itertools.chain(*self.machine.tensor_memory.products):
                shared.flags[product.consumed] |= CONSUMED

    def holds_register(self, number: int) -> bool:
        return any(number in hold.results or number in hold.sources for hold in self.holds)

    def check_readable(self, number: int) -> None:
        self._check(number, "reads", results_only=True)

    def check_writable(self, number: int) -> None:
        self._check(number, "writes", results_only=False)

    def _check(self, number: int, verb: str, results_only: bool) -> None:
        for hold in self.holds:
            if number in hold.results or (not results_only and number in hold.sources):
                overlap = hold.lanes & self.machine.active
                if overlap.any():
                    name = self.machine.code.names[number]
                    what = f"{verb} register {name} of a {hold.kind} that has not been waited for"
                    self.machine.fail(InFlightError, what, int(np.argmax(overlap)))

    # ------------------------------------------------------------ waiting loops

    def spin(self) -> None:
        self._spins += 1
        if self._spins > 1000:
            self.machine.fail(UnsynchronisedError, "waits for an mbarrier phase that nothing completes")

    def progress(self) -> None:
        self.spinning, self.progressed, self._spins = False, True, 0
