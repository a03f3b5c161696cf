"""The layers of an autoencoder as the schedule takes them: which are plain, their weights, where gradients go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastae.engine.schedule import Plan
from fastae.nn.backend import Elsewhere, decide
from fastae.nn.linear_act import LinearAct
from fastae.nn.tied_linear_act import TiedLinearAct

if TYPE_CHECKING:
    from fastae.models.dense import DenseAutoencoder

Layer = LinearAct | TiedLinearAct
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
SECTOR = 32  # bytes, the least that a GPU fetches
PADDED = 32  # values of which padded rows have a multiple: whole sectors, and tiles wide enough for 16 bytes a thread
ALIGNMENT = 32  # elements from one gradient to the next in a flat buffer are a multiple: 64 bytes in bf16


def layers_of(model: DenseAutoencoder) -> list[Layer]:
    """First to last."""
    return [*model.encoder, *model.decoder]


def why_not_plain(model: DenseAutoencoder) -> str | None:
    """None if the layers are as the constructor made them and nobody listens to their calls, or what is not so."""
    if torch.nn.modules.module._has_any_global_hook():
        return "a global module hook is set"
    for module in (model, model.encoder, model.decoder, *layers_of(model)):
        kind = type(module)
        if any(vars(module)[hooks] for hooks in _HOOKS):
            return f"a {kind.__name__} has a hook"
        if kind in (LinearAct, TiedLinearAct):
            odd = next((p for p in vars(module)["_parameters"].values() if p is not None and not _is_plain(p)), None)
            if odd is not None:
                return f"a parameter of a {kind.__name__} is a {type(odd).__name__} of {type(odd.data).__name__}"
            if "forward" in vars(module):
                return f"a {kind.__name__} has a forward of its own"
        elif kind is not nn.Sequential and module is not model:
            return f"a layer is a {kind.__name__}"
    return None


def _is_plain(p: Tensor) -> bool:
    return type(p) is nn.Parameter and type(p.data) is Tensor


def weight_of(layer: Layer) -> Tensor:
    """[out_features, in_features]; of a tied layer the encoder's weight, transposed."""
    return layer.source.weight.t() if isinstance(layer, TiedLinearAct) else layer.weight


def choices_of(layers: Sequence[Layer], x: Tensor | Elsewhere, rows: int, loss: bool = True) -> list[tuple[str, str]]:
    """(implementation, why) of every layer, for that many rows like x; the `loss` is taken of the last."""
    last = layers[-1] if loss else None
    return [
        decide(x, layer.in_features, rows * layer.in_features * layer.out_features, layer is last) for layer in layers
    ]


def plan_of(layers: Sequence[Layer], x: Tensor, rows: int, loss: bool = True) -> Plan:
    """Activations and implementations, for that many rows like x; the `loss` is taken of the last."""
    choices = choices_of(layers, x, rows, loss)
    return Plan([layer.activation for layer in layers], [backend for backend, _ in choices])


class Lowered:
    """The layers of a training step that computes in `dtype`: weights, memory for gradients, and their way to `.grad`.

    In the parameters' own dtype the weights are the parameters and the gradients are their `.grad`; in another the
    weights are copies in one piece of memory. The kernels write gradients in the parameters' dtype all the same; the
    twins write copies of them too. Where a width is not a multiple of 32 bytes, kernels get copies whose rows and
    columns are filled up with zeros: rows that are not multiples of 16 bytes cannot be copied asynchronously.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, rows: int, plan: Plan | None = None) -> None:
        sources = [layer.source if isinstance(layer, TiedLinearAct) else layer for layer in layers]
        pairs = [(source.weight, layer.bias) for source, layer in zip(sources, layers, strict=True)]
        parameters = list(dict.fromkeys(p for pair in pairs for p in pair if p is not None))
        self.trainable = [p for p in parameters if p.requires_grad]
        self.features = layers[0].in_features, layers[-1].out_features  # of x and of the target
        self.plan = plan or plan_of(layers, parameters[0].new_empty(0, dtype=dtype), rows)
        self.parameters, self._copies = parameters, list[Tensor]()
        self._kernels = set(self.plan.backends) == {"triton"}
        used, own = dict(zip(parameters, parameters, strict=True)), parameters[0].dtype
        widths = [n for layer in layers for n in (layer.in_features, layer.out_features)]
        padded = self._kernels and any(n * dtype.itemsize % SECTOR for n in widths)
        step = PADDED if padded else 1
        if dtype != own or padded:
            _, self._copies = _flat([[-(-n // step) * step for n in p.shape] for p in parameters], dtype, parameters[0])
            used = dict(zip(parameters, self._copies, strict=True))
        if padded:
            self.plan = replace(self.plan, features=layers[-1].out_features)
        shapes = [p.shape for p in self.trainable]
        self._wide, self._gradients = _flat(shapes, own, parameters[0])
        self._narrow, gradients = None, self._gradients
        if dtype != own and not self._kernels:
            self._narrow, gradients = _flat(shapes, dtype, parameters[0])
        tied = [isinstance(layer, TiedLinearAct) for layer in layers]
        self.weights = [used[w].t() if transposed else used[w] for (w, _), transposed in zip(pairs, tied, strict=True)]
        self.biases = [None if b is None else used[b] for _, b in pairs]
        self.needs = [(w.requires_grad, b is not None and b.requires_grad) for w, b in pairs]
        memory = dict(zip(self.trainable, gradients, strict=True))
        # A tied weight has two gradients; the decoder's has memory of its own and is added to the encoder's.
        self.buffers = [
            None
            if w not in memory
            else (
                torch.empty_like(memory[w]).t().contiguous() if transposed else memory[w],
                None if b is None else memory.get(b),
            )
            for (w, b), transposed in zip(pairs, tied, strict=True)
        ]
        places = {
            p: (i, k) for i, pair in reversed(list(enumerate(pairs))) for k, p in enumerate(pair) if p is not None
        }
        self._places = [places[p] for p in self.trainable]
        order = {p: i for i, p in enumerate(self.trainable)}
        self._ties = [(order[w], i) for i, (w, _) in enumerate(pairs) if tied[i] and w in order]

    def refresh(self) -> None:
        """Bring the copies of the parameters up to date."""
        if not self._copies:
            return
        if self._kernels:
            self.plan.sum_together([(p[None], copy) for p, copy in zip(self.parameters, self._copies, strict=True)])
        else:
            torch._foreach_copy_(self._copies, self.parameters)

    def collect(self, grads: Sequence[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
        """The gradients of `trainable`, in the parameters' dtype, from (dw, db) of every layer."""
        found: list[Tensor] = [grads[layer][which] for layer, which in self._places]  # type: ignore[misc]
        for index, layer in self._ties:
            found[index].add_(grads[layer][0].t())  # type: ignore[union-attr]
        if self._narrow is None:
            return found
        self._wide.copy_(self._narrow)
        return self._gradients

    def publish(self, found: Sequence[Tensor]) -> None:
        """Put what was collected into `.grad`."""
        for p, grad in zip(self.trainable, found, strict=True):
            if p.grad is not grad:
                p.grad = grad


def _flat(shapes: Sequence[Sequence[int]], dtype: torch.dtype, like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, all 0, and views of it in those shapes, each beginning at a multiple of 64 bytes."""
    sizes = [math.prod(shape) for shape in shapes]
    ends = list(accumulate(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes))
    memory = torch.zeros(ends[-1] if ends else 0, dtype=dtype, device=like.device)
    starts = [0, *ends[:-1]]
    return memory, [
        memory[start : start + size].view(*shape) for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
