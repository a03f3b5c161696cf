"""All numbers of a launch: which tile a kernel uses on which GPU, how partial results are split.

A tile changes speed, never bits that users compare: partial results are split and added as the shape alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from fastae_kernels.jit.launch import aligned, family, interpreted, product


@dataclass(frozen=True)
class Tile:
    """One program computes `rows` x `cols` outputs and walks the reduction in steps of `depth`."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8  # row tiles that share column tiles in L2

    def clipped(self, rows: int, cols: int, depth: int) -> Tile:
        """The tile cut down to the problem; a tensor-core operand needs 16 at least."""

        def clip(size: int, extent: int) -> int:
            return min(size, max(16, triton.next_power_of_2(extent)))

        return replace(self, rows=clip(self.rows, rows), cols=clip(self.cols, cols), depth=clip(self.depth, depth))

    def meta(self) -> dict[str, int]:
        """The launch arguments every matrix kernel takes."""
        return {
            "BLOCK_I": self.rows,
            "BLOCK_J": self.cols,
            "BLOCK_R": self.depth,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# (family or unaligned, bytes per element) -> tile. Compiled for the NVIDIA families; no GPU has timed them yet.
TILES: dict[tuple[str, int], Tile] = {
    ("interpreter", 2): Tile(32, 32, 32, 4, 1),
    ("interpreter", 4): Tile(32, 32, 32, 4, 1),
    ("interpreter", 8): Tile(32, 32, 32, 4, 1),
    ("ampere", 2): Tile(64, 128, 32, 4, 4),
    ("ampere", 4): Tile(64, 64, 32, 4, 3),
    ("ampere", 8): Tile(32, 32, 16, 4, 2),
    ("hopper", 2): Tile(128, 128, 64, 8, 3),
    ("hopper", 4): Tile(64, 64, 32, 4, 3),
    ("hopper", 8): Tile(32, 32, 16, 4, 2),
    ("blackwell", 2): Tile(128, 128, 64, 8, 3),
    ("blackwell", 4): Tile(64, 64, 32, 4, 2),  # with three stages, or eight warps, IEEE products spilled
    ("blackwell", 8): Tile(32, 32, 16, 4, 2),
    ("amd", 2): Tile(64, 128, 32, 4, 2),
    ("amd", 4): Tile(64, 64, 32, 4, 2),
    ("amd", 8): Tile(32, 32, 16, 4, 2),
    # Rows that are not multiples of 16 bytes are loaded element by element, through registers: the large tiles spill.
    ("unaligned", 2): Tile(64, 64, 32, 4, 2),
    ("unaligned", 4): Tile(64, 64, 16, 4, 2),
    ("unaligned", 8): Tile(32, 32, 16, 4, 2),
}


# The tiles of `linear_act_loss` where they differ: its epilogue holds target, y and dp beside the accumulator, and with
# 64 values of each in a thread gelu and logit spilled.
LOSS_TILES: dict[tuple[str, int], Tile] = TILES | {
    ("ampere", 2): Tile(64, 64, 32, 4, 4),
    ("hopper", 2): Tile(128, 64, 64, 8, 3),
    ("blackwell", 2): Tile(128, 64, 64, 8, 3),
    ("amd", 2): Tile(64, 64, 32, 4, 2),
    ("unaligned", 2): Tile(64, 32, 32, 4, 2),
    ("unaligned", 4): Tile(64, 32, 16, 4, 2),
}

# Products whose operands are not contiguous along the reduction. wgmma and tcgen05 take such operands in 16 bits alone:
# in tf32 Triton transposes them on the way, 4 bytes at a time. Tiles of 32 rows are multiplied by mma.sync, which reads
# them as they are, copied 16 bytes at a time.
TF32_COLUMNS: dict[tuple[str, int], Tile] = {
    ("hopper", 4): Tile(32, 64, 32, 4, 3),
    ("blackwell", 4): Tile(32, 64, 32, 4, 3),
}

# The tiles of `linear_wgrad`: small ones fill the device where large ones would need more splits of the rows, each of
# which writes and reads a partial dw in fp32.
WGRAD_TILES: dict[tuple[str, int], Tile] = TILES | {
    ("ampere", 2): Tile(64, 64, 32, 4, 4),
    ("hopper", 2): Tile(64, 64, 64, 4, 4),
    ("blackwell", 2): Tile(64, 64, 64, 4, 4),
    **TF32_COLUMNS,
}

# The tiles of `linear_dgrad_act`
DGRAD_TILES: dict[tuple[str, int], Tile] = TILES | TF32_COLUMNS

# `decoder_loss`: (family or unaligned, how a product is computed) -> rows, columns of the output per step; all of K.
DECODER_TILES: dict[tuple[str, str], Tile] = {
    ("ampere", "half"): Tile(64, 64, 256, 8, 2),
    ("ampere", "tf32"): Tile(32, 32, 256, 8, 1),
    ("hopper", "half"): Tile(64, 64, 256, 8, 2),
    ("hopper", "tf32"): Tile(64, 16, 256, 8, 2),
    ("hopper", "ieee"): Tile(32, 16, 256, 8, 2),  # with four warps hundreds of registers spilled
    # One stage: with two, Triton 3.7.1 fences x once before the loop and the asynchronous copies of w not at all,
    # though tcgen05.mma reads both through another proxy (PTX ISA 8.6, fence.proxy.async).
    ("blackwell", "half"): Tile(64, 64, 256, 8, 1),
    # tf32 on Blackwell keeps the small one: in 64 rows LLVM reads what tcgen05.ld brings before it has been waited for
    ("amd", "half"): Tile(32, 32, 256, 4, 1),
    ("amd", "tf32"): Tile(16, 16, 256, 8, 1),
    ("amd", "ieee"): Tile(32, 16, 256, 8, 1),
    ("unaligned", "half"): Tile(16, 32, 256, 8, 2),
    ("unaligned", "tf32"): Tile(16, 32, 256, 8, 2),
    ("unaligned", "ieee"): Tile(32, 16, 256, 8, 1),
}

# The same where there is no larger one, or where large ones leave SMs idle.
DECODER_SMALL: dict[str, Tile] = {
    "half": Tile(32, 32, 256, 4, 2),  # eight warps would store 8 bytes a thread
    "tf32": Tile(32, 32, 256, 8, 1),
    "ieee": Tile(32, 16, 256, 4, 2),
    "double": Tile(16, 16, 256, 8, 1),
}
# The same for a loss with a parameter, whose terms take more registers.
DECODER_TRAINED: dict[str, Tile] = {
    "half": Tile(32, 32, 256, 8, 2),
    "tf32": Tile(32, 16, 256, 8, 1),
    "ieee": Tile(32, 16, 256, 8, 2),
}
# `stack_score`, in the same way: rows carried, columns of the last layer per step, columns of x per step of the first.
STACK_TILES: dict[tuple[str, str], Tile] = {
    ("blackwell", "half"): Tile(64, 64, 64, 8, 3),
    ("amd", "half"): Tile(32, 32, 64, 4, 1),
    ("amd", "tf32"): Tile(16, 32, 64, 4, 1),
    ("amd", "ieee"): Tile(32, 16, 32, 4, 1),
    # Smaller ones spill: tf32 with 32 columns; IEEE with 16 rows. On the other two 32 rows spill.
    ("ampere", "tf32"): Tile(16, 64, 64, 8, 2),
    ("ampere", "ieee"): Tile(32, 64, 32, 8, 2),
    ("hopper", "ieee"): Tile(16, 16, 32, 8, 2),
    ("blackwell", "ieee"): Tile(16, 16, 16, 8, 2),
}
STACK_SMALL: dict[str, Tile] = {
    "half": Tile(32, 64, 64, 8, 3),
    "tf32": Tile(16, 32, 64, 8, 2),
    "ieee": Tile(32, 16, 32, 8, 2),
    "double": Tile(16, 16, 16, 8, 1),
}
# `linear_sample` and `linear_dgrad_sample`: rows, and steps of the reduction; two accumulators of all latents each.
SAMPLE_SMALL: dict[str, Tile] = {
    "half": Tile(32, 128, 64, 8, 2),
    "tf32": Tile(32, 128, 32, 8, 2),
    "ieee": Tile(16, 128, 32, 4, 2),  # with 32 rows sm_100 spilled at 128 latents
    "double": Tile(16, 128, 16, 8, 1),
}
SAMPLE_TILES: dict[tuple[str, str], Tile] = {
    # 32 rows of 128 latents spill
    ("amd", "half"): Tile(16, 128, 32, 8, 1),
    ("amd", "tf32"): Tile(16, 128, 32, 8, 1),
    ("amd", "ieee"): Tile(16, 128, 32, 8, 1),
}
SAMPLE_WIDTH = 128  # the most latents of which a block of rows stays on chip
# Where the tile above spills with a loss that has a parameter.
STACK_TRAINED: dict[tuple[str, str], Tile] = {
    ("blackwell", "half"): Tile(32, 64, 64, 8, 3),
    ("ampere", "ieee"): Tile(32, 16, 32, 8, 2),
}
STACK_CHUNK = {"half": 128, "tf32": 64, "ieee": 16, "double": 16}  # columns of a hidden layer multiplied at a time
FILL = 128  # programs: about one for each SM of an A100 or H100


def choose(rows: int, cols: int, depth: int, *operands: Tensor, table: dict[tuple[str, int], Tile] = TILES) -> Tile:
    """The tile for a [rows, cols] output with a reduction of `depth`, on the device at hand."""
    kind = family() if interpreted() or aligned(*operands) else "unaligned"
    return table[kind, operands[0].dtype.itemsize].clipped(rows, cols, depth)


def choose_loss(rows: int, cols: int, depth: int, *operands: Tensor, trained: bool = False) -> Tile:
    """The tile of `linear_act_loss`; `trained`: of a loss with a parameter, whose terms take more registers."""
    tile = choose(rows, cols, depth, *operands, table=LOSS_TILES)
    if not trained:
        return tile
    return replace(tile, rows=min(tile.rows, TRAINED_TILE[0]), cols=min(tile.cols, TRAINED_TILE[1]), warps=8)


def choose_decoder(rows: int, cols: int, depth: int, *operands: Tensor, trained: bool = False) -> Tile:
    """The tile of `decoder_loss`; `depth` is all of K. `trained` as above."""
    kind, gpu = product(operands[0].dtype), family()
    if trained and aligned(*operands) and gpu != "amd" and kind in DECODER_TRAINED:  # AMD's are as small
        return DECODER_TRAINED[kind].clipped(rows, cols, depth)
    tile = DECODER_TILES.get((gpu if aligned(*operands) else "unaligned", kind), DECODER_SMALL[kind])
    return _filling(rows, tile, DECODER_SMALL[kind]).clipped(rows, cols, depth)


def choose_sample(rows: int, cols: int, depth: int, *operands: Tensor) -> Tile:
    """The tile of `linear_sample` and `linear_dgrad_sample`, whose `cols` are all latents."""
    kind = product(operands[0].dtype)
    tile = SAMPLE_TILES.get((family(), kind), SAMPLE_SMALL[kind]).clipped(rows, SAMPLE_WIDTH, depth)
    # stores of 16 bytes a thread
    return replace(tile, cols=cols, warps=tile.warps if cols > 64 else min(tile.warps, 4))


def choose_stack(rows: int, depth: int, x: Tensor, trained: bool = False) -> Tile:
    """The tile of `stack_score` and `stack_encode`; `depth` is the width of x. `trained` as above."""
    kind = product(x.dtype)
    tile = STACK_TILES.get((family(), kind), STACK_SMALL[kind])
    if trained:
        tile = STACK_TRAINED.get((family(), kind), tile)
    return _filling(rows, tile, STACK_SMALL[kind]).clipped(rows, depth, depth)


def _filling(rows: int, tile: Tile, small: Tile) -> Tile:
    return small if rows < FILL * tile.rows and small.rows < tile.rows else tile


# ---------------------------------------------------------------- other numbers of a launch

LOSS_BLOCK = 4096  # elements that a program of `loss` reads of each tensor; fixed: it decides the order of the sum
GATHER_TILE = (16, 128)  # rows and columns of `gather`: 16 values a thread, and four of a counter beside each other
LOSS_BLOCK_TRAINED = 1024  # the same of a loss with a parameter: with 16 values a thread the negative binomial spilled
TRAINED_TILE = (64, 32)  # the most rows and columns of a tile of `linear_act_loss` with such a loss: 8 values a thread
ACT_BWD_BYTES = 16384  # of a block of `act_bwd`, counted in fp32: 32 values a thread
PENALTY_BLOCK = 256  # partial sums of a penalty that are added at once
DECODER_WIDTH = 256  # the widest x of which `decoder_loss` keeps a block of rows on chip
STACK_WIDTH = 256  # the widest hidden layer whose rows `stack_score` and `stack_encode` keep on chip
WARP_COLUMNS = 512  # of `sum_partials`: in one warp 16 a thread, stores of 16 bytes in every type
