"""Arithmetic: addition to fused multiply-add, minimum and maximum, and approximate functions, which are exact here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastae_emulator.ptx.decoder import Decoder, Read, Write
from fastae_emulator.ptx.errors import UndefinedError
from fastae_emulator.ptx.fma import fma_f32, fma_f64, fma_half
from fastae_emulator.ptx.scalars import SCALARS, Array, flush, saturate
from fastae_emulator.ptx.state import State
from fastae_emulator.ptx.table import Step, implements

INTEGERS = "u16|u32|u64|s16|s32|s64"
HALVES = "f16|bf16|f16x2|bf16x2"

Function = Callable[..., Array]


def elementwise(reads: list[Read], write: Write, function: Function, ftz: str = "") -> Step:
    """Step that applies a function to the operands; with `ftz` subnormal operands and results are zeros."""
    if ftz:
        return lambda state: write(state, flush(function(*[flush(read(state)) for read in reads])))
    if len(reads) == 1:
        (only,) = reads
        return lambda state: write(state, function(only(state)))
    if len(reads) == 2:
        left, right = reads
        return lambda state: write(state, function(left(state), right(state)))
    return lambda state: write(state, function(*[read(state) for read in reads]))


def simple(d: Decoder, kind: str, function: Function, ftz: str = "") -> Step:
    """Step with all operands and the result of one type."""
    reads = [d.read(i, kind) for i in range(1, len(d.operands))]
    return elementwise(reads, d.write(0, kind), function, ftz)


_BINARY: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@implements("add sub", INTEGERS)
def add_integers(d: Decoder) -> Step:
    return simple(d, d.slots[0], _BINARY[d.opcode])


@implements("add sub mul", "rn? ftz? sat? f32", "rn? f64", f"rn? {HALVES}", "rn? f32x2")
def add(d: Decoder) -> Step:
    function, kind = _BINARY[d.opcode], d.slots[-1]
    if "sat" in d.slots:
        return simple(d, kind, lambda a, b: saturate(function(a, b)), "ftz" if "ftz" in d.slots else "")
    return simple(d, kind, function, "ftz" if "ftz" in d.slots else "")


@implements("add sub", "rn? f32 f16|bf16")
def add_mixed(d: Decoder) -> Step:
    """Add with f32 result and last operand, narrow first operand (PTX ISA 9.7.5.1)."""
    reads = [d.read(1, d.slots[-1]), d.read(2, "f32")]
    return elementwise(reads, d.write(0, "f32"), _BINARY[d.opcode])


@implements("fma", "rn f32 f16|bf16")
def fma_mixed(d: Decoder) -> Step:
    reads = [d.read(1, d.slots[-1]), d.read(2, d.slots[-1]), d.read(3, "f32")]
    return elementwise(reads, d.write(0, "f32"), fma_f32)


@implements("mul", f"lo {INTEGERS}")
def mul_low(d: Decoder) -> Step:
    return simple(d, d.slots[1], np.multiply)


def _high(kind: str) -> Function:
    scalar = SCALARS[kind]
    if scalar.bits < 64:
        wide = np.int64 if kind[0] == "s" else np.uint64
        shift = wide(scalar.bits)
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> shift).astype(scalar.raw)
    dtype = np.dtype(scalar.raw)
    return lambda a, b: np.array(
        [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)], dtype=dtype
    )


@implements("mul", f"hi {INTEGERS}")
def mul_high(d: Decoder) -> Step:
    return simple(d, d.slots[1], _high(d.slots[1]))


def _widened(kind: str) -> tuple[str, type[np.generic]]:
    wide = kind[0] + str(2 * SCALARS[kind].bits)
    return wide, np.dtype(SCALARS[wide].raw).type


@implements("mul", "wide u16|u32|s16|s32")
def mul_wide(d: Decoder) -> Step:
    kind = d.slots[1]
    wide, dtype = _widened(kind)
    return elementwise(
        [d.read(1, kind), d.read(2, kind)], d.write(0, wide), lambda a, b: a.astype(dtype) * b.astype(dtype)
    )


@implements("mad", f"lo {INTEGERS}")
def mad_low(d: Decoder) -> Step:
    return simple(d, d.slots[1], lambda a, b, c: a * b + c)


@implements("mad", "hi u32|s32|u64|s64")
def mad_high(d: Decoder) -> Step:
    high = _high(d.slots[1])
    return simple(d, d.slots[1], lambda a, b, c: high(a, b) + c)


@implements("mad", "wide u16|u32|s16|s32")
def mad_wide(d: Decoder) -> Step:
    kind = d.slots[1]
    wide, dtype = _widened(kind)
    reads = [d.read(1, kind), d.read(2, kind), d.read(3, wide)]
    return elementwise(reads, d.write(0, wide), lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c)


@implements("mad", "lo cc u32|s32")
@implements("madc", "hi|lo cc? u32|s32")
@implements("add", "cc u32|s32")
@implements("addc", "cc? u32|s32")
def with_carry(d: Decoder) -> Step:
    """Add and write (`.cc`) or read (`madc`, `addc`) the carry of the thread (PTX ISA 9.7.2)."""
    opcode, kind = d.opcode, d.slots[-1]
    signed = np.int64 if kind == "s32" else np.uint64
    reads, write = [d.read(i, kind) for i in range(1, len(d.operands))], d.write(0, "u32")
    carry_out, carry_in = "cc" in d.slots, opcode in ("madc", "addc")

    def step(state: State) -> None:
        values = [read(state) for read in reads]
        if len(values) == 3:
            product = values[0].astype(signed) * values[1].astype(signed)
            part = (product >> signed(32)) if d.slots[0] == "hi" else product
            values = [part.astype(np.uint32), values[2]]
        total = sum((v.astype(np.uint32).astype(np.uint64) for v in values), start=np.zeros(1, np.uint64))
        if carry_in:
            total = total + state.carry
        total = state.spread(total)
        if carry_out:
            state.carry = np.where(state.active, total >> np.uint64(32), state.carry)
        write(state, total.astype(np.uint32))

    return step


_FMA: dict[str, Function] = {"f32": fma_f32, "f32x2": fma_f32, "f64": fma_f64}


@implements("fma", "rn ftz? sat? f32", "rn f64", f"rn relu? {HALVES}", "rn f32x2")
@implements("mad", "rn ftz? f32", "rn f64")
def fma(d: Decoder) -> Step:
    kind = d.slots[-1]
    function, ftz = _FMA.get(kind, fma_half), "ftz" if "ftz" in d.slots else ""
    if "sat" in d.slots:
        return simple(d, kind, lambda a, b, c: saturate(function(a, b, c)), ftz)
    if "relu" in d.slots:  # NaN becomes canonical, as decoding makes it
        return simple(d, kind, lambda a, b, c: np.maximum(function(a, b, c), np.float32(0)))
    return simple(d, kind, function, ftz)


@implements("neg abs", "s16|s32|s64", "ftz? f32", "f64", HALVES)
def negate(d: Decoder) -> Step:
    """Negate, or drop the sign; NaN keeps its other bits."""
    kind, function = d.slots[-1], np.negative if d.opcode == "neg" else np.abs
    return simple(d, kind, function, "ftz" if "ftz" in d.slots else "")


def _extreme(opcode: str, nan: str) -> Function:
    """Minimum or maximum: `.NaN` propagates NaN, without it the number wins; -0 is below +0 (PTX ISA, min)."""
    pick = {("min", ""): np.fmin, ("min", "NaN"): np.minimum, ("max", ""): np.fmax, ("max", "NaN"): np.maximum}
    function = pick[opcode, nan]

    def two(a: Array, b: Array) -> Array:
        zeros = (a == 0) & (b == 0)
        result = function(a, b)
        if zeros.any():
            signs = np.signbit(a) | np.signbit(b) if opcode == "min" else np.signbit(a) & np.signbit(b)
            result = np.where(zeros, np.where(signs, -a.dtype.type(0.0), a.dtype.type(0)), result)
        return result

    return lambda a, b, *more: two(two(a, b), *more) if more else two(a, b)


@implements("min max", "ftz? NaN? f32", "f64", f"NaN? {HALVES}")
def extreme(d: Decoder) -> Step:
    nan = "NaN" if "NaN" in d.slots else ""
    return simple(d, d.slots[-1], _extreme(d.opcode, nan), "ftz" if "ftz" in d.slots else "")


@implements("min max", INTEGERS)
def extreme_integers(d: Decoder) -> Step:
    return simple(d, d.slots[0], np.minimum if d.opcode == "min" else np.maximum)


@implements("div rem", INTEGERS)
def divide_integers(d: Decoder) -> Step:
    """Divide with truncation towards zero."""
    opcode, kind = d.opcode, d.slots[0]
    left, right, write = d.read(1, kind), d.read(2, kind), d.write(0, kind)

    def step(state: State) -> None:
        a, b = np.broadcast_arrays(left(state), right(state))
        zero = (b == 0) & state.active
        if zero.any():
            state.fail(UndefinedError, "divides an integer by zero", int(np.argmax(zero)))
        b = np.where(b == 0, b.dtype.type(1), b)
        remainder = np.fmod(a, b)
        write(state, remainder if opcode == "rem" else (a - remainder) // b)

    return step


def _divide_f32(a: Array, b: Array) -> Array:
    return a / b


@implements("div", "rn ftz? f32", "rn f64", "full ftz? f32", "approx ftz? f32")
def divide(d: Decoder) -> Step:
    """Divide; `.full` and `.approx` are off by two units at most on a GPU, and exact here."""
    return simple(d, d.slots[-1], _divide_f32, "ftz" if "ftz" in d.slots else "")


def in_double(function: Callable[[Array], Array]) -> Function:
    """Compute in binary64 and round once."""
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


_UNARY: dict[str, Function] = {
    "ex2": in_double(np.exp2),
    "lg2": in_double(np.log2),
    "rcp": in_double(lambda a: 1 / a),
    "sqrt": in_double(np.sqrt),
    "rsqrt": in_double(lambda a: 1 / np.sqrt(a)),
    "tanh": in_double(np.tanh),
    "sin": in_double(np.sin),
    "cos": in_double(np.cos),
}


@implements("ex2 lg2 sin cos", "approx ftz? f32")
@implements("ex2", "approx f16|f16x2", "approx ftz bf16|bf16x2")
@implements("rcp sqrt", "approx|rn ftz? f32", "rn f64")
@implements("rsqrt", "approx ftz? f32", "approx f64")
@implements("tanh", "approx f32", f"approx {HALVES}")
def function(d: Decoder) -> Step:
    return simple(d, d.slots[-1], _UNARY[d.opcode], "ftz" if "ftz" in d.slots else "")


def _reciprocal_seed(a: Array) -> Array:
    """Upper 32 bits of 1 / a, the rest zero (PTX ISA, rcp.approx.ftz.f64)."""
    seed = (1 / np.where(np.abs(a) < np.finfo(np.float64).tiny, np.copysign(0.0, a), a)).view(np.uint64)
    return (seed & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


@implements("rcp", "approx ftz f64")
def reciprocal_seed(d: Decoder) -> Step:
    return simple(d, "f64", _reciprocal_seed)
