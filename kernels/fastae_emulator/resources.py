"""Resources of a compiled kernel (registers, spills, instructions), read from its machine code without a GPU."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel. Instruction counts are those in the code, not those executed."""

    registers: int  # of a thread; for AMD the vector registers, accumulators included
    spill_stores: int  # to local memory: STL and LDL instructions, for AMD scratch_store and scratch_load
    spill_loads: int
    local_bytes: int  # of local memory (AMD: the private segment) of a thread
    shared_bytes: int
    tensor_core: dict[str, int]  # instruction name -> how many
    load_widths: dict[int, int]  # bytes that one thread loads from global memory at once -> instructions
    store_widths: dict[int, int]

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


def of_cubins(target: str, cubins: Sequence[tuple[bytes, int]]) -> list[Resources]:
    """Read each (cubin, shared bytes) compiled for sm_*. All are disassembled as one: nvdisasm takes 0.3 s to start."""
    codes = [_machine_code(cubin) for cubin, _ in cubins]
    arch = target.replace("sm_", "SM") + ("a" if int(target[3:]) >= 90 else "")  # as Triton compiles for them
    instructions = _INSTRUCTION.findall(_run("nvdisasm", "-ndf", "-b", arch, file=b"".join(codes)))
    names: list[Counter[str]] = [Counter() for _ in codes]
    ends = list(accumulate(map(len, codes)))
    for address, name in instructions:
        names[bisect_right(ends, int(address, 16))][name] += 1
    usages = [_run("cuobjdump", "-res-usage", file=cubin) for cubin, _ in cubins]
    return [
        _of_names(usage, found, shared_bytes)
        for usage, found, (_, shared_bytes) in zip(usages, names, cubins, strict=True)
    ]


def _machine_code(cubin: bytes) -> bytes:
    """Extract the one section .text.* of an ELF64 file (System V ABI, chapter 4)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<II4Q", cubin, headers + i * size) for i in range(count)]  # the header's first 40
    names = sections[of_names][4]
    codes = [
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", names + name)
    ]
    if len(codes) != 1:
        raise RuntimeError(f"a cubin must hold the code of one kernel; got {len(codes)}")
    return codes[0]


def tool(name: str) -> Path:
    """Find a program of NVIDIA's that Triton's wheel brings along."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise ImportError(f"{name} comes with Triton, which is not installed; pip install triton (Linux)")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; reinstall it with pip install --force-reinstall triton (Linux)")
    return path


def _run(name: str, *options: str, file: bytes) -> str:
    """Run a program of NVIDIA's on a file and return its output."""
    with tempfile.NamedTemporaryFile() as written:
        written.write(file)
        written.flush()
        done = subprocess.run([tool(name), *options, written.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(options)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_TENSOR_CORE = re.compile(r"(HMMA|IMMA|DMMA|BMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|BGMMA|UTC\w*MMA)\b")
_WIDTH = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16, ".256": 32}


def _of_names(usage: str, names: Counter[str], shared_bytes: int) -> Resources:
    """Build from the output of `cuobjdump -res-usage` and the number of times each instruction occurs."""
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    if not names:
        raise RuntimeError("nvdisasm printed no instructions")
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for name, times in names.items():
        width = next((size for suffix, size in _WIDTH.items() if re.search(re.escape(suffix) + r"\b", name)), 4)
        if re.match(r"LDG(STS)?\b", name):
            loads[width] += times
        elif re.match(r"STG\b", name):
            stores[width] += times
    return Resources(
        int(found[1]),
        sum(n for name, n in names.items() if re.match(r"STL\b", name)),
        sum(n for name, n in names.items() if re.match(r"LDL\b", name)),
        max(int(found[2]), int(found[3])),
        shared_bytes,
        {name: n for name, n in sorted(names.items()) if _TENSOR_CORE.match(name)},
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
    )


_MEMORY = re.compile(
    r"(?:global|buffer|flat)_(load|store)_([a-z]*?)(ubyte|sbyte|byte|ushort|sshort|short|dword)(?:x(\d))?\b"
)
_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


def parse_amdgcn(assembly: str, shared_bytes: int) -> Resources:
    """Parse AMD assembly and the metadata at its end."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.M)
        if found is None:
            raise RuntimeError(f"the assembly names no .{key}")
        return int(found[1])

    names = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.M))
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for name, times in names.items():
        memory = _MEMORY.match(name)
        if memory:
            widths[memory[1]][_BYTES[memory[3]] * int(memory[4] or 1)] += times
    return Resources(
        number("vgpr_count"),
        sum(n for name, n in names.items() if name.startswith("scratch_store")),
        sum(n for name, n in names.items() if name.startswith("scratch_load")),
        number("private_segment_fixed_size"),
        shared_bytes,
        {name: n for name, n in sorted(names.items()) if name.startswith("v_mfma")},
        dict(sorted(widths["load"].items())),
        dict(sorted(widths["store"].items())),
    )
