"""Limits on a compiled kernel's use of a GPU, and the exceptions: data, with the reason in words."""

from __future__ import annotations

from dataclasses import dataclass

WARPS = 8  # resident on an SM, at least
WIDTH = 16  # bytes that a thread moves at once, where rows are multiples of them
SECTOR_USE = 0.9  # share of the bytes of the sectors touched that somebody asked for
SHARE_OF_EAGER = 0.55  # distinct bytes of a training step, against eager PyTorch's: 784-256-128, batch 8192, bf16
OPTIMIZER_LAUNCHES = 2


@dataclass(frozen=True)
class Device:
    """One SM, or one CU of AMD's: CUDA C++ programming guide, table of compute capabilities; CDNA3 ISA, section 2."""

    registers: int  # of 32 bits; for AMD those of a lane in one SIMD
    granule: int  # in which registers are given: to a warp, or to a lane
    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int  # the most that one block can have
    reserved_bytes: int = 0  # of shared memory, for each block
    tensor_columns: int = 0


DEVICES = {
    "sm_80": Device(65536, 256, 64, 32, 164 << 10, 163 << 10, 1 << 10),
    "sm_90": Device(65536, 256, 64, 32, 228 << 10, 227 << 10, 1 << 10),
    "sm_100": Device(65536, 256, 64, 32, 228 << 10, 227 << 10, 1 << 10, 512),
    "gfx942": Device(512, 8, 32, 32, 64 << 10, 64 << 10),
}


def resident_warps(target: str, registers: int, shared_bytes: int, warps: int, tensor_columns: int = 0) -> int:
    """Warps of one kernel that an SM can hold at once."""
    device = DEVICES[target]
    given = -(-max(registers, 1) * (32 if target.startswith("sm_") else 1) // device.granule) * device.granule
    # Each of the four parts of an SM has a quarter of the registers and runs whole warps.
    part = device.registers // 4 // given if target.startswith("sm_") else device.registers // given
    blocks = min(device.blocks, 4 * min(part, device.warps // 4) // warps)
    if shared_bytes:
        blocks = min(blocks, device.shared_bytes // (shared_bytes + device.reserved_bytes))
    if tensor_columns:
        blocks = min(blocks, device.tensor_columns // tensor_columns)
    return blocks * warps


# Stores of one number per row, column or block: they have no rows to be wide along.
VECTORS = frozenset({"db_ptr", "dparameter_ptr", "kl_ptr", "loss_ptr", "score_ptr", "partial_ptr", "ptr"})


@dataclass(frozen=True)
class Exempt:
    """A budget that a kernel is not held to, and why. Empty tuples mean all."""

    budget: str
    kernel: str
    reason: str
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    models: tuple[str, ...] = ()

    def covers(self, budget: str, kernel: str, target: str, precision: str, model: str) -> bool:
        return (
            (self.budget, self.kernel) == (budget, kernel)
            and target in (self.targets or (target,))
            and precision in (self.precisions or (precision,))
            and model in (self.models or (model,))
        )


_HALF = ("bfloat16", "float16")
_NVIDIA = ("sm_80", "sm_90", "sm_100")
_MFMA_STORES = (
    "Triton stores from the layout of MFMA's results, four values of a row to a lane: 8 bytes in 16 bits, which "
    "together fill whole lines"
)
_STACK_ROWS = (
    "64 KiB of weights are one block to a CU: four wavefronts, one on each SIMD; eight have half the registers and "
    "spill"
)
_MFMA_ROWS = "tiles of 16 columns: two to four values of a row to a lane in the layout of MFMA's results"

EXEMPT: tuple[Exempt, ...] = (
    *(
        Exempt("wide stores", f"_{kernel}_kernel", _MFMA_STORES, ("gfx942",), _HALF)
        for kernel in (
            "linear_act_fwd", "linear_dgrad_act", "linear_wgrad", "linear_act_loss", "decoder_loss", "stack_encode",
        )
    ),
    *(
        Exempt("resident warps", f"_{kernel}_kernel", _STACK_ROWS, ("gfx942",), precisions)
        for kernel, precisions in (("stack_score", (*_HALF, "tf32")), ("stack_encode", ("tf32",)))
    ),
    Exempt(
        "sectors", "_sum_partials_kernel",
        "weights and gradients of such widths begin their rows anywhere, and a thread reads one value at a time of the "
        "16 that it stores; what a request leaves of a sector the next one asks for",
        _NVIDIA, models=("tabular", "odd"),
    ),
    Exempt(
        "wide stores", "_decoder_loss_kernel",
        "32 x 16 values are 8 bytes a thread for eight warps; four warps, or more values, spilled up to 280 registers",
        ("sm_90",), ("float32",),
    ),
    Exempt("wide stores", "_decoder_loss_kernel", _MFMA_ROWS, ("gfx942",), ("tf32", "float32")),
    Exempt(
        "wide loads", "_decoder_loss_kernel", "a tile of 16 x 64 values is 8 bytes a lane for 512 lanes",
        ("gfx942",), ("tf32", "float32"), ("tabular",),
    ),
    *(
        Exempt(
            "wide loads", f"_{kernel}_kernel", "a tile of 32 x 32 values is 8 bytes a lane for 256 lanes",
            ("gfx942",), _HALF, ("tabular", "genes", "odd", "counts"),
        )
        for kernel in ("linear_act_fwd", "linear_dgrad_act", "linear_wgrad")
    ),
    *(
        Exempt(
            "wide loads", f"_{kernel}_kernel",
            "16 rows carried are 4 or 8 bytes a thread and step; 32 rows, or deeper steps, spilled 2 to 20 registers",
            ("sm_90", "sm_100"), ("float32",),
        )
        for kernel in ("stack_score", "stack_encode")
    ),
    Exempt(
        "wide stores", "_decoder_loss_kernel",
        "the terms of a loss with a parameter: with more than two or four values a thread they spilled",
        _NVIDIA, models=("counts",),
    ),
    Exempt(
        "resident warps", "_decoder_loss_kernel",
        "the terms of a loss with a parameter: four wavefronts; eight have half the registers and spilled 270",
        ("gfx942",), _HALF, ("counts",),
    ),
    Exempt(
        "asynchronous copies", "_decoder_loss_kernel",
        "each tile of w feeds two products, of which tf32 needs one transposed: it goes through registers",
        _NVIDIA, ("tf32",),
    ),
    Exempt(
        "asynchronous copies", "_decoder_loss_kernel",
        "one stage: with two, Triton 3.7.1 leaves out the fence between the copies and tcgen05.mma",
        ("sm_100",), _HALF,
    ),
)  # fmt: skip


def exempt(budget: str, kernel: str, target: str, precision: str, model: str) -> Exempt | None:
    """The exception that covers this, if there is one."""
    return next((e for e in EXEMPT if e.covers(budget, kernel, target, precision, model)), None)
