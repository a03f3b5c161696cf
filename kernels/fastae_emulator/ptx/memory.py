"""Global memory: the tensors of a launch, a terabyte apart, so that no wrong offset of one can land in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastae_emulator.ptx.errors import MisalignedError, OutOfBoundsError
from fastae_emulator.ptx.scalars import UNSIGNED, Array

if TYPE_CHECKING:
    from fastae_emulator.ptx.machine import Machine

_SHIFT = 40
_MIDDLE = 1 << (_SHIFT - 1)


class Allocation:
    """The bytes behind one or more arguments. `allowed` marks those that belong to them; None if all do."""

    def __init__(self, name: str, data: Array, base: int, allowed: Array | None) -> None:
        self.name, self.data, self.base, self.allowed = name, data, base, allowed
        self.read: Array | None = None  # per byte, once something counts
        self.written: Array | None = None

    def view(self, array: Array, width: int) -> tuple[Array, int]:
        """`array` (a byte each) as elements of `width` bytes at the addresses that are multiples of it."""
        start = -self.base % width
        count = (array.size - start) // width
        return array[start : start + max(count, 0) * width].view(UNSIGNED[width * 8]), start


class GlobalMemory:
    """Addresses are made up, except that they are congruent to the real ones modulo 256."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []

    def add(self, name: str, data: Array, real_address: int = 0, allowed: Array | None = None) -> int:
        """Let kernels touch `data` (one-dimensional uint8, used in place); the address they will see."""
        base = ((len(self.allocations) + 1) << _SHIFT) + _MIDDLE + real_address % 256
        if allowed is not None and allowed.all():
            allowed = None
        self.allocations.append(Allocation(name, data, base, allowed))
        return base

    def count(self) -> None:
        """From now on remember which bytes are touched."""
        for found in self.allocations:
            found.read, found.written = np.zeros(found.data.size, np.uint8), np.zeros(found.data.size, np.uint8)

    def bytes_within(self, addresses: Array, width: int) -> int:
        """How many of the `width` bytes from each address on lie in an allocation."""
        total = 0
        for number in np.unique(addresses >> _SHIFT).tolist():
            if 1 <= number <= len(self.allocations):
                base, size = self.allocations[number - 1].base, self.allocations[number - 1].data.size
                first = addresses[addresses >> _SHIFT == number]
                inside = np.minimum(first + width, base + size) - np.maximum(first, base)
                total += int(np.maximum(inside, 0).sum())
        return total

    def find(
        self, machine: Machine, addresses: Array, lanes: Array, width: int, write: bool
    ) -> tuple[Allocation, Array]:
        """The allocation all of these addresses lie in, and their offsets; refuses what is misaligned or outside."""
        verb = "writes" if write else "reads"
        wrong = (addresses & (width - 1)) != 0
        if wrong.any():
            first = int(np.argmax(wrong))
            name = self._describe(int(addresses[first]), width)
            machine.fail(
                MisalignedError, f"{verb} {width} bytes at an address that is no multiple: {name}", int(lanes[first])
            )
        number = int(addresses[0]) >> _SHIFT
        if not 1 <= number <= len(self.allocations):
            self._outside(machine, addresses, lanes, width, verb, np.ones(addresses.size, np.bool_))
        found = self.allocations[number - 1]
        offsets = addresses - found.base
        if offsets.min() < 0 or offsets.max() + width > found.data.size:
            self._outside(machine, addresses, lanes, width, verb, (offsets < 0) | (offsets + width > found.data.size))
        if found.allowed is not None:
            allowed, start = found.view(found.allowed.view(np.uint8), min(width, 8))
            full = np.uint64(0x0101010101010101).astype(allowed.dtype)
            wrong = np.zeros(offsets.size, np.bool_)
            for part in range(0, width, min(width, 8)):
                wrong |= allowed[(offsets - start + part) // min(width, 8)] != full
            if wrong.any():
                first = int(np.argmax(wrong))
                at = self._describe(int(addresses[first]), width)
                machine.fail(OutOfBoundsError, f"{verb} {width} bytes between the elements: {at}", int(lanes[first]))
        return found, offsets

    def _outside(self, machine: Machine, addresses: Array, lanes: Array, width: int, verb: str, wrong: Array) -> None:
        first = int(np.argmax(wrong))
        machine.fail(
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

    def load(self, machine: Machine, addresses: Array, count: int, width: int) -> Array:
        """[count, lanes]: `count` elements of `width` bytes in every active lane."""
        lanes, own = _active(machine, addresses)
        out = np.zeros((count, machine.lanes), UNSIGNED[width * 8])
        for chosen, found, offsets in self._each(machine, own, lanes, count * width, write=False):
            data, start = found.view(found.data, width)
            if found.read is not None:
                machine.tally.touch(*found.view(found.read, width), offsets, count)
            got = data[(offsets - start) // width + np.arange(count)[:, None]]
            if chosen is None and machine.whole:
                return got
            out[:, lanes if chosen is None else lanes[chosen]] = got
        return out

    def store(self, machine: Machine, addresses: Array, values: Array) -> None:
        """Write [count, lanes] elements in the active lanes."""
        lanes, own = _active(machine, addresses)
        count, width = values.shape[0], values.itemsize
        if not machine.whole:
            values = values[:, lanes]
        for chosen, found, offsets in self._each(machine, own, lanes, count * width, write=True):
            data, start = found.view(found.data, width)
            if found.written is not None:
                machine.tally.touch(*found.view(found.written, width), offsets, count)
            data[(offsets - start) // width + np.arange(count)[:, None]] = (
                values if chosen is None else values[:, chosen]
            )

    def _each(
        self, machine: Machine, addresses: Array, lanes: Array, width: int, write: bool
    ) -> list[tuple[Array | None, Allocation, Array]]:
        """The accesses of one instruction, allocation by allocation; nearly always there is one."""
        numbers = addresses >> _SHIFT
        if machine.tally.counting:
            machine.tally.global_request(machine, addresses, lanes, width, write)
        if (numbers == numbers[0]).all():
            return [(None, *self.find(machine, addresses, lanes, width, write))]
        parts: list[tuple[Array | None, Allocation, Array]] = []
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            parts.append((chosen, *self.find(machine, addresses[chosen], lanes[chosen], width, write)))
        return parts


def _active(machine: Machine, addresses: Array) -> tuple[Array, Array]:
    if addresses.shape[0] != machine.lanes:
        addresses = np.broadcast_to(addresses, (machine.lanes,))
    if machine.whole:
        return machine.every, addresses
    lanes = np.flatnonzero(machine.active)
    return lanes, addresses[lanes]
