"""`explain`: which implementation runs each op of a training step and why, what it costs, and a model of its time."""

from __future__ import annotations

import operator

import torch

from fastae.analysis.baseline import Shape, replaced
from fastae.analysis.cost import Kernel
from fastae.analysis.explanation import SIDES, Explanation, Row
from fastae.analysis.gpus import COMPILED_US, EAGER_US, GAP_US, GPU, GPUS, REPLAY_US
from fastae.analysis.recorder import recorded
from fastae.engine.program import layer_of
from fastae.engine.static_step import choices
from fastae.engine.train_step import compute_dtype
from fastae.models.base import Autoencoder
from fastae.nn.arguments import nearest
from fastae.nn.backend import DeviceSpec

# all else is backward
PHASES = {
    "linear_act_fwd": "forward",
    "linear_sample": "forward",
    "linear_act_loss": "loss",
    "decoder_loss": "loss",
}


def explain(model: Autoencoder, batch_size: int, gpu: str | None = None, precision: str | None = None) -> Explanation:
    """Each op of a training step of `batch_size` rows: the implementation that runs it, the reason, FLOPs and bytes.

    Nothing is computed: the step's own schedule is called on tensors without memory, with the implementations that the
    dispatch chooses. FLOPs are those of matrix products; bytes are the distinct ones that each kernel reads and writes.

    Args:
        model: an autoencoder of fastae; it may be on the meta device. Islands of autograd are named, not counted.
        batch_size: rows of the step.
        gpu: "a100", "h100", "b200", "mi300x" or "rtx4090": what would run there (none need be at hand), and modelled
        times beside eager PyTorch and `torch.compile`: a kernel takes the larger of FLOPs / published rate and bytes /
        published bandwidth, and 1 us. None: what runs on the model's own device, without times.
        precision: as in `TrainStep`.

    Raises ValueError for a GPU it does not know, a model that is all islands beside one, and a batch_size below 1;
    RuntimeError where the backend that is set cannot run.
    """
    if not isinstance(model, Autoencoder):
        raise TypeError(f"explain: model must be an autoencoder of fastae; got {type(model).__name__}")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"explain: gpu must be one of {', '.join(GPUS)}; got {gpu!r}{nearest(str(gpu), GPUS)}")
    try:
        rows = operator.index(batch_size)
    except TypeError:
        raise TypeError(f"explain: batch_size must be a whole number; got {batch_size!r}") from None
    if rows < 1:
        raise ValueError(f"explain: batch_size must be at least 1; got {batch_size}")
    dtype = compute_dtype(model, precision)
    own = next(model.parameters()).device
    device = torch.device("cuda") if gpu else torch.device("cpu") if own.type == "meta" else own
    elsewhere = gpu is not None or own.type == "meta"
    like = DeviceSpec(dtype, device) if elsewhere else torch.empty(0, dtype=dtype, device=device)
    program, peak = model.program(), GPUS[gpu] if gpu else None
    chosen = {stage.name: choice for stage, choice in zip(program.stages, choices(program, like, rows), strict=True)}
    shapes, below = dict[str, Shape](), "identity"
    for stage in program.stages:
        layer = layer_of(stage)
        activation = "identity" if layer is None else layer.activation
        if layer is not None:
            inside, out = layer.widths
            shapes[stage.name] = Shape(rows, inside, out, activation, below, layer.bias is not None, dtype)
        below = activation
    if gpu is not None and not shapes:
        raise ValueError(
            f"explain: gpu must be None for a model that is all islands, whose time is not modelled; got {gpu!r}"
        )
    found, launches = list[Row](), dict.fromkeys(SIDES, 0)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width, wide = program.in_features, next(model.parameters()).dtype
    around = [("gather", 2 * rows * width * dtype.itemsize), ("adam", 7 * parameters * wide.itemsize)]
    extra = [(name, "", [Kernel(name, 0, moved, wide)]) for name, moved in around]
    casts = [Kernel("autocast", 0, parameters * (wide.itemsize + dtype.itemsize), wide)] * (2 if wide != dtype else 0)
    for name, stage_name, kernels in (*recorded(program, list(chosen.values()), rows, dtype, device), *extra):
        if stage_name in shapes:
            shape = shapes[stage_name]
            sides = dict(zip(SIDES, (kernels, *replaced(name, shape)), strict=True))
            words = f"{shape.K} -> {shape.N} {shape.activation}"
            found.append(_row(PHASES.get(name, "backward"), stage_name, words, name, chosen[stage_name], sides, peak))
        elif stage_name:
            sides = {side: list[Kernel]() for side in SIDES}
            found.append(_row("island", stage_name, "", name, chosen[stage_name], sides, peak))
        else:
            theirs = kernels if name in ("gather", "adam") else []
            sides = {"fastae": kernels, "eager": theirs, "compiled": theirs}
            choice = "triton" if name == "sum_partials" else "torch", "around the schedule"
            found.append(_row("around", "", "", name, choice, sides, peak))
        launches = {side: launches[side] + len(sides[side]) for side in SIDES}
    if casts:
        sides = {"fastae": [], "eager": casts, "compiled": casts}
        found.append(_row("around", "", "", "autocast", ("torch", "of parameters and gradients"), sides, peak))
        launches = {side: launches[side] + len(sides[side]) for side in SIDES}
    touched = rows * (width + 2 * sum(s.N for s in shapes.values())) * dtype.itemsize + 4 * parameters * wide.itemsize
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
