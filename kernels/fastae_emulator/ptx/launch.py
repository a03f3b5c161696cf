"""Run a kernel over its grid, or over some of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fastae_emulator.ptx.code import Code
from fastae_emulator.ptx.counters import Counters, Tally
from fastae_emulator.ptx.errors import PtxError
from fastae_emulator.ptx.machine import Machine
from fastae_emulator.ptx.memory import GlobalMemory
from fastae_emulator.ptx.scalars import SCALARS, UNSIGNED, Array
from fastae_emulator.ptx.state import State

LANES = 4096  # threads side by side: beyond this numpy's time per element dominates its time per call
BATCH_BYTES = 4 << 20  # of shared memory in a batch


def launch(
    code: Code,
    grid: Sequence[int],
    memory: GlobalMemory,
    arguments: Sequence[int | float],
    shared_bytes: int = 0,
    blocks: Iterable[int] | None = None,
    count: bool = False,
) -> Counters:
    """Execute the blocks with these linear numbers (all of them by default), and count what they do.

    `arguments` are addresses from `memory` and numbers, one for each parameter; missing ones at the end are 0.
    Blocks run side by side in batches, in the order of their numbers.
    """
    x, y, z = (*(int(size) for size in grid), 1, 1)[:3]
    every = range(x * y * z)
    chosen = list(every if blocks is None else blocks)
    wrong = [block for block in chosen if block not in every]
    if wrong:
        raise ValueError(f"launch: blocks must be numbers below {len(every)}, the size of the grid; got {wrong[0]}")
    program, tally = code.program, Tally(code.program, count)
    if len(arguments) > len(program.parameters):
        raise PtxError(f"{program.name}: {len(program.parameters)} parameters, {len(arguments)} arguments")
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    values = {name: _bits(kind, v) for (name, kind), v in zip(program.parameters, given, strict=True)}
    if count:
        memory.count()
    many = max(1, min(LANES // program.threads, BATCH_BYTES // max(shared_bytes, 1)))
    with np.errstate(all="ignore"):
        for first in range(0, len(chosen), many):
            state = State(program, (x, y, z), chosen[first : first + many], tally, memory, values, shared_bytes)
            Machine(code, state).run()
    return tally.counters(len(chosen), len(every), memory.traffic() if count else {})


def _bits(kind: str, value: int | float) -> Array:
    scalar = SCALARS[kind]
    if scalar.is_float:
        return np.array([value], scalar.raw)
    return np.array([int(value) & ((1 << scalar.bits) - 1)], UNSIGNED[scalar.bits])
