"""`explain`: which implementation runs each op of a training step and why, what it costs, and a model of its time."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from fastae.analysis.baseline import Shape, replaced
from fastae.analysis.cost import Kernel
from fastae.analysis.gpus import COMPILED_US, EAGER_US, GAP_US, GPU, GPUS, REPLAY_US
from fastae.analysis.recorder import Recorder, recorded
from fastae.engine.parameters import choices_of, layers_of
from fastae.engine.train_step import _compute_dtype, why_not
from fastae.models.dense import DenseAutoencoder
from fastae.nn.arguments import nearest
from fastae.nn.backend import Elsewhere

SIDES = ("fastae", "eager", "compiled")
PHASES = {"linear_act_fwd": "forward", "linear_act_mse": "loss", "decoder_mse": "loss"}  # all else is backward


@dataclass(frozen=True)
class Row:
    """One op of the step. `us`: modelled microseconds of each side's kernels on the named GPU, or None."""

    phase: str
    layer: str
    shape: str
    op: str
    backend: str
    reason: str
    flops: int
    bytes: int
    launches: int
    us: dict[str, float] | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` is a table, `to_dict()` the same as plain numbers and strings."""

    network: str
    batch_size: int
    dtype: str
    device: str
    gpu: GPU | None
    rows: tuple[Row, ...]
    host_us: dict[str, float] | None  # the least that launching takes on the host
    cached: bool  # whether all that the step touches fits the GPU's last cache

    @property
    def kernels_us(self) -> dict[str, float] | None:
        """Modelled microseconds of all kernels of a step, by side."""
        if self.gpu is None:
            return None
        return {side: sum(row.us[side] for row in self.rows if row.us) for side in SIDES}

    @property
    def step_us(self) -> dict[str, float] | None:
        """The same, but at least what the host takes to launch them."""
        kernels, host = self.kernels_us, self.host_us
        return None if kernels is None or host is None else {s: max(kernels[s], host[s]) for s in SIDES}

    def to_dict(self) -> dict[str, Any]:
        times = {"kernels_us": self.kernels_us, "step_us": self.step_us}
        label = None if self.gpu is None else "a model, not measured"
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], **times, "times": label}

    def __str__(self) -> str:
        from fastae.analysis.explanation import table

        return table(self)


def explain(
    model: DenseAutoencoder, batch_size: int, gpu: str | None = None, precision: str | None = None
) -> Explanation:
    """Each op of a training step of `batch_size` rows: the implementation that runs it, the reason, FLOPs and bytes.

    Nothing is computed: the step's own schedule is called on tensors without memory, with the implementations that the
    dispatch chooses. FLOPs are those of matrix products; bytes are the distinct ones that each kernel reads and writes.

    Args:
        model: a `DenseAutoencoder` that `TrainStep` takes; it may be on the meta device.
        batch_size: rows of the step.
        gpu: "a100", "h100", "b200", "mi300x" or "rtx4090": what would run there (none need be at hand), and modelled
        times beside eager PyTorch and `torch.compile`: a kernel takes the larger of FLOPs / published rate and bytes /
        published bandwidth, and 1 us. None: what runs on the model's own device, without times.
        precision: as in `TrainStep`.

    Raises ValueError for a GPU it does not know, a model that `TrainStep` does not take and a batch_size below 1,
    RuntimeError where the backend that is set cannot run.
    """
    if reason := why_not(model):
        raise ValueError(f"explain: model must be a plain DenseAutoencoder; {reason}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"explain: gpu must be one of {', '.join(GPUS)}; got {gpu!r}{nearest(str(gpu), GPUS)}")
    try:
        rows = operator.index(batch_size)
    except TypeError:
        raise TypeError(f"explain: batch_size must be a whole number; got {batch_size!r}") from None
    if rows < 1:
        raise ValueError(f"explain: batch_size must be at least 1; got {batch_size}")
    dtype = _compute_dtype(model, precision)
    own = next(model.parameters()).device
    device = torch.device("cuda") if gpu else torch.device("cpu") if own.type == "meta" else own
    elsewhere = gpu is not None or own.type == "meta"
    like = Elsewhere(dtype, device) if elsewhere else torch.empty(0, dtype=dtype, device=device)
    layers, peak = layers_of(model), GPUS[gpu] if gpu else None
    choices = choices_of(layers, like, rows)
    plan = Recorder([layer.activation for layer in layers], [backend for backend, _ in choices])
    names = [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(model, part)))]
    shapes = [
        Shape(rows, layer.in_features, layer.out_features, layer.activation, below, layer.bias is not None, dtype)
        for layer, below in zip(layers, ["identity", *plan.activations], strict=False)
    ]
    found, launches = [], dict.fromkeys(SIDES, 0)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width, wide = layers[0].in_features, next(model.parameters()).dtype
    around = [("gather", 2 * rows * width * dtype.itemsize), ("adam", 7 * parameters * wide.itemsize)]
    extra = [(name, None, [Kernel(name, 0, moved, wide)]) for name, moved in around]
    casts = [Kernel("autocast", 0, parameters * (wide.itemsize + dtype.itemsize), wide)] * (2 if wide != dtype else 0)
    for name, index, kernels in (*recorded(plan, layers, rows, dtype, device), *extra):
        if index is None:
            theirs = kernels if name in ("gather", "adam") else []
            sides = {"fastae": kernels, "eager": theirs, "compiled": theirs}
            choice = "triton" if name == "sum_together" else "torch", "around the schedule"
            found.append(_row("around", "", "", name, choice, sides, peak))
        else:
            sides = dict(zip(SIDES, (kernels, *replaced(name, shapes[index])), strict=True))
            shape = f"{shapes[index].K} -> {shapes[index].N} {shapes[index].activation}"
            found.append(_row(PHASES.get(name, "backward"), names[index], shape, name, choices[index], sides, peak))
        launches = {side: launches[side] + len(sides[side]) for side in SIDES}
    if casts:
        sides = {"fastae": [], "eager": casts, "compiled": casts}
        found.append(_row("around", "", "", "autocast", ("torch", "of parameters and gradients"), sides, peak))
        launches = {side: launches[side] + len(sides[side]) for side in SIDES}
    touched = rows * (width + 2 * sum(s.N for s in shapes)) * dtype.itemsize + 4 * parameters * wide.itemsize
    host = {"fastae": REPLAY_US, "eager": launches["eager"] * EAGER_US, "compiled": launches["compiled"] * COMPILED_US}
    return Explanation(
        "-".join(map(str, [*model.features, *model.decoder_features[1:]])), rows, str(dtype)[6:], gpu or str(device),
        peak, tuple(found), host if peak else None, peak is not None and touched <= peak.cache << 20,
    )  # fmt: skip


def _row(
    phase: str, layer: str, shape: str, name: str, choice: tuple[str, str], sides: dict[str, list[Kernel]],
    peak: GPU | None,
) -> Row:  # fmt: skip
    own = sides["fastae"]
    us = None if peak is None else {side: sum(_us(k, peak) for k in kernels) for side, kernels in sides.items()}
    flops, moved = sum(k.flops for k in own), sum(k.bytes for k in own)
    return Row(phase, layer, shape, name, *choice, flops, moved, len(own), us)


def _us(kernel: Kernel, peak: GPU) -> float:
    return 1e6 * max(kernel.flops / peak.rate(kernel.dtype), kernel.bytes / (peak.bandwidth * 1e9)) + GAP_US


def reasons(explanation: Explanation) -> list[tuple[str, str, list[str]]]:
    """(implementation, reason, layers), in the order of the layers."""
    rows = {row.layer: row for row in explanation.rows if row.layer}
    found = groupby(rows.values(), key=lambda row: (row.backend, row.reason))
    return [(backend, reason, [row.layer for row in group]) for (backend, reason), group in found]
