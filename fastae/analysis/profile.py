"""`profile`: where the time of a training step goes, and a trace of it that Perfetto opens."""

from __future__ import annotations

import copy
import operator
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastae.analysis.cost import PRODUCTS
from fastae.data.arrays import check_rows, to_tensor
from fastae.data.writers import replaced_when_complete
from fastae.engine import schedule as _schedule
from fastae.engine.call_list import Replay, _Recorder
from fastae.engine.parameters import layers_of
from fastae.engine.train_step import TrainStep, why_not
from fastae.models.dense import DenseAutoencoder
from fastae.nn.backend import op

WARM_UP = 3  # steps before anything is timed
RANGE = "fastae::"  # how the ranges of a trace begin; those of the schedule, and the step around them
GROUPS = ("products", "activations", "loss", "bias sums", "copies", "optimizer", "gather", "python")
COPIES = ("copy_", "clone", "contiguous", "_to_copy", "_foreach_copy_")
# ATen's own ops that only allocate or describe memory
DISPATCH = (
    "empty", "new_empty", "empty_like", "empty_strided", "view", "t", "transpose", "as_strided", "select", "slice",
    "to", "detach", "alias", "reshape", "expand", "unsqueeze", "item", "_local_scalar_dense", "split",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """An op of the schedule, or what stands around it: microseconds of a step by group."""

    name: str
    layer: str
    us: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """What `profile` found, medians over the steps; `str()` is a table. The groups of `us` add up to `profiled_us`."""

    network: str
    batch_size: int
    dtype: str
    device: str
    threads: int
    steps: int
    parts: tuple[Part, ...]
    step_us: float  # without the profiler
    autograd_us: float  # loss(x).backward(), optimizer.step() on the same rows, without the profiler
    flops: int  # of a step's products
    bare_us: float  # those products alone, by the fastest library at hand
    trace: str | None

    @property
    def us(self) -> dict[str, float]:
        """Microseconds of a step by group."""
        return {group: sum(part.us.get(group, 0.0) for part in self.parts) for group in GROUPS}

    @property
    def profiled_us(self) -> float:
        """Of a step under the profiler, which costs one or two microseconds for each op and each range."""
        return sum(self.us.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "us": self.us, "profiled_us": self.profiled_us}

    def __str__(self) -> str:
        from fastae.analysis.profile_result import table

        return table(self)


def profile(
    model: DenseAutoencoder,
    batch: NDArray[Any] | Tensor,
    *,
    steps: int = 20,
    precision: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Print and return where the time of a `TrainStep` with Adam goes, op by op; `model` stays as it is.

    Args:
        model: a `DenseAutoencoder` that `TrainStep` takes; a copy of it is trained for the measurement.
        batch: [rows, features], a step's rows; array or tensor.
        steps: how many are profiled, after warming up.
        precision: as in `TrainStep`.
        trace: a .json file to write for Perfetto (ui.perfetto.dev) or chrome://tracing, with a range for each op of the
        schedule; an older one is replaced.
        progress: print the table.

    On CUDA the step is profiled without its captured graph, in which ranges would not show; not yet run on a GPU.

    Raises ValueError for a model that `TrainStep` does not take, or TypeError or ValueError for a batch that does not
    fit it.
    """
    if reason := why_not(model):
        raise ValueError(f"profile: model must be a plain DenseAutoencoder; {reason}")
    check_rows(batch, model.features[0], "profile: batch")
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"profile: steps must be a whole number; got {steps!r}") from None
    if steps < 1 or len(batch) == 0:
        raise ValueError(f"profile: steps and rows must be at least 1; got {steps} steps of {len(batch)} rows")
    x = to_tensor(batch, next(model.parameters())).detach()
    step = _step(model, len(x), precision)
    data, rows = x.to(step.dtype), torch.randperm(len(x), device=x.device)
    layers = [(layer.in_features, layer.out_features) for layer in layers_of(model)]
    from fastae.analysis.products import products

    sides = {
        "step": lambda: step(data, rows),
        "autograd": _autograd_step(model, x, rows, step.dtype),
        "bare": products(layers, len(x), step.dtype, x.device, True),
    }
    alone = _alternating(sides, steps)
    _mark(step)
    found = _profiled(sides["step"], steps, None if trace is None else Path(trace))
    made = Profile(
        "-".join(map(str, [*model.features, *model.decoder_features[1:]])), len(x), str(step.dtype)[6:], str(x.device),
        torch.get_num_threads(), steps, found, alone["step"], alone["autograd"],
        sum(2 * len(x) * k * n * (3 if layer else 2) for layer, (k, n) in enumerate(layers)), alone["bare"],
        None if trace is None else str(trace),
    )  # fmt: skip
    if progress:
        print(made)
    return made


def _step(model: DenseAutoencoder, rows: int, precision: str | None) -> TrainStep:
    own = copy.deepcopy(model).train()
    fused = next(own.parameters()).device.type in ("cpu", "cuda")
    step = TrainStep(own, torch.optim.Adam(own.parameters(), fused=fused), rows, precision)
    step._captured = None
    return step


def _autograd_step(model: DenseAutoencoder, x: Tensor, rows: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    own = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(own.parameters(), fused=x.device.type in ("cpu", "cuda"))

    def step() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != x.dtype):
            loss = own.loss(x.index_select(0, rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _alternating(sides: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """The median microseconds of a call of each, taking turns: what else the machine does meets all of them."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UP + steps):
        for name, call in sides.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            if number >= WARM_UP:
                took[name].append(1e6 * (time.perf_counter() - started))
    return {name: statistics.median(us) for name, us in took.items()}


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def within(*args: Any, **options: Any) -> Any:
        with torch.profiler.record_function(RANGE + name):
            return call(*args, **options)

    return within


@dataclass(frozen=True)
class _Marked(_schedule.Plan):
    """A plan whose ops go through `around`, which is told their name and layer."""

    layers: tuple[str, ...] = ()
    around: Callable[[str, Callable[..., Any]], Callable[..., Any]] = _ranged

    def ops(self, name: str) -> list[Callable[..., Any]]:
        if name not in self._ops:
            pairs = zip(self.backends, self.layers, strict=True)
            self._ops[name] = [self.around(f"{name} {layer}", op(backend, name)) for backend, layer in pairs]
        return self._ops[name]

    def sum_together(self, pairs: Any) -> None:
        self.around("sum_together", super().sum_together)(pairs)


def _mark(step: TrainStep) -> None:
    """Put ranges around what the step does; only this one, the class stays as it is."""
    plan, model, memory = step._layers.plan, step.model, step._memory
    names = tuple(f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(model, part))))
    noted = memory.replays.get(False)
    if noted is None:
        step._layers.plan = _Marked(plan.activations, plan.backends, plan.features, names)
    else:
        memory.replays[False] = (_ranged_calls(step, names), *noted[1:])
    step._compute = _ranged("compute", step._compute)  # type: ignore[method-assign]
    step._apply = _ranged("optimizer", step._apply)  # type: ignore[method-assign]


