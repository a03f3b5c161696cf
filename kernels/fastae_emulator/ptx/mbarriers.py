"""mbarriers in shared memory: phases, arrivals, and the tensor-core products whose end an arrival tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.errors import UndefinedError
from fastae_emulator.ptx.scalars import Array

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine


@dataclass
class _State:
    expected: int
    missing: int
    phase: int = 0  # completed so far
    arrived: int = 0  # products of the block before the last arrival that tells of them
    covered: int = 0  # the same for completed phases
    asked: set[int] = field(default_factory=set)  # threads that have tested the current phase


class Mbarriers:
    """Of one machine, by block and address."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.states: dict[tuple[int, int], _State] = {}

    def set_up(self, addresses: Array, count: int | None) -> None:
        """init with a count, inval without; either is a write of 8 bytes for everybody else."""
        machine = self.machine
        lanes, own = self._own(addresses)
        machine.shared.store(own, lanes, np.zeros((1, lanes.size), np.uint64))
        for lane, address in zip(lanes, own, strict=True):
            key = (int(machine.block[lane]), int(address))
            if count is None:
                self._state(key)
                del self.states[key]
            else:
                self.states[key] = _State(count, count)

    def arrive(self, addresses: Array, covers: bool) -> None:
        """Each active lane arrives; with `covers` the arrival tells that its products so far are done."""
        machine = self.machine
        lanes, own = self._own(addresses)
        machine.shared.load(own, lanes, 1, 8)
        for lane, address in zip(lanes, own, strict=True):
            block = int(machine.block[lane])
            state = self._state((block, int(address)))
            if covers and machine.tensor_memory is not None:
                state.arrived = machine.tensor_memory.issued[block]
            state.missing -= 1
            if state.missing == 0:
                state.phase, state.missing, state.covered = state.phase + 1, state.expected, state.arrived
                state.asked.clear()
        machine.pending.progress()

    def test(self, addresses: Array, parity: Array) -> Array:
        """Whether the phase of this parity is complete; if it is, what it tells of has been waited for.

        A thread's first test of a phase fails whatever its state, as it may on a GPU: only a loop is a wait.
        """
        machine = self.machine
        lanes, own = self._own(addresses)
        machine.shared.load(own, lanes, 1, 8)
        result, again = np.zeros(machine.lanes, np.bool_), False
        parities = np.broadcast_to(parity, (machine.lanes,))[lanes]
        keys = np.stack([machine.block[lanes], own, parities.astype(np.int64)], 1)
        for key in np.unique(keys, axis=0):
            block, address, wanted = (int(part) for part in key)
            state = self._state((block, address))
            if state.phase % 2 != wanted:
                waiting = lanes[(keys == key).all(1)]
                if not state.asked.issuperset(waiting.tolist()):
                    state.asked.update(waiting.tolist())
                    again = True
                    continue
                result[waiting] = True
                if machine.tensor_memory is not None:
                    machine.tensor_memory.observed(block, state.covered, waiting.size == machine.threads)
        if result.any() or again:
            machine.pending.progress()
        else:
            machine.pending.spinning = True
        return result

    def _own(self, addresses: Array) -> tuple[Array, Array]:
        lanes = np.flatnonzero(self.machine.active)
        return lanes, np.broadcast_to(addresses, (self.machine.lanes,))[lanes]

    def _state(self, key: tuple[int, int]) -> _State:
        if key not in self.states:
            self.machine.fail(UndefinedError, f"no mbarrier was set up at byte {key[1]} of shared memory")
        return self.states[key]
