"""Host side of a launch: which tile a kernel uses on which GPU, whether a launch is legal, and on which device.

A tile changes speed, never bits that users compare: partial results are split and added as the shape alone decides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


# The tiles of `linear_act_mse` where they differ: its epilogue holds target, y and dp beside the accumulator, and with
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

# `decoder_mse`: (family or unaligned, how a product is computed) -> rows, columns of the output per step; all of K.
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
STACK_CHUNK = {"half": 128, "tf32": 64, "ieee": 16, "double": 16}  # columns of a hidden layer multiplied at a time
FILL = 128  # programs: about one for each SM of an A100 or H100


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def family() -> str:
    """The GPU family of the active Triton driver, as the tile table spells it."""
    if interpreted():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    return "ampere" if target.arch < 90 else "hopper" if target.arch < 100 else "blackwell"


def aligned(*operands: Tensor) -> bool:
    """Whether rows are multiples of 16 bytes, so that they can be copied asynchronously."""
    size = operands[0].dtype.itemsize
    return all(stride == 1 or stride * size % 16 == 0 for operand in operands for stride in operand.stride())


def choose(rows: int, cols: int, depth: int, *operands: Tensor, table: dict[tuple[str, int], Tile] = TILES) -> Tile:
    """The tile for a [rows, cols] output with a reduction of `depth`, on the device at hand."""
    kind = family() if interpreted() or aligned(*operands) else "unaligned"
    return table[kind, operands[0].dtype.itemsize].clipped(rows, cols, depth)


def choose_decoder(rows: int, cols: int, depth: int, *operands: Tensor) -> Tile:
    """The tile of `decoder_mse`; `depth` is all of K."""
    kind, gpu = product(operands[0].dtype), family()
    tile = DECODER_TILES.get((gpu if aligned(*operands) else "unaligned", kind), DECODER_SMALL[kind])
    return _filling(rows, tile, DECODER_SMALL[kind]).clipped(rows, cols, depth)


def choose_stack(rows: int, depth: int, x: Tensor) -> Tile:
    """The tile of `stack_score` and `stack_encode`; `depth` is the width of x."""
    kind = product(x.dtype)
    tile = STACK_TILES.get((family(), kind), STACK_SMALL[kind])
    return _filling(rows, tile, STACK_SMALL[kind]).clipped(rows, depth, depth)


def _filling(rows: int, tile: Tile, small: Tile) -> Tile:
    return small if rows < FILL * tile.rows and small.rows < tile.rows else tile


def output(like: Tensor, shape: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """`out`, or a fresh tensor of that shape: kernels write contiguous outputs."""
    if out is None:
        return like.new_empty(shape)
    assert out.shape == shape, f"out must be {list(shape)}; got {list(out.shape)}"
    assert out.is_contiguous(), f"out must be contiguous; got strides {out.stride()}"
    return out


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 accumulates in fp64, everything else in fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: fp32 follows torch.get_float32_matmul_precision(), other types have only one."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or interpreted():
        return "ieee"
    target = triton.runtime.driver.active.get_current_target()
    # Of AMD's chips only the MI300 family multiplies in tf32; Triton refuses it elsewhere.
    return "tf32" if target.backend == "cuda" or str(target.arch).startswith("gfx94") else "ieee"


def product(dtype: torch.dtype) -> str:
    """How tl.dot multiplies this type: half, tf32, ieee or double."""
    return "half" if dtype.itemsize == 2 else "double" if dtype == torch.float64 else dot_precision(dtype)


def why_not(tensor: Tensor) -> str | None:
    """None if kernels can be launched on this tensor, or what is missing and what to do about it."""
    if tensor.is_meta:
        return "a meta tensor holds no data"
    if interpreted():
        return None
    try:
        device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError as error:
        return f"Triton has no active driver ({error}); use a GPU, or set TRITON_INTERPRET=1 before Python starts"
    if tensor.device.type == device.type:
        return None
    return f"the active Triton driver runs on {device.type} tensors, this one is on {tensor.device}; move it there"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(kernel: Callable[..., Any], programs: int, tensor: Tensor, *args: Any, **meta: Any) -> None:
    """Run `programs` instances along grid axis 0 on the tensor's device; an empty grid is no launch."""
    if programs:
        with on_device(tensor):
            kernel[programs,](*args, **meta)  # type: ignore[index]
