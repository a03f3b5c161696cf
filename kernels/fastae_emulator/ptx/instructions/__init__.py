"""The instructions, by kind. Importing a module enters its forms into the table."""

from fastae_emulator.ptx.instructions import (
    arithmetic,
    atomics,
    bits,
    compare,
    control,
    convert,
    copies,
    mma,
    move,
    tcgen05,
    warp,
    wgmma,
)

__all__ = [
    "arithmetic",
    "atomics",
    "bits",
    "compare",
    "control",
    "convert",
    "copies",
    "mma",
    "move",
    "tcgen05",
    "warp",
    "wgmma",
]
