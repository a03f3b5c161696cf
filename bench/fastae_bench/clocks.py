"""How long a variant takes. On a CPU one clock; on CUDA three: the kernels alone, the host alone, the whole step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object], int], float]  # (run, calls) -> seconds per call


def wall(run: Callable[[], object], calls: int) -> float:
    """From the first call to the return of the last."""
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def clocks(device: torch.device) -> dict[str, Clock]:
    """Every clock of the device by name; the first is the one that ratios are made of."""
    if device.type == "cpu":
        return {"wall": wall}
    return {"step": step, "host": host, "kernel": KernelClock(device)}


# ---------------------------------------------------------------- CUDA: written by the documented patterns, not yet run


def step(run: Callable[[], object], calls: int) -> float:
    """From an idle device until all calls are done on it; a variant that is a captured graph replays it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def host(run: Callable[[], object], calls: int) -> float:
    """Until the calls have returned, without waiting for the device: what the host spends on launching them."""
    torch.cuda.synchronize()
    seconds = wall(run, calls)
    torch.cuda.synchronize()
    return seconds


class KernelClock:
    """Between CUDA events around each call, on an L2 cache that other data has just gone through."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object], calls: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for started, ended in events:
            self.other_data.zero_()
            started.record()
            run()
            ended.record()
        torch.cuda.synchronize()
        return sum(started.elapsed_time(ended) for started, ended in events) / 1000 / calls  # from milliseconds
