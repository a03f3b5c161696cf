"""Tensor memory of sm_100: 128 rows (its "lanes") by 512 columns of 32 bits for each block (PTX ISA 9.7.16.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.errors import (
    InFlightError,
    OutOfBoundsError,
    PtxError,
    RaceError,
    UndefinedError,
    UninitialisedError,
    UnsynchronisedError,
)
from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.shared import SharedMemory

ROWS, COLUMNS = 128, 512
WRITTEN, STORING, COMPUTING, CONSUMED = (np.uint8(1 << bit) for bit in range(4))

Cells = tuple[Any, Any]  # rows and columns that broadcast


@dataclass
class Product:
    """Product (tcgen05.mma) under way: the cells it writes and reads, the bytes of shared memory it reads."""

    number: int
    result: Cells
    source: Cells | None
    consumed: Array


class TensorMemory:
    """Cells of the blocks of a batch: values, flags and the warps that used them."""

    def __init__(self, batch: Batch, shared: SharedMemory) -> None:
        self.batch, self.shared = batch, shared
        shape = (batch.blocks, ROWS, COLUMNS)
        self.cells = np.zeros(shape, np.uint32)
        self.flags = np.zeros(shape, np.uint8)
        self.writer, self.reader = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)  # warps since the last barrier
        self.allocated: list[dict[int, int]] = [{} for _ in range(batch.blocks)]  # first column -> columns
        self.issued = [0] * batch.blocks
        self.products: list[list[Product]] = [[] for _ in range(batch.blocks)]
        self.stores: list[tuple[Array, Array, Array, Array]] = []  # lanes, blocks, rows, columns

    def barrier(self) -> None:
        self.writer[:] = 0
        self.reader[:] = 0

    # ------------------------------------------------------------ allocation

    def allocate(self, block: int, columns: int) -> int:
        """Allocate the highest free columns, so that a kernel that takes column 0 for granted fails."""
        if columns not in (32, 64, 128, 256, 512):
            self.batch.fail(UndefinedError, f"allocates {columns} columns of tensor memory")
        taken = np.zeros(COLUMNS, np.bool_)
        for first, many in self.allocated[block].items():
            taken[first : first + many] = True
        for first in range(COLUMNS - columns, -1, -columns):
            if not taken[first : first + columns].any():
                break
        else:
            self.batch.fail(UnsynchronisedError, f"no {columns} columns of tensor memory are left")
        self.allocated[block][first] = columns
        self.flags[block, :, first : first + columns] = 0
        return first

    def free(self, block: int, first: int, columns: int, lane: int) -> None:
        if self.allocated[block].get(first) != columns:
            self.batch.fail(
                UndefinedError, f"frees {columns} columns of tensor memory at {first}, which nobody allocated"
            )
        if self.products[block]:
            self.batch.fail(InFlightError, "frees tensor memory while a product has not been waited for")
        own = self.batch.warp_code[lane]
        for users in (self.reader, self.writer):
            used = users[block, :, first : first + columns]
            if ((used != 0) & (used != own)).any():
                what = "frees tensor memory that another warp used since the last barrier"
                self.batch.fail(RaceError, what, lane)
        del self.allocated[block][first]

    def check_end(self) -> None:
        for left in self.allocated:
            if left:
                self.batch.fail(UndefinedError, "the kernel ends with tensor memory allocated (PTX ISA 9.7.16.7)")

    def _check_allocated(self, block: int, columns: Array) -> None:
        low, high = int(np.min(columns)), int(np.max(columns))
        if not any(first <= low and high < first + many for first, many in self.allocated[block].items()):
            self.batch.fail(
                OutOfBoundsError, f"columns {low} to {high} of tensor memory, which are not allocated together"
            )

    # ------------------------------------------------------------ loads and stores of warps

    def load(self, rows: Array, columns: Array) -> Array:
        """Load cells [n, lanes] for the active lanes; the caller holds the registers back."""
        lanes, block, rows, columns = self._own(rows, columns)
        flags = self.flags[block, rows, columns]
        self._refuse(
            InFlightError, flags & STORING, "reads", "a tcgen05.st to it has not been waited for", rows, columns
        )
        self._refuse(
            InFlightError, flags & COMPUTING, "reads", "a product that writes it has not been waited for", rows, columns
        )
        self._refuse(UninitialisedError, (flags & WRITTEN) == 0, "reads", "nothing was written there", rows, columns)
        self.reader[block, rows, columns] = self.batch.warp_code[lanes]
        return self.cells[block, rows, columns]

    def store(self, rows: Array, columns: Array, values: Array) -> None:
        lanes, block, rows, columns = self._own(rows, columns)
        flags = self.flags[block, rows, columns]
        self._refuse(InFlightError, flags & (COMPUTING | CONSUMED), "writes", "a product uses it", rows, columns)
        self.cells[block, rows, columns] = values
        self.flags[block, rows, columns] |= WRITTEN | STORING
        self.writer[block, rows, columns] = self.batch.warp_code[lanes]
        self.stores.append((lanes, np.broadcast_to(block, rows.shape), rows, columns))

    def wait_stores(self) -> None:
        for _, block, rows, columns in self.stores:
            self.flags[block, rows, columns] &= ~STORING
        self.stores = []

    def _own(self, rows: Array, columns: Array) -> tuple[Array, Array, Array, Array]:
        batch = self.batch
        lanes = np.flatnonzero(batch.active)
        rows, columns = np.broadcast_arrays(rows[:, lanes], columns[:, lanes])
        wrong = rows // 32 != (batch.thread[lanes] // 32) % 4
        if wrong.any() or rows.min() < 0 or rows.max() >= ROWS:
            batch.fail(OutOfBoundsError, "a warp may touch only the 32 rows of tensor memory that its number says")
        for block in np.unique(batch.block[lanes]):
            self._check_allocated(int(block), columns[:, batch.block[lanes] == block])
        return lanes, batch.block[lanes], rows, columns

    # ------------------------------------------------------------ products

    def start(
        self, block: int, result: Cells, source: Cells | None, consumed: Array, accumulate: bool, lane: int
    ) -> None:
        """Check the cells of a product and mark them as in use until its end has been waited for."""
        own = self.batch.warp_code[lane]
        for cells, writes in ((result, True), (source, False)):
            if cells is None:
                continue
            self._check_allocated(block, cells[1])
            rows, columns = np.broadcast_arrays(*cells)
            flags, writer, reader = self.flags[block][cells], self.writer[block][cells], self.reader[block][cells]
            self._refuse(
                InFlightError, flags & STORING, "uses", "a tcgen05.st to it has not been waited for", rows, columns
            )
            foreign = (writer != 0) & (writer != own)
            self._refuse(RaceError, foreign, "uses", "written by another warp since the last barrier", rows, columns)
            if writes:
                foreign = (reader != 0) & (reader != own)
                self._refuse(RaceError, foreign, "writes", "read by another warp since the last barrier", rows, columns)
            if accumulate or not writes:
                missing = (flags & WRITTEN) == 0
                self._refuse(UninitialisedError, missing, "reads", "nothing was written there", rows, columns)
            self.flags[block][cells] |= (WRITTEN | COMPUTING) if writes else CONSUMED
        self.issued[block] += 1
        self.products[block].append(Product(self.issued[block], result, source, consumed))
        self.shared.consume(consumed)

    def observed(self, block: int, covered: int, by_all: bool) -> None:
        """Note that some or all threads of a block have waited for its first `covered` products."""
        done = [product for product in self.products[block] if product.number <= covered]
        if not done:
            return
        self.products[block] = [product for product in self.products[block] if product.number > covered]
        flags = self.flags[block]
        for product in done:
            flags[product.result] &= ~COMPUTING
            if product.source is not None:
                flags[product.source] &= ~CONSUMED
        for product in self.products[block]:
            flags[product.result] |= COMPUTING
            if product.source is not None:
                flags[product.source] |= CONSUMED
        self.shared.give_back([product.consumed for product in done], behind_barrier=not by_all)

    def _refuse(self, kind: type[PtxError], wrong: Array, verb: str, why: str, rows: Array, columns: Array) -> None:
        if not np.any(wrong):
            return
        at = np.unravel_index(int(np.argmax(wrong != 0)), wrong.shape)
        cell = f"row {int(rows[at])}, column {int(columns[at])}"
        self.batch.fail(kind, f"{verb} tensor memory at {cell}: {why}")
