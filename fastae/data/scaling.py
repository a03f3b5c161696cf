"""Per-feature scaling that is fitted once and travels with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastae.data.arrays import refuse_masked, row_blocks
from fastae.nn.arguments import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("none", "unit", "standard")


@dataclass(frozen=True, eq=False)
class Scaler:
    """`(x - offset) / scale`, feature by feature.

    kind: "none" (offset 0, scale 1), "unit" (min 0, max 1) or "standard" (mean 0, population standard deviation 1).
    offset, scale: float32 [features]. A constant feature has scale 1. The offset is rounded to float32, so a float64
    feature whose spread is below 1e-7 of its size (a time stamp, say) comes out shifted: subtract its start before.
    """

    kind: str
    offset: NDArray[np.float32]
    scale: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        if self.offset.ndim != 1 or self.offset.shape != self.scale.shape:
            got = f"{self.offset.shape} and {self.scale.shape}"
            raise ValueError(f"Scaler: offset and scale must both be [features]; got shapes {got}")

    @classmethod
    def fit(cls, x: NDArray[Any], kind: str, chunk_rows: int = 65536) -> Scaler:
        """Measure `x` [rows, features] in one pass, in float64, at most `chunk_rows` rows at a time.

        Raises TypeError if `x` is not real numbers and ValueError if it is not [rows, features], has no row, or (kind
        "unit" and "standard") holds NaN, inf or a range beyond float32.
        """
        _check_kind(kind)
        _check_real(x, "x")
        if x.ndim != 2 or x.size == 0:
            raise ValueError(f"Scaler: x must be [rows, features] with at least one of each; got shape {x.shape}")
        if kind == "none":
            return cls(kind, np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32))
        with np.errstate(over="ignore", invalid="ignore"):
            measured = (_min_range if kind == "unit" else _mean_std)(x, chunk_rows)
            offset, scale = (value.astype(np.float32) for value in measured)
        bad = np.flatnonzero(~(np.isfinite(offset) & np.isfinite(scale)))
        if bad.size:
            raise ValueError(
                f"Scaler: x must be finite, with ranges that fit float32, to be scaled; column {bad[0]} is not"
            )
        return cls(kind, offset, np.where(scale == 0, np.float32(1), scale))

    def transform(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """`(x - offset) / scale` in float32, for `x` [..., features]. Kind "none" does not copy float32."""
        self._check_features(x, "x")
        if self.kind == "none":
            return np.asarray(x, dtype=np.float32)
        out = np.asarray(x) - self.offset
        out /= self.scale
        return out.astype(np.float32, copy=False)

    def inverse_transform(self, z: NDArray[Any]) -> NDArray[np.float32]:
        """`z * scale + offset` in float32, for `z` [..., features]. Kind "none" does not copy float32."""
        self._check_features(z, "z")
        if self.kind == "none":
            return np.asarray(z, dtype=np.float32)
        out = np.asarray(z) * self.scale
        out += self.offset
        return out.astype(np.float32, copy=False)

    def _check_features(self, x: NDArray[Any], name: str) -> None:
        _check_real(x, name)
        if x.ndim == 0 or x.shape[-1] != len(self.offset):
            raise ValueError(
                f"Scaler: {name} must be [..., {len(self.offset)}], as the scaler was fitted; got shape {x.shape}"
            )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"Scaler: kind must be one of {', '.join(KINDS)}; got {kind!r}{nearest(str(kind), KINDS)}")


def _check_real(x: Any, name: str) -> None:
    if not isinstance(x, np.ndarray):
        make = f"{name}.numpy(force=True)" if hasattr(x, "numpy") and hasattr(x, "layout") else f"np.asarray({name})"
        raise TypeError(f"Scaler: {name} must be a numpy array; got {type(x).__name__}: {make} makes one")
    refuse_masked(x, f"Scaler: {name}")
    if x.dtype.kind not in "fiub":
        raise TypeError(f"Scaler: {name} must hold booleans, integers or floats; got {x.dtype}")


def _min_range(x: NDArray[Any], chunk_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    low, high = np.full(x.shape[1], np.inf), np.full(x.shape[1], -np.inf)
    for block in row_blocks(x, chunk_rows):
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    return low, high - low


def _mean_std(x: NDArray[Any], chunk_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Chan, Golub and LeVeque (1983), on values shifted by the first row so that constants come out exact."""
    shift = np.asarray(x[0], dtype=np.float64)
    mean, squares, count = np.zeros_like(shift), np.zeros_like(shift), 0
    for block in row_blocks(x, chunk_rows):
        values = block - shift
        block_mean = values.mean(0)
        delta, total = block_mean - mean, count + len(block)
        squares += np.square(values - block_mean).sum(0) + delta**2 * (count * len(block) / total)
        mean += delta * (len(block) / total)
        count = total
    return shift + mean, np.sqrt(squares / count)
