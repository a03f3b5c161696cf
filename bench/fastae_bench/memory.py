"""`python -m fastae_bench.memory`: the peak memory of training steps and of `fit`, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastae_bench.growth_points import Point, prepare

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_mib(variant: str, points: Sequence[Point], device: torch.device) -> list[float]:
    """Of each point, beyond what its data and initial weights take; [] where the system does not tell (Linux does)."""
    if device.type != "cpu":
        return [_cuda_peak_mib(prepare(variant, point, device)) for point in points]
    if not (STATUS.exists() and os.access(CLEAR, os.W_OK)):
        return []
    # Blocks of 64 KiB and more go back to the system when they are freed: what one point leaves is not in the next.
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = [sys.executable, "-m", "fastae_bench.memory", variant, json.dumps([list(point) for point in points])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise RuntimeError("measuring memory failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
    peaks: list[float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _peak_mib(make: Callable[[], Callable[[], object]]) -> float:
    """Of making the work and doing it twice: only a second step begins with Adam's moments."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak starts anew from what is resident now (man proc_pid_clear_refs)
    before = _status_kib("VmRSS")
    work = make()
    for _ in range(2):
        work()
    return (_status_kib("VmHWM") - before) / 1024


def _cuda_peak_mib(make: Callable[[], Callable[[], object]]) -> float:
    """The same from PyTorch's allocator. Not yet run."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work = make()
    for _ in range(2):
        work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status_kib(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def main() -> None:
    variant, points = (
        sys.argv[1],
        [Point(axis, features, batch, rows) for axis, features, batch, rows in json.loads(sys.argv[2])],
    )
    device = torch.device("cpu")
    _peak_mib(prepare(variant, points[0], device))  # libraries make their own memory at their first use
    print(json.dumps([_peak_mib(prepare(variant, point, device)) for point in points]))


if __name__ == "__main__":
    main()
