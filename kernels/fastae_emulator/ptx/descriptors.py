"""Matrix descriptors: the layout of an operand in shared memory, with 32, 64 or 128-byte swizzle.

PTX ISA 9.7.15.5.1 (wgmma), 9.7.16.4.1 (tcgen05). Memory is read in chunks of 16 bytes, the unit that a swizzle moves.
"""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.scalars import Array, bf16_to_f32, truncate_tf32

_WGMMA_SWIZZLE = {1: 128, 2: 64, 3: 32}  # bits 62-63
_TCGEN05_SWIZZLE = {2: 128, 4: 64, 6: 32}  # bits 61-63
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}


def elements(octets: Array, kind: str) -> Array:
    """Decode bytes [..., n] to the values a tensor core computes with, in binary64."""
    octets = np.ascontiguousarray(octets)
    if kind == "bf16":
        return bf16_to_f32(octets.view(np.uint16)).astype(np.float64)
    if kind == "tf32":
        return truncate_tf32(octets.view(np.uint32)).astype(np.float64)
    return octets.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind]).astype(np.float64)


def swizzle_of(descriptor: int, tcgen05: bool) -> int | None:
    """Bytes of a swizzled row; None for layouts that are not implemented."""
    if (descriptor >> 49) & 7:  # base offset
        return None
    return _TCGEN05_SWIZZLE.get(descriptor >> 61) if tcgen05 else _WGMMA_SWIZZLE.get(descriptor >> 62)


def chunk_addresses(descriptor: int, row_bytes: int, rows: int, depth: int, size: int, mn_major: bool) -> Array:
    """Addresses of the chunks of a [rows, depth] operand with elements of `size` bytes.

    K-major: [rows, chunks along depth]; MN-major: [chunks along rows, depth].
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    if mn_major:
        row = np.arange(0, rows, 16 // size)[:, None] * size
        k = np.arange(depth)
        address = start + (row // row_bytes) * leading + row % row_bytes + (k // 8) * stride + (k % 8) * row_bytes
    else:
        r = np.arange(rows)[:, None]
        address = start + (r // 8) * stride + (r % 8) * row_bytes + np.arange(0, depth * size, 16)
    result: Array = address ^ (((address >> 7) & (row_bytes // 16 - 1)) << 4)
    return result


def operand(chunks: Array, kind: str, rows: int, depth: int, mn_major: bool) -> Array:
    """Decode chunks in the order of `chunk_addresses`, [.., .., 16] bytes, to values [rows, depth]."""
    if not mn_major:
        return elements(chunks.reshape(rows, -1), kind)
    values = elements(chunks, kind)  # [chunks along rows, depth, elements of a chunk]
    return values.transpose(0, 2, 1).reshape(rows, depth)
