"""Asynchronous work under way: copies into shared memory, and registers that tensor cores will write or still read.

Groups are counted for each thread, as the instruction set does (PTX ISA 9.7.9.25, 9.7.15.7): threads whose loops differ
in length do not wait for each other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.errors import InFlightError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.shared import ARRIVING, SharedMemory


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
    """Copies and registers under way in one batch."""

    def __init__(self, batch: Batch, shared: SharedMemory) -> None:
        self.batch, self.shared = batch, shared
        self.copies: list[Copy] = []
        self.holds: list[Hold] = []
        self.copy_groups = np.zeros(batch.lanes, np.int64)  # committed so far
        self.product_groups = np.zeros(batch.lanes, np.int64)

    # ------------------------------------------------------------ cp.async

    def issue(self, lanes: Array, elements: Array, unit: int, values: Array) -> None:
        """Start a copy of the active lanes, in the group that they commit next."""
        self.shared.check_write(elements, lanes, unit)
        self.shared.mark(elements, unit, ARRIVING, True)
        self.copies.append(Copy(lanes, elements, unit, values, self.copy_groups[lanes]))

    def commit_copies(self) -> None:
        self.copy_groups = self.copy_groups + self.batch.active

    def wait_copies(self, allowed: int | None) -> None:
        """Wait until at most `allowed` groups of each active thread are under way; None: none, committed or not."""
        shared, active, rest = self.shared, self.batch.active, []
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
        """Keep registers of the active lanes, and bytes of shared memory, from use until `release`."""
        lanes = self.batch.active.copy()
        self.holds.append(
            Hold(kind, frozenset(results), frozenset(sources), lanes, self.product_groups.copy(), consumed)
        )
        self.shared.consume(consumed)

    def commit_products(self) -> None:
        self.product_groups = self.product_groups + self.batch.active

    def release(self, kind: str, allowed: int | None = None) -> set[int]:
        """Wait, in the active lanes, for all but `allowed` groups, and return the registers that lanes got back."""
        freed: set[int] = set()
        for hold in self.holds:
            if hold.kind != kind:
                continue
            done = self.batch.active & hold.lanes
            if allowed is not None:
                done = done & (hold.group < self.product_groups - allowed)
            if done.any():
                hold.lanes = hold.lanes & ~done
                freed |= hold.results | hold.sources
        self.shared.give_back([hold.consumed for hold in self.holds if not hold.lanes.any()])
        self.holds = [hold for hold in self.holds if hold.lanes.any()]
        return freed

    def holds_register(self, number: int) -> bool:
        return any(number in hold.results or number in hold.sources for hold in self.holds)

    def check_readable(self, number: int) -> None:
        self._check(number, "reads", results_only=True)

    def check_writable(self, number: int) -> None:
        self._check(number, "writes", results_only=False)

    def _check(self, number: int, verb: str, results_only: bool) -> None:
        for hold in self.holds:
            if number in hold.results or (not results_only and number in hold.sources):
                overlap = hold.lanes & self.batch.active
                if overlap.any():
                    name = list(self.batch.program.registers)[number]
                    what = f"{verb} register {name} of a {hold.kind} that has not been waited for"
                    self.batch.fail(InFlightError, what, int(np.argmax(overlap)))
