"""Ways to train, side by side: alternating in one process, medians, ratios round by round."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastae
from fastae.demo import PlainAutoencoder

Side = Callable[[], object]  # one step, or one pass


def machine() -> str:
    """What ran: the line every table begins with."""
    name = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []


def training_sides(dims: list[int], batch: int, precision: str, rows: int, names: tuple[str, ...]) -> dict[str, Side]:
    """fastae's step and the baselines named, all from the same weights, each a function that takes one step.

    idiom: DataLoader(shuffle) + Adam + loss.item(). tuned: resident data, index_select, Adam(fused=True),
    set_to_none. compiled: tuned + torch.compile. bf16 is fp32 parameters under autocast.
    """
    torch.manual_seed(0)
    x = torch.rand(rows, dims[0])
    model = fastae.DenseAutoencoder(dims)
    low = precision == "bfloat16"
    made: dict[str, Side] = {"fastae": _fastae(copy.deepcopy(model), x, batch, precision)}
    for name in names:
        made[name] = {"idiom": _idiom, "tuned": _tuned, "compiled": _compiled}[name](
            PlainAutoencoder(model), x, batch, low
        )
    return made


def _batches(rows: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from (r for r in torch.randperm(rows).split(batch) if len(r) == batch)


def _fastae(model: fastae.DenseAutoencoder, x: Tensor, batch: int, precision: str) -> Side:
    step = fastae.TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), batch, precision)
    data, batches = x.to(step.dtype), _batches(len(x), batch)
    return lambda: step(data, next(batches))


def _idiom(model: nn.Module, x: Tensor, batch: int, low: bool) -> Side:
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(x), batch, shuffle=True, drop_last=True)
    batches = (b for _ in cycle([0]) for (b,) in loader)

    def step() -> float:
        rows = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.mse_loss(model(rows), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _tuned(model: nn.Module, x: Tensor, batch: int, low: bool) -> Side:
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    batches = _batches(len(x), batch)

    def step() -> Tensor:
        rows = x.index_select(0, next(batches))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.mse_loss(model(rows), rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _compiled(model: nn.Module, x: Tensor, batch: int, low: bool) -> Side:
    return _tuned(torch.compile(model), x, batch, low)  # type: ignore[arg-type]


def seconds(sides: dict[str, Side], calls: int, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds per call of each side in each round; the sides take turns within a round."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + warm_up):
        for name, side in sides.items():
            started = time.perf_counter()
            for _ in range(calls):
                side()
            if index >= warm_up:
                took[name].append((time.perf_counter() - started) / calls)
    return took


def ratio(took: dict[str, list[float]], other: str, ours: str = "fastae") -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile) of other / ours, round by round."""
    low, middle, high = statistics.quantiles((b / a for a, b in zip(took[ours], took[other], strict=True)), n=4)
    return low, middle, high
