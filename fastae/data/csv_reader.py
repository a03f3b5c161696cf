"""Reading comma-separated numbers, with or without a header."""

from __future__ import annotations

import csv
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastae.data.errors import unreadable

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def read_csv(path: Path) -> NDArray[np.float32]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise unreadable(path, "UTF-8 text", error) from error
    line, first = next(_records(path, lines), (0, []))
    header = first if any(cell.strip() and _number(cell) is None for cell in first) else []
    data = lines[line:] if header else lines
    if not data or lines == [""]:
        raise ValueError(f"{path}: must have at least one row of numbers; got {'only a header' if header else 'none'}")
    try:
        values = np.loadtxt(data, np.float32, comments=None, delimiter=",", quotechar='"', ndmin=2)
    except ValueError:
        return _read_cells(path, lines, header)
    # loadtxt skips blank lines, and goes through float64, which is not exact for integers from 2**53 on.
    if values.shape != (len(data), len(first)) or (np.abs(values) >= 2.0**53).any():
        return _read_cells(path, lines, header)
    return values


def _records(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, cells)."""
    reader = csv.reader(lines, skipinitialspace=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: must be comma-separated; got {error} at row {reader.line_num}") from error


def _read_cells(path: Path, lines: list[str], header: list[str]) -> NDArray[np.float32]:
    """The slow, exact way, which names the cell at fault."""
    width = 0

    def cells() -> Iterator[float]:
        nonlocal width
        for index, (line, row) in enumerate(_records(path, lines)):
            if not any(cell.strip() for cell in row) and len(row) < 2:
                raise ValueError(f"{path}: must have blank lines only at its end; got one at row {line}")
            width = width or len(row)
            if len(row) != width:
                raise ValueError(
                    f"{path}: must have {width} cells in each row, as in the first; got {len(row)} at row {line}"
                )
            if index or not header:
                yield from (_cell(path, cell, line, column, header) for column, cell in enumerate(row, 1))

    return np.fromiter(cells(), np.float32).reshape(-1, width)


def _cell(path: Path, cell: str, line: int, column: int, header: list[str]) -> float:
    value, requirement = _number(cell), "hold only numbers"
    if value is not None:
        if abs(value) <= _FLOAT32_MAX or "inf" in cell.lower() or math.isnan(value):
            return value
        requirement = "hold numbers that fit float32"
    got = reprlib.repr(cell) if cell.strip() else "an empty cell"
    name = f" ({reprlib.repr(header[column - 1])})" if header else ""
    raise ValueError(f"{path}: must {requirement}; got {got} at row {line}, column {column}{name}")


def _number(cell: str) -> float | None:
    """The number in `cell`, or None. Integers that float64 cannot hold are rounded once, straight to float32."""
    cell = cell.strip()
    if not cell.isascii() or "_" in cell:  # Python reads both as numbers; no other reader of CSV does
        return None
    try:
        value = float(cell)
        if 2.0**53 <= abs(value) <= 2.0**64 and cell.lstrip("+-").isdigit():
            return float(np.asarray(int(cell)).astype(np.float32))
    except ValueError:
        return None
    return value
