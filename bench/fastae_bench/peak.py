"""Peak rates of the device, measured: matrix products and a copy. They are the roofs of the roofline plot."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastae.analysis.products import multiplications

TRIALS = 5
CPU_WIDTHS, CUDA_WIDTHS = (1024, 2048), (4096, 8192)  # of the square matrices


@dataclass(frozen=True)
class Peak:
    """flops_per_s: of products, by precision. bytes_per_s: read and written by a copy far larger than the caches."""

    flops_per_s: dict[str, float]
    bytes_per_s: float


def measure_peak(device: torch.device, precisions: tuple[str, ...]) -> Peak:
    """The best of a few trials of square products by each library, and of a copy: a peak is what is possible."""
    widths, values = (CPU_WIDTHS, 1 << 25) if device.type == "cpu" else (CUDA_WIDTHS, 1 << 28)
    rates = {}
    for precision in precisions:
        dtype, best = getattr(torch, precision), 0.0
        for width in widths:
            a, b = (torch.rand(width, width, device=device).to(dtype) for _ in range(2))
            best = max(best, *(2 * width**3 / _least_seconds(way, device) for way in multiplications(a, b)))
        rates[precision] = best
    source = torch.zeros(values, device=device)
    target = torch.empty_like(source)
    return Peak(rates, 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device))


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    took = []
    for _ in range(TRIALS):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        took.append(time.perf_counter() - started)
    return min(took)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)
