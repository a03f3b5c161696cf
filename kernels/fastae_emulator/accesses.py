"""Accesses to global memory in a compiled kernel, each with its source line."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"^([$.\w]+):")
_BRANCH = re.compile(r"\b(?:bra(?:\.uni)?|s_c?branch\w*)\s+([$.\w]+)")
_PTX = re.compile(r"\b(ld|st)\.global((?:\.\w+(?:::\w+)*)*)\.[bfsu](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\b.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.tensor\b.*\bglobal\b")
_GCN = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(?:\w*?)(byte|short|dword)(?:x(\d))?\b")
_POINTER = re.compile(r"tl\.(?:load|store)\(\s*(\w+)")


@dataclass(frozen=True)
class Access:
    kind: str  # load, copy (asynchronous, into shared memory) or store
    width: int  # bytes that a thread moves at once; 0 for a tensor copy, where no thread does
    looped: bool
    pointer: str  # the source's name of what is loaded or stored; "" where the line does not say
    operand: bool  # of tl.dot
    where: str  # "tile_ops.py:70"


def accesses(assembly: str, roots: Sequence[Path] = ()) -> list[Access]:
    """List the accesses of PTX or amdgcn text with line numbers. A dot's operand is a load inside `operand(...)`.

    roots: folders with the source of kernels that were compiled in another checkout, by file name.
    """
    files = {number: f"{first}/{second}" if second else first for number, first, second in _FILE.findall(assembly)}
    lines = assembly.splitlines()
    loops = list(_loops(lines))
    found, path, line = [], "", 0
    for number, text in enumerate(lines):
        loc = _LOC.search(text)
        if loc:
            path, line = files.get(loc[1], ""), int(loc[2])
            continue
        moved = _moved(text)
        if moved is None:
            continue
        source = linecache.getline(_source(path, roots), line)
        pointer = _POINTER.search(source)
        looped = any(first <= number <= last for first, last in loops)
        name = pointer[1] if pointer else ""
        found.append(Access(*moved, looped, name, "operand(tl.load(" in source, f"{path.rsplit('/', 1)[-1]}:{line}"))
    return found


def _source(path: str, roots: Sequence[Path]) -> str:
    """Find a source file, if need be by its name in `roots`.

    Triton keeps compiled kernels by their text and lines, not by their folder: another checkout, now gone, may have
    left this one. Without the source no budget of operands would hold anything.
    """
    here = [root / Path(path).name for root in roots]
    found = next((str(file) for file in (Path(path), *here) if file.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path}, the source of a compiled kernel, is gone; remove Triton's cache, try again")
    return found


def _loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each loop: a branch back to a label."""
    labels: dict[str, int] = {}
    for number, text in enumerate(lines):
        label = _LABEL.match(text)
        if label:
            labels[label[1]] = number
        branch = _BRANCH.search(text)
        if branch and branch[1] in labels:
            yield labels[branch[1]], number


def _moved(text: str) -> tuple[str, int] | None:
    if moved := _COPY.search(text):
        return "copy", int(moved[1], 0)
    if _BULK.search(text):
        return "copy", 0
    if moved := _PTX.search(text):
        vector = re.search(r"\.v(\d)", moved[2])
        return "load" if moved[1] == "ld" else "store", int(moved[3]) // 8 * (int(vector[1]) if vector else 1)
    if moved := _GCN.search(text):
        return moved[1], {"byte": 1, "short": 2, "dword": 4}[moved[2]] * int(moved[3] or 1)
    return None
