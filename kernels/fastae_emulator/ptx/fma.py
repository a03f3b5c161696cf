"""Fused multiply-add, rounded once. Emulated in binary64: S. Boldo, G. Melquiond, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008)."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.scalars import Array

_SPLIT = float(2**27 + 1)  # T. J. Dekker, Numerische Mathematik 18 (1971)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded, and the rounding error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a * b rounded, and the rounding error."""
    product = a * b
    scaled_a, scaled_b = a * _SPLIT, b * _SPLIT
    a_high, b_high = scaled_a - (scaled_a - a), scaled_b - (scaled_b - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def sum_to_odd(a: Array, b: Array) -> Array:
    """Add in binary64 and round to odd: a second rounding to fewer bits is then the only one that counts."""
    total, lost = two_sum(a, b)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = (lost != 0) & np.isfinite(total) & ((bits & 1) == 0)
    away = (lost > 0) == (total > 0)  # the exact sum lies beyond the rounded one
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    product = a.astype(np.float64) * b  # 24 + 24 bits: exact
    total = np.asarray(product + c)
    bits = total.view(np.int64)
    # Two roundings differ from one only if the first lands on a tie of the second, or where subnormals have fewer bits.
    doubtful = (bits & 0x1FFFFFFF) == 0x10000000
    doubtful |= (np.abs(total) < np.finfo(np.float32).tiny) & (total != 0)
    if doubtful.any():
        total = sum_to_odd(product, np.broadcast_to(c, product.shape).astype(np.float64))
    return total.astype(np.float32)


def fma_half(a: Array, b: Array, c: Array) -> Array:
    """Multiply and add operands of 16 bits, to a value in binary32 that rounds to 16 bits as the exact result does."""
    exact = sum_to_odd(*np.broadcast_arrays(a.astype(np.float64) * b, c.astype(np.float64)))
    nearest = exact.astype(np.float32)
    bits = nearest.view(np.int32)
    error = exact - nearest
    inexact = (error != 0) & np.isfinite(nearest) & ((bits & 1) == 0)
    return (
        np.where(inexact, bits + np.where((error > 0) == (nearest > 0), 1, -1), bits).astype(np.int32).view(np.float32)
    )


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = two_product(a, b)
    with_c, lost_c = two_sum(c, low)
    total, lost = two_sum(high, with_c)
    exact = total + sum_to_odd(lost_c, lost)
    # Outside the range where Dekker's splitting is exact, the result is rounded twice.
    return np.where(np.isfinite(exact) & ((np.abs(high) > 1e-290) | (high == 0)), exact, a * b + c)
