"""mbarriers in shared memory: phases, arrivals, and the tensor-core products whose end an arrival announces."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.errors import UndefinedError, UnsynchronisedError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.shared import SharedMemory
from fastae_emulator.ptx.tensor_memory import TensorMemory


@dataclass
class _State:
    expected: int
    missing: int
    phase: int = 0  # completed so far
    arrived: int = 0  # products of the block before the last arrival that announces them
    covered: int = 0  # the same for completed phases
    asked: set[int] = field(default_factory=set)  # threads that have tested the current phase


class Mbarriers:
    """mbarriers of one batch, by block and address."""

    def __init__(self, batch: Batch, shared: SharedMemory, tensor_memory: TensorMemory | None) -> None:
        self.batch, self.shared, self.tensor_memory = batch, shared, tensor_memory
        self.states: dict[tuple[int, int], _State] = {}
        self.spinning = False  # the last test failed everywhere
        self.progressed = False  # an mbarrier changed since the machine last looked
        self._spins = 0

    def set_up(self, addresses: Array, count: int | None) -> None:
        """Initialise with a count, invalidate without; for other warps either is a write of 8 bytes."""
        batch = self.batch
        lanes, own = batch.own(addresses)
        self.shared.store(own, lanes, np.zeros((1, lanes.size), np.uint64))
        for lane, address in zip(lanes, own, strict=True):
            key = (int(batch.block[lane]), int(address))
            if count is None:
                self._state(key)
                del self.states[key]
            else:
                self.states[key] = _State(count, count)

    def arrive(self, addresses: Array, covers: bool) -> None:
        """Let each active lane arrive; with `covers` the arrival announces that its products so far are done."""
        batch = self.batch
        lanes, own = batch.own(addresses)
        self.shared.load(own, lanes, 1, 8)
        for lane, address in zip(lanes, own, strict=True):
            block = int(batch.block[lane])
            state = self._state((block, int(address)))
            if covers and self.tensor_memory is not None:
                state.arrived = self.tensor_memory.issued[block]
            state.missing -= 1
            if state.missing == 0:
                state.phase, state.missing, state.covered = state.phase + 1, state.expected, state.arrived
                state.asked.clear()
        self._progress()

    def test(self, addresses: Array, parity: Array) -> Array:
        """Test whether the phase of this parity is complete; if it is, the products it announces have been waited for.

        A thread's first test of a phase fails whatever its state, as it may on a GPU: only a loop is a wait.
        """
        batch = self.batch
        lanes, own = batch.own(addresses)
        self.shared.load(own, lanes, 1, 8)
        result, again = np.zeros(batch.lanes, np.bool_), False
        parities = batch.spread(parity)[lanes]
        keys = np.stack([batch.block[lanes], own, parities.astype(np.int64)], 1)
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
                if self.tensor_memory is not None:
                    self.tensor_memory.observed(block, state.covered, waiting.size == batch.threads)
        if result.any() or again:
            self._progress()
        else:
            self.spinning = True
        return result

    def spin(self) -> None:
        """Note that all threads wait; refuse once that goes on."""
        self._spins += 1
        if self._spins > 1000:
            self.batch.fail(UnsynchronisedError, "waits for an mbarrier phase that nothing completes")

    def _progress(self) -> None:
        self.spinning, self.progressed, self._spins = False, True, 0

    def _state(self, key: tuple[int, int]) -> _State:
        if key not in self.states:
            self.batch.fail(UndefinedError, f"no mbarrier was set up at byte {key[1]} of shared memory")
        return self.states[key]
