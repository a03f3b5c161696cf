"""The ops of a training step in the order in which `TrainStep` calls them, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fastae_kernels.reference import Pending
from torch import Tensor

from fastae.analysis.cost import Counted, Kernel, sum_kernel, triton_kernel
from fastae.engine import schedule as _schedule
from fastae.engine.parameters import Layer, Lowered
from fastae.engine.train_step import TrainStep, _Memory
from fastae.nn.backend import op
from fastae.nn.linear_act import LinearAct
from fastae.nn.tied_linear_act import TiedLinearAct

Recorded = tuple[str, int | None, list[Kernel]]  # op, its layer or None, what it launches


@dataclass(frozen=True)
class Recorder(_schedule.Plan):
    """A plan whose ops are written down as they are called on tensors without memory."""

    recorded: list[Recorded] = field(default_factory=list)
    ran: Counted = field(default_factory=Counted)

    def ops(self, name: str) -> list[Callable[..., Any]]:
        return [partial(self._record, name, layer) for layer in range(len(self))]

    def sum_together(self, pairs: Pending) -> None:
        self.ran.kernels.append(sum_kernel(pairs))

    def _record(self, name: str, layer: int, *args: Any, **options: Any) -> Any:
        kernels, before = self.ran.kernels, len(self.ran.kernels)
        if self.backends[layer] == "triton":
            result = self._kernel(name, args, options)
        else:
            result = op(self.backends[layer], name)(*args, **options)
        self.recorded.append((name, layer, kernels[before:]))
        del kernels[before:]
        return result

    def _kernel(self, name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """What a Triton op returns and leaves `pending`, without launching it."""
        before = len(self.ran.kernels)
        if name == "linear_wgrad" and args[4] is not None:
            result: Any = args[4][0], args[4][1] if args[2] else None
        else:  # the twin gives the same shapes; of a scale it would ask the number
            shaped = [None if isinstance(a, Tensor) and a.dim() == 0 else a for a in args]
            result = op("torch", name)(*shaped, **options)
        pending = args[5] if name == "linear_wgrad" else options.get("pending")
        kernel, parts = triton_kernel(name, args[:5] if name == "linear_wgrad" else args, result)
        self.ran.kernels[before:] = [kernel]
        if pending is not None:
            pending += parts
        elif parts:
            self.sum_together(parts)
        return result


def recorded(
    plan: Recorder, layers: Sequence[Layer], rows: int, dtype: torch.dtype, device: torch.device
) -> list[Recorded]:
    """The ops of a `TrainStep`'s own computation, and what it runs around them."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    where = device if device.type == "cpu" else "meta"  # CUDA's own need a build that has it
    with FakeTensorMode(), torch.no_grad():
        step = TrainStep.__new__(TrainStep)  # the constructor refuses parameters without memory
        step._layers = Lowered(_without_memory(layers, where), dtype, rows, plan)
        step._below = any(any(need) for need in step._layers.needs[:-1])
        memory = _Memory(step._layers, rows)
        memory.denoises = False
        plan.ran.kernels.clear()
        with plan.ran:
            step._schedule(memory)
    return [*plan.recorded, *((kernel.name, None, [kernel]) for kernel in plan.ran.kernels)]


def _without_memory(layers: Sequence[Layer], device: torch.device | str) -> list[Layer]:
    made: dict[int, Layer] = {}
    for layer in layers:
        if isinstance(layer, TiedLinearAct):
            source = made[id(layer.source)]
            assert isinstance(source, LinearAct)
            made[id(layer)] = TiedLinearAct(source, layer.activation)
        else:
            sizes = layer.in_features, layer.out_features, layer.bias is not None, layer.activation
            made[id(layer)] = LinearAct(*sizes, device="meta")
        for name, own in list(layer.named_parameters()):
            empty = torch.empty(own.shape, dtype=own.dtype, device=device)
            setattr(made[id(layer)], name, torch.nn.Parameter(empty, own.requires_grad))
    return list(made.values())
