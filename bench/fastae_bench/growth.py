"""How time and peak memory grow with batch, width, depth and rows: fastae beside tuned PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastae_bench.clocks import clocks
from fastae_bench.growth_points import AXES, SIDES, prepare, spaced
from fastae_bench.memory import peaks_mib
from fastae_bench.results import Curve
from fastae_bench.rounds import Effort, take_turns
from fastae_bench.sides import Side


def measure_growth(device: torch.device, effort: Effort) -> Iterator[Curve]:
    """Every side along every axis; at each point the sides take turns."""
    clock = next(iter(clocks(device).values()))
    axes = {axis: (what, spaced(points, effort.points)) for axis, (what, points) in AXES.items()}
    every = [point for _, points in axes.values() for point in points]
    memory = {name: peaks_mib(name, every, device) for name in SIDES}
    for axis, (what, points) in axes.items():
        took: dict[str, list[list[float]]] = {name: [] for name in SIDES}
        for point in points:
            sides = [Side(name, prepare(name, point, device)()) for name in SIDES]
            for name, seconds in take_turns(sides, clock, effort).items():
                took[name].append(seconds)
        for name in SIDES:
            peaks = [peak for peak, point in zip(memory[name], every, strict=False) if point.axis == axis]
            yield Curve(axis, what, name, [point.x for point in points], took[name], peaks)
