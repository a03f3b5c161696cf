"""How time and peak memory grow with batch, width, depth and rows: fastae beside tuned PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastae_bench.clocks import clocks
from fastae_bench.growth_points import AXES, VARIANTS, prepare, spaced
from fastae_bench.memory import peaks_mib
from fastae_bench.results import Curve
from fastae_bench.rounds import Budget, take_turns
from fastae_bench.variants import Variant


def measure_growth(device: torch.device, budget: Budget) -> Iterator[Curve]:
    """Every variant along every axis; at each point the variants take turns."""
    clock = next(iter(clocks(device).values()))
    axes = {axis: (what, spaced(points, budget.points)) for axis, (what, points) in AXES.items()}
    every = [point for _, points in axes.values() for point in points]
    memory = {name: peaks_mib(name, every, device) for name in VARIANTS}
    for axis, (what, points) in axes.items():
        took: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
        for point in points:
            variants = [Variant(name, prepare(name, point, device)()) for name in VARIANTS]
            for name, seconds in take_turns(variants, clock, budget).items():
                took[name].append(seconds)
        for name in VARIANTS:
            peaks = [peak for peak, point in zip(memory[name], every, strict=False) if point.axis == axis]
            yield Curve(axis, what, name, [point.x for point in points], took[name], peaks)
