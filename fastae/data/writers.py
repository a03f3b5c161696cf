"""Atomic file writing: a file is put in place only when complete, so that a failure leaves the older file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".npy", ".csv")


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write every file in full, then put them in place in turn: a full disk or a kill while writing changes nothing."""
    with ExitStack() as stack:
        parts = {path: stack.enter_context(_part(path)) for path in files}
        for path, data in files.items():
            with parts[path].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A file to write to, put in place of `path` at the end, unless the block raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _part(path) as part:
        yield part
        part.replace(path)


def check_writable(path: Path, force: bool) -> None:
    """Before the work starts: an error if `path` exists (without force) or its folder cannot be written."""
    if path.exists() and not force:
        raise ValueError(f"{path} exists; add --force to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _part(path):
        pass


def write_rows(path: Path, blocks: Iterable[NDArray[Any]], rows: int) -> None:
    """Write blocks of rows to the .npy or .csv file `path`, `rows` in all; a failure leaves an older file as it was."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {' or '.join(SUFFIXES)}; got {str(path)!r}")
    with _part(path) as part:
        if path.suffix == ".npy":
            _write_npy(part, blocks, rows)
        else:
            with part.open("w") as file:
                for block in blocks:
                    np.savetxt(file, block, fmt="%.9g", delimiter=",")  # 9 digits give every float32 back
        part.replace(path)


def _write_npy(part: Path, blocks: Iterable[NDArray[Any]], rows: int) -> None:
    with part.open("wb") as file:
        for i, block in enumerate(blocks):
            if i == 0:
                header = {"descr": block.dtype.str, "fortran_order": False, "shape": (rows, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(block).data)


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, gone afterwards unless it was moved."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        yield part
    finally:
        part.unlink(missing_ok=True)
