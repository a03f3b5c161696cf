"""Conversions: cvt and cvta (PTX ISA 9.7.9.21)."""

from __future__ import annotations

import numpy as np

from fastae_emulator.ptx.decoder import Decoder
from fastae_emulator.ptx.scalars import SCALARS, Array, f32_to_tf32, flush, saturate
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

_INTEGERS = "u8|u16|u32|u64|s8|s16|s32|s64"
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@implements("cvt", f"sat? {_INTEGERS} {_INTEGERS}")
def integer_to_integer(d: Decoder) -> Step:
    sat, to, source = d.slots
    read, write, target = d.read(1, source), d.write(0, to), np.dtype(SCALARS[to].raw)
    if not sat:
        return lambda state: write(state, read(state).astype(target))
    limits = np.iinfo(target)

    def step(state: State) -> None:
        value = read(state)
        low, high = max(limits.min, np.iinfo(value.dtype).min), min(limits.max, np.iinfo(value.dtype).max)
        write(state, np.clip(value, value.dtype.type(low), value.dtype.type(high)).astype(target))

    return step


@implements("cvt", f"rni|rzi|rmi|rpi ftz? sat? {_INTEGERS} f32|f64|f16|bf16")
def float_to_integer(d: Decoder) -> Step:
    """Convert, clamped to the result's range; NaN becomes 0, or 1 << 63 for 64 bits from f32 and f64 (PTX ISA, cvt)."""
    mode, ftz, _, to, source = d.slots
    if ftz and source != "f32":
        raise d.refuse(".ftz is of f32")
    read, write = d.read(1, source), d.write(0, to)
    target, limits = np.dtype(SCALARS[to].raw), np.iinfo(SCALARS[to].raw)
    nan = 0x8000000000000000 if SCALARS[to].bits == 64 and source in ("f32", "f64") else 0
    nan = nan - (1 << 64) if nan and to == "s64" else nan

    def step(state: State) -> None:
        value = flush(read(state)) if ftz else read(state)
        rounded = _ROUND[mode](value.astype(np.float64))
        inside = (rounded >= float(limits.min)) & (rounded < float(limits.max) + 1)
        result = np.where(inside, rounded, 0).astype(target)
        result = np.where(rounded < float(limits.min), target.type(limits.min), result)
        result = np.where(rounded >= float(limits.max) + 1, target.type(limits.max), result)
        write(state, np.where(np.isnan(rounded), target.type(nan), result))

    return step


@implements("cvt", f"rn f32|f64|f16|bf16 {_INTEGERS}")
def integer_to_float(d: Decoder) -> Step:
    _, to, source = d.slots
    if to in ("f16", "bf16") and source not in ("u8", "s8", "u16", "s16", "u32", "s32"):
        raise d.refuse("64-bit integers to 16-bit floats are rounded twice here")
    read, write = d.read(1, source), d.write(0, to)
    if to == "bf16":
        return lambda state: write(state, _to_odd_f32(read(state).astype(np.float64)))
    wide = np.float32 if to == "f32" else np.float64
    return lambda state: write(state, read(state).astype(wide))


def _to_odd_f32(exact: Array) -> Array:
    """Round to odd in binary32, so that rounding on to 16 bits is the only rounding that counts."""
    nearest = exact.astype(np.float32)
    error = exact - nearest
    bits = nearest.view(np.int32)
    adjust = (error != 0) & np.isfinite(nearest) & ((bits & 1) == 0)
    odd = np.where(adjust, bits + np.where((error > 0) == (nearest > 0), 1, -1), bits)
    return odd.astype(np.int32).view(np.float32)


@implements("cvt", "ftz? f32 f16|bf16", "ftz? f64 f32", "f16 f16", "rn bf16 bf16")
@implements("cvt", "ftz? sat? f32 f32", "sat? f64 f64")
def exact(d: Decoder) -> Step:
    """Widen, or copy."""
    to, source = d.slots[-2:]
    read, write = d.read(1, source), d.write(0, to)
    wide = np.dtype(np.float64 if to == "f64" else np.float32)
    ftz, sat = "ftz" in d.slots, "sat" in d.slots

    def step(state: State) -> None:
        value = flush(read(state)) if ftz else read(state)
        if sat:
            value = saturate(value)
        write(state, value.astype(wide))

    return step


