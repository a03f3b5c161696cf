"""Reading MNIST IDX files, plain or gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastae.data.errors import unreadable

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def unzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            head = file.read(2)
            rest = file.read() if head == b"\0\0" else b""
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable(path, "a whole gzip file", error) from error
    if head != b"\0\0":
        raise ValueError(
            f"{path}: must hold an MNIST IDX file to be read through gzip; got other bytes: unzip it first"
        )
    return head + rest


def read_idx(path: Path, raw: bytes) -> NDArray[Any]:
    """IDX: two zero bytes, a type code, the number of dimensions, big-endian uint32 sizes, big-endian values."""
    start = 4 + 4 * raw[3] if len(raw) >= 4 else 4
    if len(raw) < start:
        raise ValueError(f"{path}: must have an IDX header of {start} bytes; got {len(raw)}")
    if raw[2] not in _IDX_TYPES:
        codes = ", ".join(f"0x{code:02X}" for code in _IDX_TYPES)
        raise ValueError(f"{path}: must have an IDX type code among {codes}; got 0x{raw[2]:02X}")
    dtype = np.dtype(_IDX_TYPES[raw[2]])
    shape = np.frombuffer(raw[4:start], ">u4").tolist()
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(f"{path}: must have {expected} bytes, as its IDX header says; got {len(raw)}")
    rows = shape if len(shape) < 3 else [shape[0], math.prod(shape[1:])]  # IDX allows 255 dimensions, NumPy 64
    return np.frombuffer(raw[start:], dtype).reshape(rows)
