"""`profile`: where the time of a training step goes, and a trace of it that Perfetto opens."""

from __future__ import annotations

import copy
import operator
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from fastae_kernels.ops import Ops
from numpy.typing import NDArray
from torch import Tensor

from fastae.analysis.cost import PRODUCTS
from fastae.analysis.products import products
from fastae.analysis.profile_result import Part, Profile
from fastae.data.arrays import check_rows, to_tensor
from fastae.data.writers import replaced_when_complete
from fastae.engine.call_list import Call, Recorder
from fastae.engine.optimizer import Update
from fastae.engine.program import layer_of
from fastae.engine.static_step import StaticStep
from fastae.engine.train_step import TrainStep, compute_dtype
from fastae.models.base import Autoencoder

WARM_UP = 3  # steps before anything is timed
RANGE = "fastae::"  # how the ranges of a trace begin; those of the schedule, and the step around them
COPIES = ("copy_", "clone", "contiguous", "_to_copy", "_foreach_copy_")
OF_MODULES = ("pool", "relu", "clamp_min", "threshold", "elu", "silu", "mish", "sigmoid", "tanh", "softplus")
# ATen's own ops that only allocate or describe memory
DISPATCH = (
    "empty", "new_empty", "empty_like", "empty_strided", "view", "t", "transpose", "as_strided", "select", "slice",
    "to", "detach", "alias", "reshape", "expand", "unsqueeze", "item", "_local_scalar_dense", "split",
)  # fmt: skip


def profile(
    model: Autoencoder,
    batch: NDArray[Any] | Tensor,
    *,
    steps: int = 20,
    precision: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Print and return where the time of a `TrainStep` with Adam goes, op by op; `model` stays as it is.

    Args:
        model: an autoencoder of fastae; a copy of it is trained for the measurement.
        batch: [rows, features], a step's rows; array or tensor.
        steps: how many are profiled, after warming up.
        precision: as in `TrainStep`.
        trace: a .json file to write for Perfetto (ui.perfetto.dev) or chrome://tracing, with a range for each op of the
        schedule; an older one is replaced.
        progress: print the table.

    On CUDA the step is profiled without its captured graph, in which ranges would not show; not yet run on a GPU.

    Raises TypeError for another model, TypeError or ValueError for a batch that does not fit it.
    """
    if not isinstance(model, Autoencoder):
        raise TypeError(f"profile: model must be an autoencoder of fastae; got {type(model).__name__}")
    given: Any = model.to_rows(cast(Any, batch), "profile: batch")
    check_rows(given, model.in_features, "profile: batch")
    try:
        steps = operator.index(steps)
    except TypeError:
        raise TypeError(f"profile: steps must be a whole number; got {steps!r}") from None
    if steps < 1 or len(given) == 0:
        raise ValueError(f"profile: steps and rows must be at least 1; got {steps} steps of {len(given)} rows")
    x = to_tensor(given, next(model.parameters())).detach()
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):  # the caller's random state stays
        own = copy.deepcopy(model).train()
        step = TrainStep(own, _adam(own), len(x), precision)
        data, rows = x.to(step.dtype), torch.randperm(len(x), device=x.device)
        layers = [layer.widths for layer in map(layer_of, step.static.program.stages) if layer is not None]
        sides = {
            "step": lambda: step(data, rows),
            "autograd": _autograd_step(model, x, rows, step.dtype),
            "bare": products(layers, len(x), step.dtype, x.device, True),
        }
        alone = _alternating(sides, steps)
        found = _profiled(_ranged_step(model, data, rows, precision), steps, None if trace is None else Path(trace))
    made = Profile(
        "-".join(map(str, [*model.features, *model.decoder_features[1:]])), len(x), str(step.dtype)[6:], str(x.device),
        torch.get_num_threads(), steps, found, alone["step"], alone["autograd"],
        sum(2 * len(x) * k * n * (3 if layer else 2) for layer, (k, n) in enumerate(layers)), alone["bare"],
        None if trace is None else str(trace),
    )  # fmt: skip
    if progress:
        print(made)
    return made


def _adam(model: Autoencoder) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), fused=next(model.parameters()).device.type in ("cpu", "cuda"))


def _autograd_step(model: Autoencoder, x: Tensor, rows: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    own = copy.deepcopy(model).train()
    optimizer = _adam(own)

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


class _Around:
    """An implementation of the ops whose calls go through `around`, which takes their name and stage."""

    def __init__(self, ops: Ops, stage: str, around: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.ops, self.stage, self.around = ops, stage, around

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.ops, name)
        if name.startswith("fits_"):
            return cast(Callable[..., Any], call)

        def within(*args: Any, **options: Any) -> Any:
            with self.around(f"{name} {self.stage}".strip()):
                return call(*args, **options)

        return within


def _ranged_step(model: Autoencoder, data: Tensor, rows: Tensor, precision: str | None) -> Callable[[], object]:
    """A step of a copy, by its public parts, with a range of the profiler around each."""
    own = copy.deepcopy(model).train()
    recorder: list[Recorder] = []

    def around(name: str) -> AbstractContextManager[Any]:
        return recorder[0].section(name) if recorder else torch.profiler.record_function(RANGE + name)

    def wrap(ops: Ops, stage: str) -> Ops:
        return cast(Ops, _Around(ops, stage, around))

    static = StaticStep(own.program(), len(rows), compute_dtype(own, precision), wrap=wrap)
    update, total = Update(_adam(own), static.trainable), torch.zeros((), dtype=torch.float64, device=data.device)
    compute: Callable[[], object] = partial(static.run, static.memory)
    if static.repeats:
        with torch.no_grad():
            static.load(data, rows, None, len(rows))
            static.parameters.begin()
            recorder.append(Recorder())
            made = static.record(static.memory, recorder[0])
            recorder.clear()
        if made.repeatable:
            calls = _in_ranges(made)
            static.memory.recorded[static.memory.variant] = calls
    compute = _ranged("compute", compute)
    apply = _ranged("optimizer", lambda: update(static.gradients))

    def step() -> None:
        with torch.no_grad():
            static.load(data, rows, None, len(rows))
            compute()
            apply()
            total.add_(static.memory.found[static.memory.variant][1], alpha=len(rows))

    return step


def _in_ranges(recorder: Recorder) -> list[Call]:
    """The calls that a step repeats, in ranges for the ops that make them."""
    calls, done = list[Call](), 0
    for name, first, end in recorder.sections:
        group = recorder.calls[first:end]
        calls += [*recorder.calls[done:first], _ranged(name, partial(_run_all, group))]
        done = end
    return [*calls, *recorder.calls[done:]]


def _run_all(calls: list[Call]) -> None:
    for call in calls:
        call()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without stderr, to which PyTorch's profiler prints two lines of its own (USDT:...) when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _profiled(call: Callable[[], object], steps: int, trace: Path | None) -> tuple[Part, ...]:
    """The parts of a step under the profiler, in the order in which they first run."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for _ in range(WARM_UP):
        call()
    found = profiler(activities=activities)
    with _quiet():
        found.start()
    try:
        for _ in range(steps):
            with record_function(RANGE + "step"):
                call()
            _wait()
    finally:
        with _quiet():
            found.stop()
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
    if "convolution" in name:
        return "convolutions"
    if op_name == "step":
        return "gather" if name in ("index_select", "copy_") else "python"
    if name in COPIES:
        return "copies"
    if op_name in ("linear_wgrad", "act_bwd"):
        return "bias sums"
    if op_name == "compute" and any(word in name for word in OF_MODULES):
        return "activations"
    return "loss" if op_name in ("linear_act_loss", "decoder_loss", "compute") else "activations"
