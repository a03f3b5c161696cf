"""The points of the growth curves, and the work that is done at each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastae_bench.sizes import Size
from fastae_bench.training_variants import TrainingProblem, tuned_step, variant
from fastae_bench.variants import FASTAE

VARIANTS = (FASTAE, "tuned")
MNIST = [784, 256, 128]


class Point(NamedTuple):
    """A training step at a batch, or an epoch of `fit` where there are `rows`."""

    axis: str
    features: list[int]
    batch: int
    rows: int = 0

    @property
    def x(self) -> int:
        """Where it is on its axis; depth counts the layers."""
        return {
            "batch": self.batch, "width": self.features[0], "depth": 2 * len(self.features) - 2, "rows": self.rows,
        }[self.axis]  # fmt: skip


# axis -> (what is measured, its points)
AXES = {
    "batch": ("training step, 784-256-128", [Point("batch", MNIST, b) for b in (64, 256, 1024, 4096, 16384)]),
    "width": (
        "training step, w-w/2-w/4, batch 256",
        [Point("width", [w, w // 2, w // 4], 256) for w in (128, 256, 512, 1024, 2048)],
    ),
    "depth": (
        "training step, layers of 256, batch 256",
        [Point("depth", [256] * (d + 1), 256) for d in (1, 2, 4, 8, 16)],
    ),
    "rows": (
        "epoch of fit, 784-256-128, batch 256",
        [Point("rows", MNIST, 256, rows) for rows in (1024, 2048, 4096, 8192, 16384)],
    ),
}


def spaced(points: list[Point], count: int) -> list[Point]:
    """That many of them, evenly, the first and the last among them."""
    last = len(points) - 1
    return [points[round(i * last / (count - 1))] for i in range(count)] if count < len(points) else points


def prepare(name: str, point: Point, device: torch.device) -> Callable[[], Callable[[], object]]:
    """A function that makes the work of a variant, with the data and the initial weights made already."""
    problem = TrainingProblem(
        Size(point.axis, tuple(point.features), point.batch), "float32", device, point.rows or None
    )
    if not point.rows:
        return lambda: variant(name, problem).run
    return lambda: _epoch(name, problem)


def _epoch(name: str, problem: TrainingProblem) -> Callable[[], object]:
    """A whole call of `fit` for one epoch, or one pass of a loop."""
    if name == FASTAE:
        model, batch = copy.deepcopy(problem.model), problem.size.batch
        return lambda: model.fit(problem.x, epochs=1, batch_size=batch, validation_split=0.0, progress=False)
    step, batches = tuned_step(problem, problem.plain(tuned=True), None), problem.batches()
    return lambda: [step(next(batches)) for _ in range(problem.rows // problem.size.batch)]
