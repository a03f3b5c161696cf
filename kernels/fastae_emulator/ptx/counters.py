"""Counters of a launch: instructions, tensor-core operations, bytes, sectors and bank conflicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fastae_emulator.ptx.scalars import Array
from fastae_emulator.ptx.text import Program

SECTOR = 32  # bytes: the unit in which global memory is fetched
BANKS = 32  # of 4 bytes each


@dataclass(frozen=True)
class TensorTraffic:
    """Distinct bytes of one tensor that the blocks read and wrote, each counted once however often it was touched."""

    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Counters:
    """Counts of one launch, or of the blocks of it that were executed. Without counting, the last group is empty."""

    blocks: int
    blocks_in_grid: int
    instructions: int  # one for each warp that issues it
    opcodes: dict[str, int]  # the same by opcode and qualifiers
    barriers: int  # bar.sync, one for each warp
    async_copies: int  # cp.async, one for each warp
    tensor_core_ops: dict[str, int]  # mma.sync, wgmma, tcgen05.mma: instructions issued by warps, warpgroups, threads
    tensor_core_flops: int

    tensors: dict[str, TensorTraffic] = field(default_factory=dict)
    load_widths: dict[int, int] = field(default_factory=dict)  # bytes a thread asks for at once -> warp requests
    store_widths: dict[int, int] = field(default_factory=dict)
    sectors_read: int = 0  # over all warp requests: caches are not modelled
    sectors_written: int = 0
    sector_bytes: int = 0  # of those sectors, the bytes that lie in a tensor: at its ends a sector has less than 32
    sector_bytes_used: int = 0  # the bytes that were asked for
    shared_requests: int = 0
    bank_conflicts: int = 0  # shared-memory wavefronts beyond the fewest that the request's bytes need

    @property
    def requests(self) -> int:
        """Global loads and stores, one for each warp."""
        return sum(self.load_widths.values()) + sum(self.store_widths.values())

    @property
    def sector_use(self) -> float:
        """Share of the tensors' bytes in the sectors fetched and written that were asked for; 1 without any."""
        return self.sector_bytes_used / self.sector_bytes if self.sector_bytes else 1.0


class Tally:
    """Collects while the machine runs. `issued` is always kept; the rest only when `counting`, which takes time."""

    def __init__(self, program: Program, counting: bool) -> None:
        self.program, self.counting = program, counting
        self.issued = [0] * len(program.instructions)
        self.tensor_core: Counter[str] = Counter()
        self.flops = 0
        self.widths: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
        self.sectors = {False: 0, True: 0}
        self.sector_bytes = 0
        self.used = 0
        self.shared_requests = 0
        self.bank_conflicts = 0

    def product(self, name: str, times: int, m: int, n: int, k: int) -> None:
        self.tensor_core[name] += times
        self.flops += 2 * m * n * k * times

    def global_request(self, addresses: Array, lanes: Array, width: int, write: bool) -> Array:
        """Count a request of some lanes, and return the addresses of the sectors that it moves."""
        warps = lanes // 32
        order = np.lexsort((addresses, warps))
        warps, addresses = warps[order], addresses[order]
        fresh = np.ones(warps.size, np.bool_)
        fresh[1:] = (warps[1:] != warps[:-1]) | (addresses[1:] != addresses[:-1])
        self.widths[write][width] += int(np.unique(warps).size)
        self.used += int(fresh.sum()) * width
        # A request of up to 32 bytes aligned to its width lies in one sector.
        sectors = addresses // SECTOR
        fresh[1:] = (warps[1:] != warps[:-1]) | (sectors[1:] != sectors[:-1])
        self.sectors[write] += int(fresh.sum())
        moved: Array = sectors[fresh] * SECTOR
        return moved

    def touch(self, mask: Array, start: int, offsets: Array, count: int) -> None:
        """Mark `count` elements at these offsets of an allocation as touched."""
        first = (offsets - start) // mask.itemsize
        for i in range(count):
            mask[first + i] = np.iinfo(mask.dtype).max

    def shared_request(self, addresses: Array, lanes: Array, width: int) -> None:
        """Count wavefronts: of a quarter or half of a warp for 16 or 8 bytes a thread; the busiest bank decides."""
        phase = lanes * max(width // 4, 1) // 32  # warps, halves or quarters of them
        words = (addresses[:, None] + np.arange(0, width, 4)) // 4
        phases = np.broadcast_to(phase[:, None], words.shape)
        keys = np.unique(phases.ravel().astype(np.int64) << 32 | words.ravel())
        bank = (keys >> 32) * BANKS + (keys & (BANKS - 1))
        banks, loads = np.unique(bank, return_counts=True)
        owners = banks // BANKS
        starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]])
        self.shared_requests += int(np.unique(lanes // 32).size)
        self.bank_conflicts += int(np.maximum.reduceat(loads, starts).sum()) - starts.size

    def counters(self, blocks: int, blocks_in_grid: int, tensors: dict[str, TensorTraffic]) -> Counters:
        """Sum up once every batch has run."""
        opcodes: Counter[str] = Counter()
        for instruction, times in zip(self.program.instructions, self.issued, strict=True):
            opcodes[instruction.name] += times
        opcodes = +opcodes
        copies = sum(n for name, n in opcodes.items() if name.startswith(("cp.async.ca", "cp.async.cg")))
        return Counters(
            blocks, blocks_in_grid, sum(opcodes.values()), dict(opcodes.most_common()), opcodes["bar.sync"], copies,
            dict(self.tensor_core), self.flops, tensors, dict(self.widths[False]),
            dict(self.widths[True]), self.sectors[False], self.sectors[True], self.sector_bytes, self.used,
            self.shared_requests, self.bank_conflicts,
        )  # fmt: skip
