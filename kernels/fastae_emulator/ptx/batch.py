"""Threads of a batch of blocks that run side by side: their numbers, which are active, and errors that name one.

All threads form one vector, in block order, and each is a lane of it.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from fastae_emulator.ptx.counters import Tally
from fastae_emulator.ptx.errors import PtxError
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.text import Program

WARP = 32


class Batch:
    """Blocks with these linear numbers in the grid, at instruction `at`, which the `active` lanes execute."""

    def __init__(self, program: Program, grid: tuple[int, int, int], block_ids: list[int], tally: Tally) -> None:
        self.program, self.tally = program, tally
        self.grid, self.block_ids, self.threads = grid, block_ids, program.threads
        self.blocks = len(block_ids)
        self.lanes = self.blocks * self.threads
        self.every = np.arange(self.lanes)
        self.thread = np.tile(np.arange(self.threads, dtype=np.uint32), self.blocks)
        self.lane = (self.thread % WARP).astype(np.int64)
        self.block = np.repeat(np.arange(self.blocks), self.threads)
        self.warp_code = (self.thread // WARP + 1).astype(np.uint8)
        self.at = 0
        self.active = np.ones(self.lanes, np.bool_)
        self.whole = True  # all lanes are active
        self._specials: dict[str, Array] = {}

    def special(self, name: str) -> Array:
        """Read a special register: %tid, %ntid, %ctaid, %nctaid, %laneid or %warpid."""
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

    def spread(self, values: Array) -> Array:
        """Broadcast to one value for each lane."""
        return values if values.shape[0] == self.lanes else np.broadcast_to(values, (self.lanes,))

    def own(self, values: Array) -> tuple[Array, Array]:
        """Numbers of the active lanes, and their values."""
        values = self.spread(values)
        if self.whole:
            return self.every, values
        lanes = np.flatnonzero(self.active)
        return lanes, values[lanes]

    def fail(self, kind: type[PtxError], what: str, lane: int | None = None) -> NoReturn:
        """Raise with the kernel, the source line, the thread and the instruction."""
        instruction = self.program.instructions[self.at]
        who = ""
        if lane is None and self.active.any():
            lane = int(np.argmax(self.active))
        if lane is not None:
            block, thread = self.block_ids[int(self.block[lane])], int(self.thread[lane])
            who = f"; block {block}, warp {thread // WARP}, lane {thread % WARP}"
        raise kind(f"{self.program.name}, {instruction.where}: {what}{who}; `{_shortened(instruction.text)}`")


def _shortened(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
