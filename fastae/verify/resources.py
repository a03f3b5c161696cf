"""What a compiled kernel takes of a GPU, read from its machine code: no GPU is needed for that."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """Instruction counts are those in the code, not those executed."""

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


def read_resources(
    target: str, shared_bytes: int, *, binary: bytes | None = None, assembly: str | None = None
) -> Resources:
    """From the cubin of an sm_* target or the assembly text of a gfx* one."""
    if target.startswith("sm_") and binary is not None:
        return parse_sass(_cuobjdump(binary, "-res-usage"), _cuobjdump(binary, "-sass"), shared_bytes)
    if target.startswith("gfx") and assembly is not None:
        return parse_amdgcn(assembly, shared_bytes)
    raise ValueError(f"target must be sm_* with its binary or gfx* with its assembly; got {target!r}")


def tool(name: str) -> Path:
    """A program of NVIDIA's that Triton's wheel brings along."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        raise ImportError(f"{name} comes with Triton, which is not installed; pip install triton (Linux)")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; reinstall it with pip install --force-reinstall triton (Linux)")
    return path


def _cuobjdump(binary: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_TENSOR_CORE = re.compile(r"(HMMA|IMMA|DMMA|BMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|BGMMA|UTC\w*MMA)\b")
_WIDTH = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16, ".256": 32}


def parse_sass(usage: str, sass: str, shared_bytes: int) -> Resources:
    """From what `cuobjdump -res-usage` and `-sass` print."""
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    names = Counter(_INSTRUCTION.findall(sass))
    if not names:
        raise RuntimeError("cuobjdump printed no instructions")
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
    """From the assembly text and the metadata at its end."""

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
