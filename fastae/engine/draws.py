"""Random numbers of a step on the twins: by torch's generator, begun anew from (seed, step, use) every time.

So a step repeats its numbers wherever it is taken again, after a resume say; and the first rows of a batch get the same
ones however many rows follow, which is what lets several processes draw the whole batch's and take their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

At = tuple[int, int, int]  # seed, step, where these rows begin in the batch of all processes
_GROUP = 16  # normal numbers that ATen makes together; those of a last, shorter group are made differently


class Draws:
    """A generator, and memory for its numbers."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, list[torch.Generator]()  # none on a device without numbers
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}

    def bits(self, at: At, stream: int, rows: int, columns: int) -> Tensor:
        """[rows, columns] of int16, all bits random: four of a draw of 64 bits, a quarter of the time of uniform ones.

        Good until the next call.
        """
        width = -(-columns // 4)
        words = self._begun(at, stream, (at[2] + rows) * width, torch.int64).random_(
            -(2**63), None, generator=self._generator
        )
        return words.view(torch.int16).view(-1, 4 * width)[at[2] :, :columns]

    def normals(self, at: At, stream: int, rows: int, columns: int) -> Tensor:
        """[rows, columns] of the standard normal law, fp32; good until the next call."""
        count = (at[2] + rows) * columns
        numbers = self._begun(at, stream, math.ceil(count / _GROUP) * _GROUP, torch.float32)
        return numbers.normal_(generator=self._generator)[:count].view(-1, columns)[at[2] :]

    def indices(self, at: At, stream: int, rows: int, columns: int, below: int) -> Tensor:
        """[rows, columns] of whole numbers below `below`, int64; good until the next call."""
        numbers = self._begun(at, stream, (at[2] + rows) * columns, torch.int64)
        return numbers.random_(0, below, generator=self._generator).view(-1, columns)[at[2] :]

    @property
    def _generator(self) -> torch.Generator:
        if not self._made:
            self._made.append(torch.Generator(self._device))
        return self._made[0]

    def _begun(self, at: At, stream: int, count: int, dtype: torch.dtype) -> Tensor:
        self._generator.manual_seed(mixed(at[0], at[1], stream))
        key = count, dtype
        if key not in self._memory:
            self._memory[key] = torch.empty(count, dtype=dtype, device=self._device)
        return self._memory[key]


def mixed(*numbers: int) -> int:
    """One seed of several numbers, by the finaliser of SplitMix64 (Steele et al. 2014): neighbours differ in half their
    bits, the low 32 of which begin a CPU's generator."""
    state = 0
    for number in numbers:
        state = (state + number * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF
