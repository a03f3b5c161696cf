"""Global memory: the tensors of a launch, a terabyte apart, so that no wrong offset of one can land in another."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.batch import Batch
from fastae_emulator.ptx.counters import SECTOR, Tally, TensorTraffic
from fastae_emulator.ptx.errors import MisalignedError, OutOfBoundsError
from fastae_emulator.ptx.scalars import UNSIGNED, Array

_SHIFT = 40
_MIDDLE = 1 << (_SHIFT - 1)


class Allocation:
    """Bytes behind one or more arguments. `allowed` marks those that belong to them; None if all do."""

    def __init__(self, name: str, data: Array, base: int, allowed: Array | None) -> None:
        self.name, self.data, self.base, self.allowed = name, data, base, allowed
        self.read: Array | None = None  # per byte, once something counts
        self.written: Array | None = None

    def view(self, array: Array, width: int) -> tuple[Array, int]:
        """View `array` (a byte each) as elements of `width` bytes, at the addresses that are multiples of it."""
        start = -self.base % width
        count = (array.size - start) // width
        return array[start : start + max(count, 0) * width].view(UNSIGNED[width * 8]), start


class GlobalMemory:
    """Tensors by address. Addresses are made up, except that they are congruent to the real ones modulo 256."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def add(self, name: str, data: Array, real_address: int = 0, allowed: Array | None = None) -> int:
        """Let kernels touch `data` (one-dimensional uint8, used in place), and return its address."""
        base = ((len(self.allocations) + 1) << _SHIFT) + _MIDDLE + real_address % 256
        if allowed is not None and allowed.all():
            allowed = None
        self.allocations.append(Allocation(name, data, base, allowed))
        return base

    def count(self) -> None:
        """Start to remember which bytes are touched."""
        for found in self.allocations:
            found.read, found.written = np.zeros(found.data.size, np.uint8), np.zeros(found.data.size, np.uint8)

    def traffic(self) -> dict[str, TensorTraffic]:
        """Distinct bytes of each tensor that were touched since `count`."""
        return {
            a.name: TensorTraffic(
                0 if a.read is None else int(np.count_nonzero(a.read)),
                0 if a.written is None else int(np.count_nonzero(a.written)),
            )
            for a in self.allocations
        }

    def count_request(self, tally: Tally, addresses: Array, lanes: Array, width: int, write: bool) -> None:
        """Count a request, and how much of its sectors lies in a tensor."""
        sectors = tally.global_request(addresses, lanes, width, write)
        tally.sector_bytes += self._bytes_within(sectors, SECTOR)

    def _bytes_within(self, addresses: Array, width: int) -> int:
        """Count how many of the `width` bytes from each address on lie in an allocation."""
        total = 0
        for number in np.unique(addresses >> _SHIFT).tolist():
            if 1 <= number <= len(self.allocations):
                base, size = self.allocations[number - 1].base, self.allocations[number - 1].data.size
                first = addresses[addresses >> _SHIFT == number]
                inside = np.minimum(first + width, base + size) - np.maximum(first, base)
                total += int(np.maximum(inside, 0).sum())
        return total

    def find(self, batch: Batch, addresses: Array, lanes: Array, width: int, write: bool) -> tuple[Allocation, Array]:
        """Find the allocation of these addresses, and their offsets in it; refuse accesses misaligned or outside."""
        verb = "writes" if write else "reads"
        wrong = (addresses & (width - 1)) != 0
        if wrong.any():
            first = int(np.argmax(wrong))
            name = self._describe(int(addresses[first]), width)
            batch.fail(
                MisalignedError, f"{verb} {width} bytes at an address that is no multiple: {name}", int(lanes[first])
            )
        number = int(addresses[0]) >> _SHIFT
        if not 1 <= number <= len(self.allocations):
            self._outside(batch, addresses, lanes, width, verb, np.ones(addresses.size, np.bool_))
        found = self.allocations[number - 1]
        offsets = addresses - found.base
        if offsets.min() < 0 or offsets.max() + width > found.data.size:
            self._outside(batch, addresses, lanes, width, verb, (offsets < 0) | (offsets + width > found.data.size))
        if found.allowed is not None:
            allowed, start = found.view(found.allowed.view(np.uint8), min(width, 8))
            full = np.uint64(0x0101010101010101).astype(allowed.dtype)
            wrong = np.zeros(offsets.size, np.bool_)
            for part in range(0, width, min(width, 8)):
                wrong |= allowed[(offsets - start + part) // min(width, 8)] != full
            if wrong.any():
                first = int(np.argmax(wrong))
                at = self._describe(int(addresses[first]), width)
                batch.fail(OutOfBoundsError, f"{verb} {width} bytes between the elements: {at}", int(lanes[first]))
        return found, offsets

    def _outside(self, batch: Batch, addresses: Array, lanes: Array, width: int, verb: str, wrong: Array) -> None:
        first = int(np.argmax(wrong))
        batch.fail(
            OutOfBoundsError, f"{verb} {width} bytes {self._describe(int(addresses[first]), width)}", int(lanes[first])
        )

    def _describe(self, address: int, width: int) -> str:
        number = address >> _SHIFT
        if not 1 <= number <= len(self.allocations):
            return f"at {address:#x}, in no tensor" + (" (a null pointer?)" if abs(address) < 1 << 30 else "")
        found = self.allocations[number - 1]
        offset, size = address - found.base, found.data.size
        if offset < 0:
            return f"at {-offset} bytes before the start of {found.name} ({size} bytes)"
        if offset + width > size:
            return f"at byte {offset} of {found.name}, which has {size}"
        return f"at byte {offset} of {found.name}"

    def load(self, batch: Batch, addresses: Array, count: int, width: int) -> Array:
        """Load [count, lanes]: `count` elements of `width` bytes in every active lane."""
        lanes, own = batch.own(addresses)
        out = np.zeros((count, batch.lanes), UNSIGNED[width * 8])
        for chosen, found, offsets in self._each(batch, own, lanes, count * width, write=False):
            data, start = found.view(found.data, width)
            if found.read is not None:
                batch.tally.touch(*found.view(found.read, width), offsets, count)
            got = data[(offsets - start) // width + np.arange(count)[:, None]]
            if chosen is None and batch.whole:
                return got
            out[:, lanes if chosen is None else lanes[chosen]] = got
        return out

    def store(self, batch: Batch, addresses: Array, values: Array) -> None:
        """Write [count, lanes] elements in the active lanes."""
        lanes, own = batch.own(addresses)
        count, width = values.shape[0], values.itemsize
        if not batch.whole:
            values = values[:, lanes]
        for chosen, found, offsets in self._each(batch, own, lanes, count * width, write=True):
            data, start = found.view(found.data, width)
            if found.written is not None:
                batch.tally.touch(*found.view(found.written, width), offsets, count)
            data[(offsets - start) // width + np.arange(count)[:, None]] = (
                values if chosen is None else values[:, chosen]
            )

    def _each(
        self, batch: Batch, addresses: Array, lanes: Array, width: int, write: bool
    ) -> list[tuple[Array | None, Allocation, Array]]:
        """Split the accesses of one instruction by allocation; nearly always there is one."""
        numbers = addresses >> _SHIFT
        if batch.tally.counting:
            self.count_request(batch.tally, addresses, lanes, width, write)
        if (numbers == numbers[0]).all():
            return [(None, *self.find(batch, addresses, lanes, width, write))]
        parts: list[tuple[Array | None, Allocation, Array]] = []
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            parts.append((chosen, *self.find(batch, addresses[chosen], lanes[chosen], width, write)))
        return parts
