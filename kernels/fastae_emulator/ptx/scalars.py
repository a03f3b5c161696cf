"""Scalar types of PTX in numpy: the bits in a register, the values computed with, and the way back (PTX ISA 5.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Scalar:
    """Scalar type: `raw` is the dtype of the bits, `decode` turns them into values, `encode` rounds values back.

    Packed types decode to [lanes, 2].
    """

    name: str
    bits: int
    raw: npt.DTypeLike
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]

    @property
    def is_float(self) -> bool:
        return "f" in self.name


def bf16_to_f32(bits: Array) -> Array:
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """Round to nearest even; every NaN becomes 0x7FFF (PTX ISA, cvt)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def f32_to_tf32(values: Array) -> Array:
    """Round to nearest with ties away from zero, `cvt.rna.tf32`: the low 13 bits are gone."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32)


def truncate_tf32(bits: Array) -> Array:
    """Drop the low 13 bits of a 32-bit register, which a tensor core ignores (PTX ISA, mma, .tf32)."""
    return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def flush(values: Array) -> Array:
    """Flush subnormals to a zero of their sign (`.ftz`)."""
    return values * (np.abs(values) >= np.finfo(np.float32).tiny)


def saturate(values: Array) -> Array:
    """Clamp to [+0, 1] (`.sat`); NaN becomes +0."""
    return np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))


def _same(values: Array) -> Array:
    return values


def _halves(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def _joined(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def _to_f16(values: Array) -> Array:
    return values.astype(np.float16)


def _from_f16(values: Array) -> Array:
    return values.astype(np.float32)


def _table() -> dict[str, Scalar]:
    plain = {
        "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
        "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
        "f32": np.float32, "f64": np.float64,
    }  # fmt: skip
    table = {name: Scalar(name, np.dtype(raw).itemsize * 8, np.dtype(raw), _same, _same) for name, raw in plain.items()}
    table["pred"] = Scalar("pred", 1, np.dtype(np.bool_), _same, _same)
    table["f16"] = Scalar("f16", 16, np.dtype(np.float16), _from_f16, _to_f16)
    table["bf16"] = Scalar("bf16", 16, np.dtype(np.uint16), bf16_to_f32, f32_to_bf16)
    table["f16x2"] = Scalar(
        "f16x2", 32, np.dtype(np.uint32),
        lambda b: _halves(b).view(np.float16).astype(np.float32), lambda v: _joined(v.astype(np.float16)),
    )  # fmt: skip
    table["bf16x2"] = Scalar(
        "bf16x2", 32, np.dtype(np.uint32), lambda b: bf16_to_f32(_halves(b)), lambda v: _joined(f32_to_bf16(v))
    )
    table["f32x2"] = Scalar(
        "f32x2", 64, np.dtype(np.uint64),
        lambda b: np.ascontiguousarray(b).view(np.float32).reshape(-1, 2),
        lambda v: np.ascontiguousarray(v, np.float32).view(np.uint64).reshape(-1),
    )  # fmt: skip
    return table


SCALARS = _table()
