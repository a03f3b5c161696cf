"""Arrays of any length through a model in bounded memory, and the checks of data on its way in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastae.nn.arguments import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rows = TypeVar("Rows", Tensor, "NDArray[Any]")

# Values in a chunk's widest layer: 64 MiB in fp32. Rows of 20,108 then come in chunks of 834; in chunks of 208, each of
# which reads all weights again, 500 rows took 1.1 times as long.
CHUNK_VALUES = 1 << 24
_BLOCK_VALUES = 1 << 22  # 32 MiB in float64: what one block of a memory map may cost, however wide its rows are


def check_rows(x: object, width: int, name: str) -> None:
    """x is a tensor or array [rows, width] of real floating-point numbers."""
    if not isinstance(x, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a numpy array or a torch.Tensor; got {type(x).__name__}")
    refuse_masked(x, name)
    if isinstance(x, Tensor) and x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense; got {str(x.layout)[6:]}, convert it: {_short(name)}.to_dense()")
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in FLOATS:
        got = str(x.dtype)[6:]
        raise TypeError(f"{name} must be float32, float64 or of half precision; got {got}: {_short(name)}.float()")
    floating = x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"
    if not floating:
        got = str(x.dtype).removeprefix("torch.")
        hint = "" if "complex" in got else f", convert it: {_short(name)}.astype('float32')"
        hint = hint.replace(".astype('float32')", ".float()") if isinstance(x, Tensor) else hint
        raise TypeError(f"{name} must be floating point; got {got}{hint}")
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must be [rows, {width}]; got {list(x.shape)}")


def refuse_masked(x: object, name: str) -> None:
    """TypeError for a masked array: its hidden values would be taken for numbers."""
    if isinstance(x, np.ma.MaskedArray):
        given = _short(name)
        raise TypeError(
            f"{name} must have no mask; got a masked array: fill it, {given}.filled(value), or leave rows out, "
            f"{given}.data[~{given}.mask.any(1)]"
        )


def _short(name: str) -> str:
    """The variable that an argument's description ends in: "x" of "fit: x"."""
    return name.rsplit(" ", 1)[-1]


def to_tensor(x: NDArray[Any] | Tensor, like: Tensor) -> Tensor:
    """x as a contiguous tensor of like's dtype on like's device; a copy, but for a tensor that is all that already."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):  # to inf, which the check of finite values reports with its place
            x = torch.from_numpy(
                np.array(x, dtype=np.float64 if like.dtype == torch.float64 else np.float32, order="C")
            )
    return x.to(device=like.device, dtype=like.dtype).contiguous()


def in_chunks(function: Callable[[Tensor], Tensor], x: Rows, width: int, widest: int, like: Tensor, name: str) -> Rows:
    """function(x), computed a chunk of rows at a time without gradients; an array is answered with an array.

    `width` is x's own; `widest`, that of the widest layer on the way, decides how many rows make a chunk.
    """
    step = max(1, CHUNK_VALUES // widest)
    if isinstance(x, Tensor):
        with torch.no_grad():
            # Tracing is for all numbers of rows at once, and chooses the memory itself.
            if torch.compiler.is_compiling() or x.dim() != 2 or len(x) <= step:
                return function(x)
            return _joined(function, x, step, lambda rows: rows)
    check_rows(x, width, name)
    with torch.no_grad():
        result = _joined(function, x, step, lambda rows: to_tensor(rows, like))
    result = result.cpu()
    return (result if result.dtype == torch.float64 else result.float()).numpy()


def _joined(function: Callable[[Tensor], Tensor], x: Any, step: int, prepare: Callable[[Any], Tensor]) -> Tensor:
    first = function(prepare(x[:step]))
    if len(x) <= step:
        return first
    out = first.new_empty(len(x), *first.shape[1:])
    out[:step] = first
    for start in range(step, len(x), step):
        out[start : start + step] = function(prepare(x[start : start + step]))
    return out


def check_all_finite(x: NDArray[Any] | Tensor, name: str) -> None:
    """ValueError with the counts and the first place if x [rows, features] holds NaN or inf."""
    if isinstance(x, Tensor):
        if all(bool(end.isfinite()) for end in torch.aminmax(x)):  # NaN is both; x.isfinite() would copy x
            return
        x = x.detach().double().cpu().numpy()
    check_finite(x, name)


def check_finite(array: NDArray[Any], name: str = "x", chunk_rows: int = 65536, largest: float = math.inf) -> None:
    """Raise ValueError if `array` [rows, features] holds NaN or inf, with their counts and the first one's place.

    Rows and columns in the message count from 0, as in `array[row, column]`. At most `chunk_rows` rows at a time are
    read, so a memory map of any length fits. Numbers above `largest` are refused too.
    """
    nan = inf = start = 0
    first = ""
    for block in row_blocks(array, chunk_rows):
        bad = ~np.isfinite(block)
        if largest < math.inf and not bad.any():
            _check_size(block, name, largest, start)
        if bad.any():
            block_nan = int(np.isnan(block).sum())
            nan, inf = nan + block_nan, inf + int(bad.sum()) - block_nan
            row, column = divmod(int(bad.argmax()), block.shape[1])
            first = first or f"row {start + row}, column {column} ({block[row, column]})"
        start += len(block)
    if first:
        counts = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "inf")) if count)
        raise ValueError(f"{name} must be finite; got {counts}, the first at {first}")


def _check_size(block: NDArray[Any], name: str, largest: float, start: int) -> None:
    """ValueError with the place of a number above `largest` in a block of rows that begins at row `start`."""
    if block.dtype.itemsize > 4 and max(-block.min(), block.max()) > largest:
        row, column = divmod(int(np.abs(block).argmax()), block.shape[1])
        raise ValueError(
            f"{name} must be numbers of at most {largest:.3g}, the largest of float32; got {block[row, column]:.6g} at "
            f"row {start + row}, column {column}"
        )


def row_blocks(array: NDArray[Any], chunk_rows: int) -> Iterator[NDArray[Any]]:
    """Yield `array` [rows, features] in blocks of at most `chunk_rows` rows, fewer when the rows are very wide."""
    if array.ndim != 2:
        raise ValueError(f"array must be [rows, features]; got shape {array.shape}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")
    step = max(1, min(chunk_rows, _BLOCK_VALUES // max(1, array.shape[1])))
    for start in range(0, len(array), step):
        yield np.asarray(array[start : start + step])
