"""Instructions by kind. Importing a module enters its forms into the table that `find` searches."""

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
from fastae_emulator.ptx.table import find

__all__ = [
    "arithmetic",
    "atomics",
    "bits",
    "compare",
    "control",
    "convert",
    "copies",
    "find",
    "mma",
    "move",
    "tcgen05",
    "warp",
    "wgmma",
]
