"""Shared memory of a batch of blocks, with what is known of every byte: who read or wrote it since the last barrier,
whether it was ever written, and whether an asynchronous copy or product still uses it."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.errors import (
    InFlightError,
    MisalignedError,
    OutOfBoundsError,
    PtxError,
    RaceError,
    UninitialisedError,
    UnsynchronisedError,
)
from fastae_emulator.ptx.scalars import UNSIGNED, Array

SEVERAL = np.uint8(255)  # in `reader` and `writer`: more than one warp; 0 is none, w + 1 is warp w
INITIALISED, ARRIVING, CONSUMED, UNFENCED = (np.uint8(1 << bit) for bit in range(4))
_ONES = np.uint64(0x0101010101010101)


def _spread(byte: np.uint8, width: int) -> Array:
    """Repeat a byte over an element of `width` bytes."""
    return (np.uint64(byte) * _ONES).astype(UNSIGNED[width * 8])


class SharedMemory:
    """Bytes by position. Addresses are offsets in a block's own window; `index` turns them into positions."""

    def __init__(self, batch: Batch, size: int) -> None:
        self.batch, self.size = batch, size
        self.stride = -(-max(size, 16) // 16) * 16
        total = self.stride * batch.blocks
        self.data, self.writer, self.reader, self.flags = (np.zeros(total, np.uint8) for _ in range(4))
        self.window = batch.block * self.stride  # per lane
        self.views = {
            width: tuple(a.view(UNSIGNED[width * 8]) for a in (self.data, self.writer, self.reader, self.flags))
            for width in (1, 2, 4, 8)
        }
        self.codes = {
            width: (batch.warp_code.astype(np.uint64) * _ONES).astype(UNSIGNED[width * 8]) for width in (1, 2, 4, 8)
        }
        self.touched = False
        self.consumed: list[Array] = []  # positions that products under way read

    def barrier(self) -> None:
        if self.touched:
            self.writer[:] = 0
            self.reader[:] = 0
            self.touched = False

    def index(self, addresses: Array, lanes: Array, width: int, verb: str) -> Array:
        """Return the positions of accesses of `width` bytes; refuse those misaligned or outside."""
        wrong = (addresses & (width - 1)) != 0
        if wrong.any():
            first = int(np.argmax(wrong))
            what = f"{verb} {width} bytes of shared memory at {int(addresses[first])}, no multiple of {width}"
            self.batch.fail(MisalignedError, what, int(lanes[first]))
        if addresses.size and (addresses.min() < 0 or addresses.max() + width > self.size):
            first = int(np.argmax((addresses < 0) | (addresses + width > self.size)))
            what = f"{verb} {width} bytes at byte {int(addresses[first])} of shared memory, which has {self.size}"
            self.batch.fail(OutOfBoundsError, what, int(lanes[first]))
        return addresses + self.window[lanes]

    def load(self, addresses: Array, lanes: Array, count: int, width: int) -> tuple[Array, Array | None]:
        """Load [count, len(lanes)] elements of `width` bytes, and a mask of those never written (None: all were)."""
        at = self.index(addresses, lanes, count * width, "reads")
        if self.batch.tally.counting:
            self.batch.tally.shared_request(addresses, lanes, count * width)
        unit = min(8, count * width)
        elements = at // unit if count * width == unit else at // unit + np.arange(count * width // unit)[:, None]
        elements = elements.reshape(-1, lanes.size)
        got, state = self._note_read(elements, lanes, unit)
        missing = None
        if state is not None:
            per_byte = (self._bytes(np.ascontiguousarray(state.T), unit) & INITIALISED) == 0
            missing = per_byte.reshape(lanes.size, count, width).any(2).T
        if unit == width:
            return got, missing
        # [units, lanes] of unit bytes -> [count, lanes] of width bytes
        split = np.ascontiguousarray(got.T).view(UNSIGNED[width * 8])
        return np.ascontiguousarray(split.T), missing

    def store(self, addresses: Array, lanes: Array, values: Array, missing: Array | None = None) -> None:
        """Write [count, len(lanes)] elements; those that are `missing` leave their bytes without a value."""
        count, width = values.shape[0], values.itemsize
        at = self.index(addresses, lanes, count * width, "writes")
        if self.batch.tally.counting:
            self.batch.tally.shared_request(addresses, lanes, count * width)
        unit = min(8, count * width)
        if unit != width:
            values = np.ascontiguousarray(np.ascontiguousarray(values.T).view(UNSIGNED[unit * 8]).T)
        elements = (at // unit + np.arange(count * width // unit)[:, None]).reshape(-1, lanes.size)
        self.check_write(elements, lanes, unit)
        self.land(elements, lanes, unit, values)
        if missing is not None:
            for i in range(count):
                lost = at[missing[i]] + i * width
                self.flags[lost[:, None] + np.arange(width)] &= ~INITIALISED

    # ------------------------------------------------------------ checks

    def _note_read(self, elements: Array, lanes: Array, unit: int) -> tuple[Array, Array | None]:
        """Read elements, and their flags if some byte of them was never written."""
        data, writer, reader, flags = self.views[unit]
        own = self.codes[unit][lanes]
        self.touched = True
        wrote = writer[elements]
        if ((wrote != 0) & (wrote != own)).any():
            self._check_owner(wrote, own, elements, lanes, unit, "reads", "written")
        state = flags[elements]
        wanted = _spread(INITIALISED, unit)
        incomplete = bool(((state & _spread(INITIALISED | ARRIVING, unit)) != wanted).any())
        if incomplete:
            arriving = (self._bytes(state, unit) & ARRIVING) != 0
            if arriving.any():
                self._fail(
                    InFlightError, arriving, elements, lanes, unit, "reads", "a cp.async to it has not been waited for"
                )
        before = reader[elements]
        after = np.broadcast_to(own, elements.shape)
        if ((before != 0) & (before != own)).any():
            bytes_before, codes = self._bytes(before, unit), self._codes(own, unit)
            merged = np.where((bytes_before == 0) | (bytes_before == codes), codes, SEVERAL)
            after = merged.view(UNSIGNED[unit * 8])[..., 0]
        reader[elements] = after
        self._mark_shared(reader, elements, after)
        return data[elements], state if incomplete else None

    def _mark_shared(self, owner: Array, elements: Array, wanted: Array) -> None:
        """Mark elements that two warps touched in this very instruction as used by several."""
        clash = owner[elements] != wanted
        if clash.any():
            owner[elements[clash]] = np.iinfo(owner.dtype).max

    def check_write(self, elements: Array, lanes: Array, unit: int) -> None:
        """Refuse a write over bytes that others used since the barrier, or that something asynchronous uses."""
        _, writer, reader, flags = self.views[unit]
        own = self.codes[unit][lanes]
        for owner, verb in ((writer, "written"), (reader, "read")):
            before = owner[elements]
            if ((before != 0) & (before != own)).any():
                self._check_owner(before, own, elements, lanes, unit, "writes", verb)
        state = self._bytes(flags[elements], unit)
        for bit, what in ((ARRIVING, "a cp.async to it has not been waited for"),
                          (CONSUMED, "a tensor-core product that reads it has not been waited for")):  # fmt: skip
            if (state & bit).any():
                self._fail(InFlightError, (state & bit) != 0, elements, lanes, unit, "writes", what)

    def land(self, elements: Array, lanes: Array, unit: int, values: Array) -> None:
        """Write the bytes, and remember which warp did."""
        data, writer, _, flags = self.views[unit]
        own = np.broadcast_to(self.codes[unit][lanes], elements.shape)
        self.touched = True
        data[elements] = values
        wrong = data[elements] != values
        if wrong.any():
            self._fail(
                RaceError,
                wrong[..., None],
                elements,
                lanes,
                unit,
                "writes",
                "two threads write different values at once",
            )
        writer[elements] = own
        self._mark_shared(writer, elements, own)
        flags[elements] |= _spread(INITIALISED | UNFENCED, unit)

    def mark(self, elements: Array, unit: int, bit: np.uint8, on: bool) -> None:
        """Set or clear a flag of these elements."""
        flags = self.views[unit][3]
        if on:
            flags[elements] |= _spread(bit, unit)
        else:
            flags[elements] &= ~_spread(bit, unit)

    def _bytes(self, values: Array, unit: int) -> Array:
        return np.ascontiguousarray(values).reshape(*values.shape, 1).view(np.uint8)

    def _codes(self, own: Array, unit: int) -> Array:
        return own.astype(np.uint8)[..., None]

    def _check_owner(
        self, before: Array, own: Array, elements: Array, lanes: Array, unit: int, verb: str, done: str
    ) -> None:
        owner = self._bytes(before, unit)
        wrong = (owner != 0) & (owner != self._codes(own, unit))
        if wrong.any():
            code = int(owner[wrong][0])
            who = "several warps" if code == SEVERAL else f"warp {code - 1}"
            self._fail(RaceError, wrong, elements, lanes, unit, verb, f"{done} by {who} since the last barrier")

    def _fail(
        self, kind: type[PtxError], wrong: Array, elements: Array, lanes: Array, unit: int, verb: str, why: str
    ) -> None:
        row, column, byte = (int(place[0]) for place in np.nonzero(wrong))
        lane = int(lanes[column])
        at = int(elements[row, column]) * unit + byte - int(self.window[lane])
        self.batch.fail(kind, f"{verb} byte {at} of shared memory: {why}", lane)

    # ------------------------------------------------------------ the asynchronous side

    def consume(self, positions: Array) -> None:
        """Note bytes that a product reads from now on, until `give_back` gets the same array."""
        self.flags[positions] |= CONSUMED
        self.consumed.append(positions)

    def give_back(self, done: list[Array], behind_barrier: bool = True) -> None:
        """Free bytes that products have read; for warps that did not wait, only behind a barrier."""
        for positions in done:
            self.flags[positions] &= ~CONSUMED
            if behind_barrier:
                self.reader[positions] = SEVERAL
                self.touched = True
        self.consumed = [positions for positions in self.consumed if all(positions is not other for other in done)]
        for positions in self.consumed:
            self.flags[positions] |= CONSUMED

    def fence(self) -> None:
        """Fence the active threads' own writes, and those a barrier made visible to them (fence.proxy.async)."""
        if self.batch.whole:
            self.flags &= ~UNFENCED
            return
        flags = self.flags.reshape(self.batch.blocks, self.stride)
        writer = self.writer.reshape(self.batch.blocks, self.stride)
        keep = ~UNFENCED
        codes = np.zeros((self.batch.blocks, 256), np.bool_)
        codes[self.batch.block[self.batch.active], self.batch.warp_code[self.batch.active]] = True
        for block in np.flatnonzero(codes.any(1)):
            codes[block, 0] = True
            seen = codes[block][writer[block]]
            flags[block][seen] &= keep

    def chunks(self, block: int, addresses: Array) -> Array:
        """Read the chunks of 16 bytes that a tensor core reads of one block, checked: [..., 16] bytes."""
        if addresses.min() < 0 or addresses.max() + 16 > self.size:
            self.batch.fail(
                OutOfBoundsError, f"a matrix descriptor reaches past the {self.size} bytes of shared memory"
            )
        at = (addresses + block * self.stride)[..., None] + np.arange(16)
        flags, writer = self.flags[at], self.writer[at]
        checks = (
            (InFlightError, (flags & ARRIVING) != 0, "a cp.async to it has not been waited for"),
            (UninitialisedError, (flags & INITIALISED) == 0, "nothing was written there"),
            (RaceError, writer != 0, "written since the last barrier"),
            (UnsynchronisedError, (flags & UNFENCED) != 0, "written with no fence.proxy.async since (PTX ISA 8.6)"),
        )
        for kind, wrong, why in checks:
            if wrong.any():
                byte = int(addresses[..., None].repeat(16, -1)[wrong][0])
                self.batch.fail(kind, f"a tensor core reads the 16 bytes at {byte} of shared memory: {why}")
        return self.data[at]
