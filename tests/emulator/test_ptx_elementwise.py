# ruff: noqa: E501 - lines of PTX are kept whole
"""Instructions that compute thread by thread, each against numpy, on random numbers and on awkward ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from fastae_emulator.ptx.scalars import bf16_to_f32, f32_to_bf16
from fastae_emulator.ptx.table import TABLE
from ptx_programs import run

THREADS = 256
WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}
PREFIX = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}
NUMPY = {
    **{f"{k}{b}": np.dtype(f"{'i' if k == 's' else 'u'}{b // 8}") for k in "usb" for b in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "bf16": np.dtype("u2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"),
    "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "f32x2": np.dtype("u8"), "tf32": np.dtype("u4"),
}  # fmt: skip
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -2.5,
    math.inf,
    -math.inf,
    math.nan,
    3e38,
    -3e38,
    65504,
    1e-40,
    -1e-40,
    6e-8,
)


def numbers(kind: str, seed: int) -> np.ndarray:
    """Bits of one operand for every thread."""
    rng = np.random.default_rng(seed)
    if kind in ("f16x2", "bf16x2"):
        low, high = numbers(kind[:-2], seed), numbers(kind[:-2], seed + 100)
        return np.stack([low, high], 1).view(np.uint32)[:, 0]
    if kind == "f32x2":
        return np.stack([numbers("f32", seed), numbers("f32", seed + 100)], 1).view(np.uint64)[:, 0]
    if kind[0] in "usb" and kind != "bf16":
        dtype = NUMPY[kind]
        values = rng.integers(0, 256, (THREADS, dtype.itemsize), dtype=np.uint8).view(dtype)[:, 0]
        info = np.iinfo(dtype)
        corner = np.array([0, 1, info.max, info.min, 7], dtype)
        return np.where(rng.random(THREADS) < 0.2, rng.choice(corner, THREADS), values)
    values = rng.standard_normal(THREADS) * 10.0 ** rng.integers(-3, 4, THREADS)
    values = np.where(rng.random(THREADS) < 0.3, rng.choice(SPECIAL, THREADS), values)
    with np.errstate(all="ignore"):
        return f32_to_bf16(values.astype(np.float32)) if kind == "bf16" else values.astype(NUMPY[kind])


def decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind in ("f16x2", "bf16x2"):
        return decoded(bits.view(np.uint16).reshape(-1, 2).view(NUMPY[kind[:-2]]), kind[:-2])
    if kind == "f32x2":
        return bits.view(np.float32).reshape(-1, 2)
    return bits


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """Round as numpy does; bf16 through the nearest even of 65536 candidates would be slow, so by integer arithmetic."""
    if kind == "bf16":
        exact = np.asarray(values, np.float64)
        nearest = exact.astype(np.float32)
        down = (nearest.view(np.uint32) >> 16).astype(np.int64)
        candidates = np.stack([np.clip(down + step, 0, 0xFFFF) for step in (-1, 0, 1)]).astype(np.uint16)
        distance = np.abs(bf16_to_f32(candidates).astype(np.float64) - exact)
        distance = np.where(np.isnan(distance), np.inf, distance)
        rank = np.where(distance == distance.min(0), candidates & 1, 2)  # of two that are equally near, the even one
        best = np.take_along_axis(candidates, np.argmin(rank, 0)[None], 0)[0]
        best = np.where(np.isfinite(exact), best, nearest.view(np.uint32) >> 16).astype(np.uint16)
        over = np.abs(exact) >= (2 - 2.0**-8) * 2.0**127  # half a unit beyond the largest: infinity
        return np.where(over, np.where(exact < 0, 0xFF80, 0x7F80), best).astype(np.uint16)
    if kind in ("f16x2", "bf16x2"):
        return np.ascontiguousarray(encoded(values, kind[:-2])).view(np.uint32)[:, 0]
    if kind == "f32x2":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint64)[:, 0]
    return np.asarray(values).astype(NUMPY[kind])


@dataclass
class Case:
    """Instruction and its expected result: `function` maps decoded operands of `kinds` to values of kind `result`."""

    name: str
    kinds: tuple[str, ...]
    function: Callable[..., Any]
    result: str
    constants: tuple[str, ...] = ()
    inputs: Callable[..., Any] | None = None

    def execute(self) -> tuple[np.ndarray, np.ndarray]:
        operands = [numbers(kind, seed) for seed, kind in enumerate(self.kinds)]
        if self.inputs:
            operands = [np.asarray(a).astype(o.dtype) for a, o in zip(self.inputs(*operands), operands, strict=True)]
        out = np.zeros(THREADS, NUMPY[self.result])
        lines, names = [], []
        for i, (bits, kind) in enumerate(zip(operands, self.kinds, strict=True)):
            name = f"{PREFIX[bits.itemsize]}{20 + i}"
            names.append(name)
            lines += [f"mad.wide.u32 %d{i}, %r70, {bits.itemsize}, %d{30 + i};"]
            lines += [f"ld.global.b{bits.itemsize * 8} {name}, [%d{i}];"]
            assert kind
        target = f"{PREFIX[out.itemsize]}1"
        lines += [f"{self.name} {', '.join([target, *names, *self.constants])};"]
        lines += [f"mad.wide.u32 %d10, %r70, {out.itemsize}, %d33;", f"st.global.b{out.itemsize * 8} [%d10], {target};"]
        spare = [np.zeros(1, np.uint8)] * (3 - len(operands))
        run("\n".join(lines), *operands, *spare, out, threads=THREADS)
        with np.errstate(all="ignore"):
            expected = encoded(
                self.function(*[decoded(o, k) for o, k in zip(operands, self.kinds, strict=True)]), self.result
            )
        return out, np.ascontiguousarray(np.broadcast_to(expected, out.shape))


def same(name: str, kind: str, arity: int, function: Callable[..., Any], **more: Any) -> Case:
    return Case(f"{name}.{kind}", (kind,) * arity, function, kind, **more)


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def with_ftz(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: ftz(function(*[ftz(a) for a in args]))


def sat(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x) | (x <= 0), 0, np.minimum(x, 1))


def exact_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, digits: int = 0) -> np.ndarray:
    """Compute with fractions and round once, with no floating-point trick in common with the machine."""
    digits = digits or {"f4": 24, "f8": 53, "f2": 11}[a.dtype.str[1:]]
    lowest = {24: -149, 53: -1074, 11: -24, 8: -133}[digits]

    def one(x: float, y: float, z: float) -> float:
        if not all(map(math.isfinite, (x, y, z))):
            return float(np.float64(x) * np.float64(y) + np.float64(z))
        total = Fraction(x) * Fraction(y) + Fraction(z)
        if total == 0:
            return float(np.float64(x) * np.float64(y) + np.float64(z))
        exponent = max(math.frexp(float(total))[1] - digits, lowest) if abs(total) < 10**300 else 900
        unit = Fraction(2) ** exponent
        return float(round(total / unit) * unit)  # round() of a Fraction is to nearest even

    flat = [one(float(x), float(y), float(z)) for x, y, z in zip(a.ravel(), b.ravel(), c.ravel(), strict=True)]
    return np.array(flat).reshape(a.shape)


def extreme(pick: Callable[..., Any], nan: bool) -> Callable[..., Any]:
    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        flat = [
            (x if y != y else y) if (x != x or y != y) and not nan else
            math.nan if x != x or y != y else
            pick((x, y), key=lambda v: (v, math.copysign(1, v)))
            for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
        ]  # fmt: skip
        return np.array(flat).reshape(a.shape).astype(a.dtype)

    return function


INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def big(kind: str, function: Callable[..., int]) -> Callable[..., Any]:
    """Compute in Python's own integers, wrapped at the end."""
    bits = int(kind[1:])

    def wrapped(*args: np.ndarray) -> np.ndarray:
        values = [function(*map(int, row)) & ((1 << bits) - 1) for row in zip(*args, strict=True)]
        return np.array(values, dtype=f"u{bits // 8}").view(NUMPY[kind])

    return wrapped


