"""The parameters of a step: their copies in its dtype, memory for their gradients, and the way of those to `.grad`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from fastae_kernels.ops import Ops
from torch import Tensor, nn

from fastae.engine.program import Module, Program, layer_of
from fastae.engine.stages import Gradients

SECTOR = 32  # bytes, the least that a GPU fetches
PADDED = 32  # values of which padded rows have a multiple: whole sectors, and tiles wide enough for 16 bytes a thread
ALIGNMENT = 32  # elements from one gradient to the next in a flat buffer are a multiple: 64 bytes in bf16


class StepParameters:
    """The parameters of a program that computes in `dtype`.

    In the parameters' own dtype the weights are the parameters and the gradients are their `.grad`; in another the
    weights are copies in one piece of memory. The kernels write gradients in the parameters' dtype all the same; the
    twins write copies of them too. Where all stages are the kernels' and a width is not a multiple of 32 bytes, rows
    and columns of the copies are padded with zeros: rows that are not multiples of 16 bytes cannot be copied
    asynchronously. A gradient has its parameter's strides; a parameter in several places gets the sum.

    loss, dloss: the loss's own parameter and its gradient, fp32 (fp64 for fp64) whatever the step computes in; None
    where there is none, or no gradient is wanted.
    """

    def __init__(self, program: Program, dtype: torch.dtype, kernels: bool) -> None:
        self.dense = [layer for layer in map(layer_of, program.stages) if layer is not None]
        islands = [stage.module for stage in program.stages if isinstance(stage, Module)]
        uses = [
            (p, stage.transposed and k == 0)
            for stage in self.dense
            for k, p in enumerate((stage.weight, stage.bias))
            if p is not None
        ]
        self.parameters = list(dict.fromkeys(p for p, _ in uses))
        by_autograd = dict.fromkeys(p for p in program.parameters if p.requires_grad)
        self.by_autograd = list(by_autograd)
        own = [p for p in self.parameters if p.requires_grad]
        held = program.loss_parameter
        its = [held] if held is not None and held.requires_grad else []
        first = [*own, *its]
        self.trainable: list[nn.Parameter] = [*first, *(p for p in by_autograd if p not in set(first))]
        self._also = [p in by_autograd for p in first]
        self.loss: Tensor | None = None
        self.dloss: Tensor | None = None
        self._held, self._given = held, list[Tensor]()
        if held is not None:
            wide = torch.promote_types(dtype, torch.float32)
            self.loss = held if held.dtype == wide else held.detach().to(wide)
            self.dloss = torch.zeros_like(self.loss.detach()) if its else None
            self._given = [torch.empty_like(p) for p in its if p.dtype != self.loss.dtype]
        self._kernels, self._copies = kernels, list[Tensor]()
        used: dict[nn.Parameter, Tensor] = {p: p for p in self.parameters}
        like = next(iter(self.parameters), None)
        widths = [n for stage in self.dense for n in stage.widths]
        self.padded = kernels and not islands and any(n * dtype.itemsize % SECTOR for n in widths)
        step = PADDED if self.padded else 1
        if like is not None and (dtype != like.dtype or self.padded):
            shapes = [[-(-n // step) * step for n in p.shape] for p in self.parameters]
            _, self._copies = _flat(shapes, dtype, like)
            used.update(zip(self.parameters, self._copies, strict=True))
        self._narrow: Tensor | None = None
        self._gradients = gradients = list[Tensor]()
        if like is not None:
            self._wide, self._gradients = _flat_like(own, like.dtype)
            gradients = self._gradients
            if dtype != like.dtype and not kernels:
                self._narrow, gradients = _flat_like(own, dtype)
        self._made = gradients
        # Where each use of a parameter writes its gradient: the first into the parameter's own, if that is contiguous
        memory, self._sums = dict(zip(own, gradients, strict=True)), list[tuple[int, int, bool, bool]]()
        order, places, seen = {p: i for i, p in enumerate(own)}, list[Tensor | None](), set[Tensor]()
        for number, (p, transposed) in enumerate(uses):
            if p not in memory:
                places.append(None)
                continue
            direct = p not in seen and not transposed and memory[p].is_contiguous()
            shape = p.shape[::-1] if transposed else p.shape
            places.append(memory[p] if direct else memory[p].new_empty(shape))
            self._sums.append((order[p], number, transposed, p in seen))
            seen.add(p)
        self._direct = [place is not None and any(place is m for m in gradients) for place in places]
        self.weights, self.biases = list[Tensor](), list[Tensor | None]()
        self.needs, self.places = list[tuple[bool, bool]](), list[tuple[Tensor, Tensor | None] | None]()
        given = iter(places)
        for stage in self.dense:
            w = used[stage.weight]
            self.weights.append(w.t() if stage.transposed else w)
            self.biases.append(None if stage.bias is None else used[stage.bias])
            self.needs.append((stage.weight.requires_grad, stage.bias is not None and stage.bias.requires_grad))
            dw, db = next(given), None if stage.bias is None else next(given)
            self.places.append(None if dw is None else (dw, db))

    def refresh(self, sums: Ops) -> None:
        """Bring the copies of the parameters up to date."""
        if self._held is not None and self.loss is not None and self.loss is not self._held:
            self.loss.copy_(self._held)
        if not self._copies:
            return
        if self._kernels:
            sums.sum_partials([(p[None], copy) for p, copy in zip(self.parameters, self._copies, strict=True)])
        else:
            torch._foreach_copy_(self._copies, list[Tensor](self.parameters))

    def collect(self, grads: Sequence[Gradients]) -> list[Tensor]:
        """The gradients of the dense stages' parameters and the loss's, in their own dtype, from (dw, db) of every
        dense stage."""
        return [*self._collected(grads), *self._of_loss()]

    def _of_loss(self) -> list[Tensor]:
        if self.dloss is None:
            return []
        return [self._given[0].copy_(self.dloss)] if self._given else [self.dloss]

    def _collected(self, grads: Sequence[Gradients]) -> list[Tensor]:
        flat = [
            grad for stage, pair in zip(self.dense, grads, strict=True)
            for grad in (pair if stage.bias is not None else pair[:1])
        ]  # fmt: skip
        found = list(self._made)
        for place, use, transposed, again in self._sums:
            grad = flat[use]
            assert grad is not None
            made = grad.t() if transposed else grad
            if again:
                found[place].add_(made)
            elif self._direct[use]:
                found[place] = made  # which oneDNN may have put elsewhere
            else:
                found[place].copy_(made)
        if self._narrow is None:
            return found
        self._wide.copy_(self._narrow)
        return self._gradients

    def begin(self) -> None:
        """Take away the gradients that autograd is to make anew."""
        for p in self.by_autograd:
            p.grad = None

    def publish(self, found: list[Tensor]) -> Sequence[Tensor | None]:
        """Put what was collected into `.grad`, added to what islands made; the gradients of `trainable`."""
        if self.by_autograd:
            for p, grad, also in zip(self.trainable, found, self._also, strict=False):
                if also and p.grad is not None:
                    grad.add_(p.grad)
                p.grad = grad
            return [p.grad for p in self.trainable]
        for p, grad in zip(self.trainable, found, strict=True):
            if p.grad is not grad:
                p.grad = grad
        return found


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in any order of axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(t))


def _flat_like(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """`_flat` in the parameters' shapes, with their strides where those fill memory, as autograd does it."""
    memory, views = _flat([[p.numel()] for p in parameters], dtype, parameters[0] if parameters else torch.empty(0))
    return memory, [
        view.as_strided(p.shape, p.stride()) if is_dense(p) else view.view(p.shape)
        for view, p in zip(views, parameters, strict=True)
    ]


def _flat(shapes: Sequence[Sequence[int]], dtype: torch.dtype, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, all 0, and views of it in those shapes, each beginning at a multiple of 64 bytes."""
    sizes = [math.prod(shape) for shape in shapes]
    ends = list(accumulate(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes))
    memory = torch.zeros(ends[-1] if ends else 0, dtype=dtype, device=like.device)
    starts = [0, *ends[:-1]]
    return memory, [
        memory[start : start + size].view(*shape) for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
