"""Atomic writing: a file or folder is put in place only when complete, so that a failure leaves the older one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".npy", ".csv")


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write every file in full, then put them in place in turn: a full disk or a kill while writing changes nothing."""
    with ExitStack() as stack:
        parts = {path: stack.enter_context(_part(path)) for path in map(_followed, files)}
        for part, data in zip(parts.values(), files.values(), strict=True):
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A file to write to, put in place of `path` at the end, unless the block raised."""
    path = _followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _part(path) as part:
        yield part
        part.replace(path)


@contextmanager
def new_folder(path: Path, replace: bool, last: str) -> Iterator[Path]:
    """A folder to fill, which becomes `path` as a whole at the end, unless the block raised.

    Where there is a folder `path` by then, its files are replaced one by one, `last` as the last, while no other
    process does the same; or, if it holds something and `replace` is false, what was made stays under another name,
    which the FileExistsError tells.
    """
    path = _followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _hidden(path / path.name if path.is_dir() else path)  # a volume's parent may not be writable
    part.mkdir()
    try:
        yield part
        try:
            part.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            _move_files(part, path, replace, last)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move_files(part: Path, path: Path, replace: bool, last: str) -> None:
    with _locked(path):
        if not replace and any(not file.name.startswith(".") for file in path.iterdir()):
            kept = next(p for n in count(1) if not (p := part.with_name(f"{path.name}-{n}")).exists())
            part.rename(kept)
            raise FileExistsError(f"{path} was made by another process meanwhile; the result is in {kept}")
        for file in sorted(part.iterdir(), key=lambda file: file.name == last):
            file.replace(path / file.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While it lasts, no other process is in this block for the same folder (where the system has such locks)."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_writable(path: Path, force: bool, option: str = "--out") -> None:
    """Before the work starts: a ValueError if the file exists (without force) or its folder cannot be written."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file; {path} is a folder")
    if path.exists() and not force:
        raise ValueError(f"{option}: {path} exists; add --force to overwrite it")
    _check_parent(path, option)


def check_new_folder(path: Path, force: bool, option: str = "--out", but: Collection[str] = ()) -> None:
    """The same of a folder: a ValueError if it holds something (without force), other than files of the names `but`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} must be a folder; {path} is a file")
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    if not force and any(name not in but and not name.startswith(".") for name in names):
        raise ValueError(f"{option}: {path} exists; choose another folder, or add --force to replace the files in it")
    _check_parent(path / path.name if path.is_dir() else path, option)


def _check_parent(path: Path, option: str) -> None:
    try:
        _followed(path).parent.mkdir(parents=True, exist_ok=True)
        with _part(_followed(path)):
            pass
    except OSError as error:
        raise ValueError(f"{option} must be where files can be written; got {path} ({error.strerror})") from None


def write_rows(path: Path, blocks: Iterable[NDArray[Any]], rows: int) -> None:
    """Write blocks of rows to the .npy or .csv file `path`, `rows` in all; a failure leaves an older file as it was."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out must end in {' or '.join(SUFFIXES)}; got {str(path)!r}")
    path = _followed(path)
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
    part = _hidden(path)
    try:
        part.touch()
        yield part
    finally:
        part.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    """A name beside `path` that no other process or thread takes."""
    return path.with_name(f".{os.getpid()}.{threading.get_ident():x}.part.{path.name}")  # the suffix stays


def _followed(path: Path) -> Path:
    """What a symbolic link stands for: it stays one."""
    return Path(os.path.realpath(path))