def nonzero(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace divisors 0 and -1: INT_MIN / -1 overflows in C too."""
    return a, np.where((b == 0) | (b.astype(np.float64) == -1), 3, b)


CASES: list[Case] = []
for kind in INTEGERS:
    bits = int(kind[1:])
    CASES += [same(name, kind, 2, BINARY[name]) for name in ("add", "sub")]
    CASES += [same("mul.lo", kind, 2, big(kind, lambda a, b: a * b))]
    CASES += [same("mul.hi", kind, 2, big(kind, lambda a, b, n=bits: (a * b) >> n))]
    CASES += [same("mad.lo", kind, 3, big(kind, lambda a, b, c: a * b + c))]
    CASES += [same("min", kind, 2, np.minimum), same("max", kind, 2, np.maximum)]
    CASES += [
        same(
            "div",
            kind,
            2,
            big(kind, lambda a, b: int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))),
            inputs=nonzero,
        )
    ]
    CASES += [
        same("rem", kind, 2, big(kind, lambda a, b: int(math.copysign(1, a)) * (abs(a) % abs(b))), inputs=nonzero)
    ]
    if bits < 64:
        CASES += [Case(f"mul.wide.{kind}", (kind, kind), big(wide(kind), lambda a, b: a * b), wide(kind))]
        CASES += [
            Case(f"mad.wide.{kind}", (kind, kind, wide(kind)), big(wide(kind), lambda a, b, c: a * b + c), wide(kind))
        ]
    if bits > 16:
        CASES += [same("mad.hi", kind, 3, big(kind, lambda a, b, c, n=bits: ((a * b) >> n) + c))]
for kind in ("s16", "s32", "s64"):
    CASES += [same("neg", kind, 1, lambda a: -a), same("abs", kind, 1, np.abs)]
for name, function in BINARY.items():
    CASES += [same(name, "f32", 2, function), same(f"{name}.rn", "f32", 2, function), same(name, "f64", 2, function)]
    CASES += [same(f"{name}.rn", "f64", 2, function), same(f"{name}.ftz", "f32", 2, with_ftz(function))]
    CASES += [same(f"{name}.rn.ftz", "f32", 2, with_ftz(function)), same(f"{name}.rn", "f32x2", 2, function)]
    CASES += [same(f"{name}.sat", "f32", 2, lambda a, b, f=function: sat(f(a, b))), same(name, "f32x2", 2, function)]
    CASES += [same(name, kind, 2, lambda a, b, f=function: f(a.astype(np.float64), b)) for kind in HALVES]
    CASES += [same(f"{name}.rn", kind, 2, lambda a, b, f=function: f(a.astype(np.float64), b)) for kind in HALVES]
    if name != "mul":
        for kind in ("f16", "bf16"):
            CASES += [Case(f"{name}.{rn}f32.{kind}", (kind, "f32"), function, "f32") for rn in ("rn.", "")]
for name in ("fma", "mad"):
    CASES += [same(f"{name}.rn", "f32", 3, exact_fma), same(f"{name}.rn", "f64", 3, exact_fma)]
    CASES += [same(f"{name}.rn.ftz", "f32", 3, with_ftz(lambda *x: exact_fma(*[v.astype(np.float32) for v in x])))]
CASES += [same("fma.rn.sat", "f32", 3, lambda *x: sat(exact_fma(*x)))]
CASES += [same("fma.rn", "f16", 3, lambda *x: exact_fma(*[v.astype(np.float16) for v in x]))]
CASES += [same("fma.rn.relu", "f16", 3, lambda *x: np.maximum(exact_fma(*[v.astype(np.float16) for v in x]), 0))]
for kind in ("bf16", "bf16x2"):
    CASES += [same("fma.rn", kind, 3, lambda *x: exact_fma(*x, digits=8))]
    CASES += [same("fma.rn.relu", kind, 3, lambda *x: np.maximum(exact_fma(*x, digits=8), 0))]
CASES += [same("fma.rn", "f16x2", 3, lambda *x: exact_fma(*x, digits=11))]
CASES += [Case(f"fma.rn.f32.{kind}", (kind, kind, "f32"), lambda a, b, c: exact_fma(*[v.astype(np.float32) for v in (a, b, c)]), "f32")
          for kind in ("f16", "bf16")]  # fmt: skip
CASES += [same("fma.rn", "f32x2", 3, exact_fma)]
for kind in ("f32", "f64", *HALVES):
    CASES += [same("neg", kind, 1, lambda a: -a), same("abs", kind, 1, np.abs)]
    CASES += [same("min", kind, 2, extreme(min, False)), same("max", kind, 2, extreme(max, False))]
    if kind != "f64":
        CASES += [same("min.NaN", kind, 2, extreme(min, True)), same("max.NaN", kind, 2, extreme(max, True))]
CASES += [same(f"{n}.ftz", "f32", 1, with_ftz(f)) for n, f in (("neg", np.negative), ("abs", np.abs))]
CASES += [same(f"{n}.ftz", "f32", 2, with_ftz(extreme(f, False))) for n, f in (("min", min), ("max", max))]
CASES += [same("max", "f32", 3, lambda a, b, c: extreme(max, False)(extreme(max, False)(a, b), c))]
for mode in ("rn", "full", "approx"):
    CASES += [same(f"div.{mode}", "f32", 2, np.divide), same(f"div.{mode}.ftz", "f32", 2, with_ftz(np.divide))]
CASES += [same("div.rn", "f64", 2, np.divide)]
UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
for name, function in UNARY.items():
    exact = lambda a, f=function: f(a.astype(np.float64))  # noqa: E731
    CASES += [same(f"{name}.approx", "f32", 1, exact)]
    if name != "tanh":
        CASES += [same(f"{name}.approx.ftz", "f32", 1, with_ftz(lambda a, f=exact: f(a).astype(np.float32)))]
    if name in ("rcp", "sqrt"):
        CASES += [same(f"{name}.rn", "f32", 1, exact), same(f"{name}.rn", "f64", 1, exact)]
        CASES += [same(f"{name}.rn.ftz", "f32", 1, with_ftz(lambda a, f=exact: f(a).astype(np.float32)))]
CASES += [same("tanh.approx", kind, 1, lambda a: np.tanh(a).astype(np.float32)) for kind in HALVES]
CASES += [same("rsqrt.approx", "f64", 1, UNARY["rsqrt"])]
CASES += [
    same("ex2.approx", kind, 1, lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)) for kind in ("f16", "f16x2")
]
CASES += [same("ex2.approx.ftz", kind, 1, with_ftz(lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)))
          for kind in ("bf16", "bf16x2")]  # fmt: skip
CASES += [same("rcp.approx.ftz", "f64", 1, lambda a: ((1 / a).view(np.uint64) >> 32 << 32).view(np.float64))]
for kind in ("b16", "b32", "b64"):
    bits = int(kind[1:])
    CASES += [same(n, kind, 2, f) for n, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))]
    CASES += [same("not", kind, 1, np.invert)]
for kind in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"):
    by = lambda a, s: [a, s % 80]  # noqa: E731
    if kind[0] == "b":
        CASES += [Case(f"shl.{kind}", (kind, "u32"), big(kind, lambda a, s: a << s), kind, inputs=by)]
    CASES += [Case(f"shr.{kind}", (kind, "u32"), big(kind, lambda a, s: a >> s), kind, inputs=by)]
for direction in "lr":
    for mode in ("wrap", "clamp"):

        def shifted(a: int, b: int, s: int, d: str = direction, m: str = mode) -> int:
            s = s % 32 if m == "wrap" else min(s, 32)
            return ((b << 32 | a) >> s) if d == "r" else ((b << 32 | a) << s) >> 32

        CASES += [same(f"shf.{direction}.{mode}", "b32", 3, big("b32", shifted), inputs=lambda a, b, s: [a, b, s % 40])]


def field(kind: str) -> Callable[[int, int, int], int]:
    """Pseudocode of the PTX ISA for bfe, bit by bit."""
    top = int(kind[1:]) - 1

    def extract(a: int, position: int, length: int) -> int:
        unsigned = a & ((1 << (top + 1)) - 1)
        bit = lambda i: unsigned >> i & 1  # noqa: E731
        sign = 0 if kind[0] == "u" or length == 0 else bit(min(position + length - 1, top))
        return sum((bit(position + i) if i < length and position + i <= top else sign) << i for i in range(top + 1))

    return extract


def inserted(a: int, b: int, position: int, length: int, bits: int) -> int:
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
    return b


for kind in ("u32", "u64", "s32", "s64"):
    CASES += [
        Case(
            f"bfe.{kind}",
            (kind, "u32", "u32"),
            big(kind, field(kind)),
            kind,
            inputs=lambda a, p, n: [a, p % 70, n % 70],
        )
    ]
for kind in ("b32", "b64"):
    CASES += [Case(f"bfi.{kind}", (kind, kind, "u32"), big(kind, lambda a, b, p, n=int(kind[1:]): inserted(a, b, p, 5, n)), kind, ("5",),
                   inputs=lambda a, b, p: [a, b, p % 70])]  # fmt: skip
    CASES += [Case(f"popc.{kind}", (kind,), big("b32", lambda a: a.bit_count()), "b32")]
    CASES += [Case(f"clz.{kind}", (kind,), big("b32", lambda a, n=int(kind[1:]): n - a.bit_length()), "b32")]
    CASES += [same("brev", kind, 1, big(kind, lambda a, n=int(kind[1:]): int(f"{a:0{n}b}"[::-1], 2)))]


def permuted(a: int, b: int, s: int) -> int:
    octets = list((b << 32 | a).to_bytes(8, "little"))
    chosen = [octets[s >> 4 * i & 7] if not s >> 4 * i & 8 else 255 * (octets[s >> 4 * i & 7] >> 7) for i in range(4)]
    return int.from_bytes(bytes(chosen), "little")


CASES += [same("prmt", "b32", 3, big("b32", permuted))]
CASES += [same("lop3", "b32", 3, big("b32", lambda a, b, c: (a & b) ^ c), constants=("0x6A",))]

INTS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
for to in INTS:
    info = np.iinfo(NUMPY[to])
    for source in INTS:
        CASES += [Case(f"cvt.{to}.{source}", (source,), big(to, lambda a: a), to)]
        CASES += [
            Case(
                f"cvt.sat.{to}.{source}", (source,), big(to, lambda a, i=info: min(max(a, int(i.min)), int(i.max))), to
            )
        ]
ROUND: dict[str, Callable[[float], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def to_int(mode: str, to: str, source: str) -> Callable[..., Any]:
    info = np.iinfo(NUMPY[to])

    def one(x: float) -> int:
        if math.isnan(x):
            return -(1 << 63) if to[1:] == "64" and source in ("f32", "f64") else 0
        if math.isinf(x):
            return int(info.max) if x > 0 else int(info.min)
        return min(max(ROUND[mode](x), int(info.min)), int(info.max))

    return lambda a: big(to, lambda i: i)(np.array([one(x) for x in a.astype(np.float64).tolist()], object))


for mode in ROUND:
    CASES += [Case(f"cvt.{mode}.{to}.{source}", (source,), to_int(mode, to, source), to)
              for to in ("u16", "u32", "u64", "s16", "s32", "s64") for source in ("f32", "f64", "f16", "bf16")]  # fmt: skip
    CASES += [Case(f"cvt.{mode}.ftz.s32.f32", ("f32",), lambda a, m=mode: to_int(m, "s32", "f32")(ftz(a)), "s32")]
    CASES += [Case(f"cvt.{mode}.sat.s32.f32", ("f32",), to_int(mode, "s32", "f32"), "s32")]
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode]
    CASES += [Case(f"cvt.{mode}.{k}.{k}", (k,), whole, k) for k in ("f32", "f64", "f16")]
    CASES += [Case(f"cvt.{mode}.ftz.f32.f32", ("f32",), lambda a, f=whole: f(ftz(a)), "f32")]
    CASES += [Case(f"cvt.{mode}.sat.f32.f32", ("f32",), lambda a, f=whole: sat(f(a)), "f32")]
for source in ("u16", "u32", "u64", "s16", "s32", "s64"):
    CASES += [Case(f"cvt.rn.{to}.{source}", (source,), lambda a: a, to) for to in ("f32", "f64")]
    if source[1:] != "64":
        CASES += [
            Case(f"cvt.rn.{to}.{source}", (source,), lambda a: a.astype(np.float64), to) for to in ("f16", "bf16")
        ]
CASES += [
    Case(f"cvt.{to}.{source}", (source,), lambda a: a, to)
    for to, source in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f16", "f16"), ("f32", "f32"), ("f64", "f64"))
]
CASES += [Case("cvt.ftz.f64.f32", ("f32",), ftz, "f64"), Case("cvt.ftz.f32.f32", ("f32",), ftz, "f32")]
CASES += [Case("cvt.ftz.f32.bf16", ("bf16",), ftz, "f32"), Case("cvt.sat.f32.f32", ("f32",), sat, "f32")]
CASES += [Case("cvt.rn.bf16.bf16", ("bf16",), lambda a: a, "bf16"), Case("cvt.sat.f64.f64", ("f64",), sat, "f64")]
CASES += [Case("cvt.ftz.f32.f16", ("f16",), lambda a: a, "f32")]  # no half is subnormal in single


def toward_zero(to: str) -> Callable[..., Any]:
    def function(a: np.ndarray) -> np.ndarray:
        near = decoded(encoded(a, to), to).astype(np.float64)
        over = np.isfinite(a) & (np.abs(near) > np.abs(a.astype(np.float64)))
        bits = encoded(a, to).view(f"u{NUMPY[to].itemsize}")
        return decoded(np.where(over, bits - 1, bits).astype(bits.dtype).view(NUMPY[to]), to)

    return function


for to in ("f16", "bf16"):
    CASES += [Case(f"cvt.rn.{to}.f32", ("f32",), lambda a: a, to), Case(f"cvt.rn.{to}.f64", ("f64",), lambda a: a, to)]
    CASES += [Case(f"cvt.rn.relu.{to}.f32", ("f32",), lambda a: np.maximum(a, 0), to)]
    CASES += [Case(f"cvt.rz.{to}.f32", ("f32",), toward_zero(to), to)]
    CASES += [Case(f"cvt.rn.{to}x2.f32", ("f32", "f32"), lambda a, b: np.stack([b, a], 1), f"{to}x2")]
    CASES += [
        Case(
            f"cvt.rz.{to}x2.f32",
            ("f32", "f32"),
            lambda a, b, t=to: np.stack([toward_zero(t)(b), toward_zero(t)(a)], 1),
            f"{to}x2",
        )
    ]
    CASES += [
        Case(f"cvt.rn.relu.{to}x2.f32", ("f32", "f32"), lambda a, b: np.maximum(np.stack([b, a], 1), 0), f"{to}x2")
    ]
CASES += [
    Case("cvt.rn.f16.bf16", ("bf16",), lambda a: a, "f16"),
    Case("cvt.rn.bf16.f16", ("f16",), lambda a: a, "bf16"),
]
CASES += [
    Case("cvt.rn.f32.f64", ("f64",), lambda a: a, "f32"),
    Case("cvt.rz.f32.f64", ("f64",), toward_zero("f32"), "f32"),
]
CASES += [
    Case("cvt.rn.ftz.f32.f64", ("f64",), lambda a: ftz(a.astype(np.float32)), "f32"),
    Case("cvt.rn.sat.f32.f64", ("f64",), sat, "f32"),
]


def to_tf32(away: bool) -> Callable[..., Any]:
    def one(x: float) -> float:
        if not math.isfinite(x) or x == 0:
            return x
        unit = 2.0 ** max(math.frexp(x)[1] - 11, -136)
        scaled = abs(x) / unit
        whole = math.floor(scaled + 0.5) if away else round(scaled)
        return math.copysign(whole * unit, x)

    return lambda a: np.array([one(x) for x in a.tolist()]).astype(np.float32).view(np.uint32)


CASES += [Case(f"cvt.{mode}.tf32.f32", ("f32",), to_tf32(mode == "rna"), "tf32") for mode in ("rna", "rn")]
CASES += [Case(f"cvta.{to}{space}.{kind}", (kind,), lambda a: a, kind) for to in ("", "to.")
          for space, kind in (("global", "u64"), ("shared", "u32"), ("local", "u64"))]  # fmt: skip
CASES += [Case(f"mov.{kind}", (kind,), lambda a: a, kind) for kind in ("b16", "b32", "b64", *INTEGERS, "f32", "f64")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name + f"/{len(case.kinds)}")
def test_against_numpy(case: Case) -> None:
    got, expected = case.execute()
    values, wanted = decoded(got, case.result), decoded(expected, case.result)
    if values.dtype.kind == "f":
        assert np.array_equal(np.isnan(values), np.isnan(wanted))
        keep = ~np.isnan(wanted)
        assert np.array_equal(values[keep], wanted[keep])
        assert np.array_equal(np.signbit(values[keep]), np.signbit(wanted[keep]))
    elif case.result == "tf32":
        nan = np.isnan(wanted.view(np.float32))
        assert np.array_equal(values[~nan], wanted[~nan])
    else:
        assert np.array_equal(values, wanted)


def test_the_numbers_are_awkward_enough() -> None:
    for kind in ("f32", "f16", "bf16"):
        values = decoded(numbers(kind, 0), kind)
        assert np.isnan(values).any()
        assert np.isinf(values).any()
        assert (values == 0).any()
        assert ((np.abs(values) < 2.0**-14) & (values != 0)).any()


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ALIAS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def compared(name: str, a: float, b: float) -> bool:
    nan = a != a or b != b
    if name in ("num", "nan"):
        return nan == (name == "nan")
    sign = ALIAS.get(name) or ORDERED[name[:2]]
    if nan:
        return name.endswith("u") and name not in ALIAS
    return bool(eval(f"a {sign} b", {"a": a, "b": b}))


COMPARISONS = [f"{name}.{kind}" for kind in ("s16", "s32", "s64") for name in ORDERED]
COMPARISONS += [f"{name}.{kind}" for kind in ("u16", "u32", "u64") for name in (*ORDERED, *ALIAS)]
COMPARISONS += [f"{name}.{kind}" for kind in ("b16", "b32", "b64") for name in ("eq", "ne")]
COMPARISONS += [f"{name}{u}.{kind}" for kind in ("f32", "f64", "f16", "bf16") for name in ORDERED for u in ("", "u")]
COMPARISONS += [f"{name}.{kind}" for kind in ("f32", "f64", "f16", "bf16") for name in ("num", "nan")]
COMPARISONS += [f"lt.{merge}.f32" for merge in ("and", "or", "xor")] + [
    "eq.ftz.f32",
    *(f"eq.{merge}.{kind}" for merge in ("and", "or", "xor") for kind in ("b32", "s16", "u64", "f64")),
]


@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name: str) -> None:
    """Compare, with the opposite, and combined with a third predicate that is true in odd threads."""
    compare, *merge, kind = name.split(".")
    a, b = numbers(kind, 1), numbers(kind, 2)
    b[::3] = a[::3]
    out = np.zeros(THREADS, np.uint32)
    size, letter = a.itemsize, PREFIX[a.itemsize]
    third = ", %p3" if merge and merge[0] != "ftz" else ""
    run(
        f"""and.b32 %r1, %r70, 1; setp.ne.s32 %p3, %r1, 0;
        mad.wide.u32 %d0, %r70, {size}, %d30; ld.global.b{size * 8} {letter}20, [%d0];
        mad.wide.u32 %d1, %r70, {size}, %d31; ld.global.b{size * 8} {letter}21, [%d1];
        setp.{name} %p1|%p2, {letter}20, {letter}21{third};
        selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2; or.b32 %r2, %r2, %r3;
        mad.wide.u32 %d2, %r70, 4, %d33; st.global.b32 [%d2], %r2;""",
        a, b, np.zeros(1, np.uint8), out, threads=THREADS,
    )  # fmt: skip
    left, right = decoded(a, kind).tolist(), decoded(b, kind).tolist()
    if merge == ["ftz"]:
        left, right = ftz(a).tolist(), ftz(b).tolist()
    combine = {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}
    for thread in range(THREADS):
        yes = compared(compare, left[thread], right[thread])
        no = not yes
        if third:
            yes, no = (combine[merge[0]](x, thread % 2 == 1) for x in (yes, no))
        assert out[thread] == yes + 2 * no


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_setp_of_a_pair(kind: str) -> None:
    a, b, out = numbers(kind, 1), numbers(kind, 2), np.zeros(THREADS, np.uint32)
    run(
        f"""mad.wide.u32 %d0, %r70, 4, %d30; ld.global.b32 %r20, [%d0];
        mad.wide.u32 %d1, %r70, 4, %d31; ld.global.b32 %r21, [%d1];
        setp.le.{kind} %p1|%p2, %r20, %r21;
        selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2; or.b32 %r2, %r2, %r3;
        mad.wide.u32 %d2, %r70, 4, %d33; st.global.b32 [%d2], %r2;""",
        a, b, np.zeros(1, np.uint8), out, threads=THREADS,
    )  # fmt: skip
    low, high = (decoded(a, kind) <= decoded(b, kind)).T
    assert np.array_equal(out, low + 2 * high)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"])
def test_selp(kind: str) -> None:
    a, b = numbers(kind, 1), numbers(kind, 2)
    out, size, letter = np.zeros_like(a), a.itemsize, PREFIX[a.itemsize]
    run(
        f"""setp.lt.u32 %p1, %r70, 100; not.pred %p2, %p1; mov.pred %p3, %p2;
        mad.wide.u32 %d0, %r70, {size}, %d30; ld.global.b{size * 8} {letter}20, [%d0];
        mad.wide.u32 %d1, %r70, {size}, %d31; ld.global.b{size * 8} {letter}21, [%d1];
        selp.{kind} {letter}1, {letter}20, {letter}21, %p3;
        mad.wide.u32 %d2, %r70, {size}, %d33; st.global.b{size * 8} [%d2], {letter}1;""",
        a, b, np.zeros(1, np.uint8), out, threads=THREADS,
    )  # fmt: skip
    assert out.tobytes() == np.where(np.arange(THREADS) >= 100, a, b).tobytes()


def test_predicate_logic() -> None:
    out = np.zeros(THREADS, np.uint32)
    run(
        """and.b32 %r1, %r70, 1; setp.ne.s32 %p1, %r1, 0; and.b32 %r1, %r70, 2; setp.ne.s32 %p2, %r1, 0;
        and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; xor.pred %p5, %p1, %p2;
        selp.b32 %r2, 1, 0, %p3; selp.b32 %r3, 2, 0, %p4; selp.b32 %r4, 4, 0, %p5;
        or.b32 %r2, %r2, %r3; or.b32 %r2, %r2, %r4;
        mad.wide.u32 %d2, %r70, 4, %d30; st.global.b32 [%d2], %r2;""",
        out, threads=THREADS,
    )  # fmt: skip
    a, b = np.arange(THREADS) & 1, np.arange(THREADS) >> 1 & 1
    assert np.array_equal(out, (a & b) + 2 * (a | b) + 4 * (a ^ b))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_carries(kind: str) -> None:
    """Carry through a product of 64 bits from halves, as in Triton's random numbers, and through a sum of 64 bits."""
    a, b, out = numbers("u32", 1), numbers("u32", 2), np.zeros((THREADS, 4), np.uint32)
    last = np.zeros(THREADS, np.uint32)
    run(
        f"""mad.wide.u32 %d0, %r70, 4, %d30; ld.global.b32 %r1, [%d0];
        mad.wide.u32 %d1, %r70, 4, %d31; ld.global.b32 %r2, [%d1];
        mad.lo.cc.{kind} %r3, %r1, %r2, %r1; madc.hi.{kind} %r4, %r1, %r2, 0;
        add.cc.{kind} %r5, %r1, %r2; addc.cc.{kind} %r6, %r1, %r2; madc.lo.cc.{kind} %r7, %r1, 0, 0;
        mad.wide.u32 %d2, %r70, 16, %d33; st.global.v4.b32 [%d2], {{%r3, %r4, %r5, %r6}};
        mad.wide.u32 %d2, %r70, 4, %d32; st.global.b32 [%d2], %r7;""",
        a, b, last, out, threads=THREADS,
    )  # fmt: skip
    x, y = (v.astype(object) for v in (a, b))
    full = np.array([int(p) * int(q) for p, q in zip(a.view(NUMPY[kind]), b.view(NUMPY[kind]), strict=True)], object)
    low = (full & 0xFFFFFFFF) + x
    high = (full >> 32) + (low >> 32)
    total = (x + (x << 32)) + (y + (y << 32))
    expected = [low & 0xFFFFFFFF, high & 0xFFFFFFFF, total & 0xFFFFFFFF, total >> 32 & 0xFFFFFFFF]
    assert np.array_equal(out, np.stack(expected, 1).astype(np.uint32))
    assert np.array_equal(last, (total >> 64).astype(np.uint32))


def test_every_case_is_in_the_table() -> None:
    for case in CASES:
        opcode, *qualifiers = case.name.split(".")
        assert any(form.match(tuple(qualifiers)) is not None for form in TABLE[opcode]), case.name