def _ranged_calls(step: TrainStep, names: tuple[str, ...]) -> Replay:
    """The calls that the step repeats, in ranges for the ops that make them."""
    plan, parts = step._layers.plan, list[tuple[str, int, int]]()  # op and layer, its first call, the next one's
    recorder = _Recorder()

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            first = len(recorder.calls)
            result = call(*args, **options)
            parts.append((name, first, len(recorder.calls)))
            return result

        return noted

    step._layers.plan = _Marked(plan.activations, plan.backends, plan.features, names, noting)
    with torch.no_grad(), recorder:
        step._schedule(step._memory)
    step._layers.plan = plan
    calls, done = list[Callable[[], object]](), 0
    for name, first, end in parts:
        group = recorder.calls[first:end]
        calls += [*recorder.calls[done:first], _ranged(name, partial(_run_all, group))]
        done = end
    return Replay([*calls, *recorder.calls[done:]], step._layers.parameters)


def _run_all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _profiled(call: Callable[[], object], steps: int, trace: Path | None) -> tuple[Part, ...]:
    """The parts of a step under the profiler, in the order in which they first run."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for _ in range(WARM_UP):
        call()
    with profiler(activities=activities) as found:
        for _ in range(steps):
            with record_function(RANGE + "step"):
                call()
            _wait()
    if trace is not None:
        with replaced_when_complete(trace) as part:
            found.export_chrome_trace(str(part))
    events = found.events()
    on_device = torch.cuda.is_available() and any(e.self_device_time_total for e in events)
    spent: dict[tuple[str, str], list[float]] = {}  # (part, group) -> microseconds in each step
    number = -1
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.name == RANGE + "step":
            number += 1
        where = _range_of(event)
        if where is None or number < 0:
            continue
        key = where, _group(event.name, where)
        spent.setdefault(key, [0.0] * steps)[number] += (
            event.self_device_time_total if on_device else event.self_cpu_time_total
        )
    parts: dict[str, dict[str, float]] = defaultdict(dict)
    for (where, group), us in spent.items():
        parts[where][group] = statistics.median(us)
    return tuple(Part(*_named(where), us) for where, us in parts.items())


def _range_of(event: Any) -> str | None:
    """The innermost of our ranges that an event lies in, or is."""
    while event is not None and not event.name.startswith(RANGE):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(RANGE)


def _named(where: str) -> tuple[str, str]:
    name, _, layer = where.partition(" ")
    return {"step": "gather and total", "compute": "between the ops"}.get(name, name), layer


def _group(event: str, where: str) -> str:
    name, op_name = event.split("::")[-1], where.split(" ")[0]
    if event.startswith(RANGE) or name in DISPATCH:
        return "python"
    if op_name == "optimizer":
        return "optimizer"
    if name in PRODUCTS:
        return "products"
    if op_name == "step":
        return "gather" if name in ("index_select", "copy_") else "python"
    if name in COPIES:
        return "copies"
    if op_name in ("linear_wgrad", "act_bwd"):
        return "bias sums"
    return "loss" if op_name in ("linear_act_mse", "decoder_mse", "compute") else "activations"
