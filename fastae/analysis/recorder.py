"""The ops of a training step in the order in which `StaticStep` calls them, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from fastae_kernels.elementwise import accumulator
from fastae_kernels.noise import Dropout
from fastae_kernels.ops import Below, Ops
from fastae_kernels.reference import TORCH
from fastae_kernels.sampling import Sample as SampleOf
from torch import Tensor, nn

from fastae.analysis.cost import Kernel, OpCounter, sum_kernel, triton_kernel
from fastae.engine.program import Dense, Module, Penalise, Program, Sample, Stage, layer_of
from fastae.engine.static_step import Choice, StaticStep

Recorded = tuple[str, str, list[Kernel]]  # op, its stage or "", what it launches


class RecordingOps:
    """An implementation of the ops whose calls are written down; those of the kernels are not launched."""

    def __init__(self, ops: Ops, kernels: bool, stage: str, log: list[Recorded], ran: OpCounter) -> None:
        self.ops, self.kernels, self.stage, self.log, self.ran = ops, kernels, stage, log, ran

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(self.ops, name) if name.startswith("fits_") else partial(self._record, name)

    def _record(self, name: str, *args: Any, **options: Any) -> Any:
        kernels, before = self.ran.kernels, len(self.ran.kernels)
        if name == "sum_partials":
            kernels.append(sum_kernel(args[0]))
            return None
        result = self._kernel(name, args) if self.kernels else getattr(self.ops, name)(*args, **options)
        self.log.append((name, self.stage, kernels[before:]))
        del kernels[before:]
        return result

    def _kernel(self, name: str, args: Sequence[Any]) -> Any:
        """Return what an op of the kernels returns, and leave `pending` as it does, without launching it."""
        before, pending = len(self.ran.kernels), None
        if name in ("linear_wgrad", "linear_act_loss", "decoder_loss"):
            *args, pending = args
        if name == "linear_wgrad" and args[4] is not None:
            result: Any = args[4][0], args[4][1] if args[2] else None
        else:  # the twin gives the same shapes; of a scale it would ask the number
            shaped = [None if isinstance(a, Tensor) and a.dim() == 0 else _drawn(a, args[0]) for a in args]
            result = getattr(TORCH, name)(*shaped)
        kernel, parts = triton_kernel(name, args, result[:3] if name == "linear_sample" else result)
        self.ran.kernels[before:] = [kernel]
        if pending is not None:
            pending += parts
        elif parts:
            self.ran.kernels.append(sum_kernel(parts))
        return result


def recorded(
    program: Program, chosen: Sequence[Choice], rows: int, dtype: torch.dtype, device: torch.device
) -> list[Recorded]:
    """The ops of a step of the program, and what it runs around them."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    log, ran = list[Recorded](), OpCounter()
    backends = {stage.name: backend for stage, (backend, _) in zip(program.stages, chosen, strict=True)}

    def wrap(ops: Ops, stage: str) -> Ops:
        return cast(Ops, RecordingOps(ops, backends.get(stage) == "triton", stage, log, ran))

    where = device if device.type == "cpu" else "meta"  # CUDA's own need a build that has it
    with FakeTensorMode(), torch.no_grad():
        step = StaticStep(_without_memory(program, where), rows, dtype, chosen, wrap)
        ran.kernels.clear()
        with ran:
            step.compute(step.memory)
    islands: list[Recorded] = [("module", s.name, []) for s in program.stages if isinstance(s, Module)]
    return [*log, *islands, *((kernel.name, "", [kernel]) for kernel in ran.kernels)]


def _drawn(argument: Any, x: Tensor) -> Any:
    """An argument of an op without random numbers to be counted out: nothing is computed."""
    if isinstance(argument, Dropout):
        return None
    if isinstance(argument, Below):
        return argument._replace(dropout=None)
    if isinstance(argument, SampleOf):
        drawn = x.new_empty(len(x), argument.width, dtype=accumulator(x))
        return argument._replace(key=argument.key._replace(drawn=(drawn,)))
    return argument


class _Shaped(nn.Module):
    """Stands for an island: a result of its shape, and a parameter, for the only stage has to have one."""

    def __init__(self, width: int, like: Tensor, device: torch.device | str) -> None:
        super().__init__()
        self.width, self.parameter = width, nn.Parameter(torch.empty(0, dtype=like.dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand(len(x), self.width)


def _width_before(stage: Stage) -> int:
    """The width that a stage above an island takes."""
    layer = layer_of(stage)
    if layer is not None:
        return layer.widths[0]
    assert isinstance(stage, Sample | Penalise), "islands that meet are one"
    return stage.width if isinstance(stage, Penalise) else 2 * stage.width


def _without_memory(program: Program, device: torch.device | str) -> Program:
    """The same stages on parameters without memory; an island is a module of its width."""
    made: dict[int, nn.Parameter] = {}

    def empty(p: nn.Parameter) -> nn.Parameter:
        if id(p) not in made:
            memory = torch.empty(p.shape, dtype=p.dtype, device=device)
            made[id(p)] = nn.Parameter(memory, p.requires_grad)
        return made[id(p)]

    def without(layer: Dense) -> Dense:
        return layer._replace(weight=empty(layer.weight), bias=None if layer.bias is None else empty(layer.bias))

    stages = list[Stage]()
    for i, stage in enumerate(program.stages):
        if isinstance(stage, Dense):
            stages.append(without(stage))
        elif isinstance(stage, Sample):
            stages.append(stage._replace(dense=None if stage.dense is None else without(stage.dense)))
        elif isinstance(stage, Penalise):
            stages.append(stage)
        else:
            width = _width_before(program.stages[i + 1]) if i + 1 < len(program.stages) else program.out_features
            stages.append(Module(stage.name, _Shaped(width, program.parameters[0], device)))
    its = program.loss_parameter
    its = None if its is None else empty(its)
    return program._replace(stages=tuple(stages), own_loss=None, loss_parameter=its, contraction=None)