@implements("cvt", "rni|rzi|rmi|rpi ftz? sat? f32 f32", "rni|rzi|rmi|rpi f64 f64", "rni|rzi|rmi|rpi f16 f16")
def to_whole(d: Decoder) -> Step:
    """Round to a whole number of the same type."""
    mode, kind = d.slots[0], d.slots[-1]
    read, write = d.read(1, kind), d.write(0, kind)
    ftz, sat = "ftz" in d.slots, "sat" in d.slots

    def step(state: State) -> None:
        value = flush(read(state)) if ftz else read(state)
        value = _ROUND[mode](value)
        if sat:
            value = saturate(value)
        write(state, value)

    return step


def _f64_to_f32_toward_zero(value: Array) -> Array:
    nearest = value.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(value)
    return np.where(over, np.nextafter(nearest, np.float32(0)), nearest)


@implements("cvt", "rn|rz ftz? sat? f32 f64")
def narrow_double(d: Decoder) -> Step:
    mode, ftz, sat, _, _ = d.slots
    read, write = d.read(1, "f64"), d.write(0, "f32")

    def step(state: State) -> None:
        value = read(state)
        result = value.astype(np.float32) if mode == "rn" else _f64_to_f32_toward_zero(value)
        if sat:
            result = saturate(result)
        write(state, flush(result) if ftz else result)

    return step


def _half_toward_zero(value: Array, kind: str) -> Array:
    """Round towards zero to f16 or bf16, kept in f32."""
    if kind == "bf16":
        return (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    half = value.astype(np.float16)
    over = np.abs(half.astype(np.float32)) > np.abs(value)
    return np.where(over & np.isfinite(value), np.nextafter(half, np.float16(0)), half).astype(np.float32)


@implements("cvt", "rn|rz relu? f16|bf16 f32", "rn f16|bf16 f64", "rn f16 bf16", "rn bf16 f16")
@implements("cvt", "rn|rz relu? f16x2|bf16x2 f32")
def narrow_to_half(d: Decoder) -> Step:
    """Narrow; packed forms put their first operand into the upper half (PTX ISA, cvt)."""
    mode, (to, source), relu = d.slots[0], d.slots[-2:], "relu" in d.slots
    reads, write = [d.read(i, source) for i in range(1, len(d.operands))], d.write(0, to)
    kind = to.removesuffix("x2")
    if len(reads) != 1 + to.endswith("x2"):
        raise d.refuse("as many operands as results")

    def prepared(value: Array) -> Array:
        if value.dtype == np.float64:
            value = _to_odd_f32(value)
        if mode == "rz":
            nan = np.isnan(value)
            value = np.where(nan, value, _half_toward_zero(np.ascontiguousarray(value), kind))
        return np.maximum(value, np.float32(0)) if relu else value

    if len(reads) == 1:
        (only,) = reads
        return lambda state: write(state, prepared(only(state)))
    high, low = reads
    return lambda state: write(state, np.stack(np.broadcast_arrays(prepared(low(state)), prepared(high(state))), 1))


@implements("cvt", "rna|rn tf32 f32")
def to_tf32(d: Decoder) -> Step:
    mode = d.slots[0]
    read, write = d.read(1, "f32"), d.write(0, "b32")

    def nearest_even(value: Array) -> Array:
        bits = np.ascontiguousarray(value).view(np.uint32)
        rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        return np.where(np.isfinite(value), rounded & np.uint32(0xFFFFE000), bits).astype(np.uint32)

    return lambda state: write(state, (f32_to_tf32 if mode == "rna" else nearest_even)(read(state)))


@implements("cvta", "to? global|shared|local u32|u64")
def address(d: Decoder) -> Step:
    """Copy the address: every space has its own here, and generic ones are not used."""
    read, write = d.read(1, d.slots[-1]), d.write(0, d.slots[-1])
    return lambda state: write(state, read(state))
