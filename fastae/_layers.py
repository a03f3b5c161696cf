"""The layers of an autoencoder as the schedule takes them: which are plain, their weights, where gradients go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastae._backend import Elsewhere, decide
from fastae._schedule import Plan
from fastae.linear_act import LinearAct
from fastae.tied import TiedLinearAct

if TYPE_CHECKING:
    from fastae.autoencoder import DenseAutoencoder

Layer = LinearAct | TiedLinearAct
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
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


def choices_of(layers: Sequence[Layer], x: Tensor | Elsewhere, rows: int) -> list[tuple[str, str]]:
    """(implementation, why) of every layer, for that many rows like x."""
    return [decide(x, layer.in_features, rows * layer.in_features * layer.out_features) for layer in layers]


def plan_of(layers: Sequence[Layer], x: Tensor, rows: int) -> Plan:
    """Activations and implementations, for that many rows like x."""
    return Plan([layer.activation for layer in layers], [backend for backend, _ in choices_of(layers, x, rows)])


class Lowered:
    """The layers of a training step that computes in `dtype`: weights, memory for gradients, and their way to `.grad`.

    In the parameters' own dtype the weights are the parameters and the gradients are their `.grad`; in another both are
    copies, each set in one piece of memory.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, rows: int) -> None:
        sources = [layer.source if isinstance(layer, TiedLinearAct) else layer for layer in layers]
        pairs = [(source.weight, layer.bias) for source, layer in zip(sources, layers, strict=True)]
        parameters = list(dict.fromkeys(p for pair in pairs for p in pair if p is not None))
        self.trainable = [p for p in parameters if p.requires_grad]
        self._parameters, self._copies = parameters, list[Tensor]()
        used = dict(zip(parameters, parameters, strict=True))
        _, gradients = _flat(self.trainable, parameters[0].dtype)
        self._gradients = gradients
        self._wide = self._narrow = torch.empty(0)
        if dtype != parameters[0].dtype:
            _, self._copies = _flat(parameters, dtype)
            used = dict(zip(parameters, self._copies, strict=True))
            self._wide, self._gradients = _flat(self.trainable, parameters[0].dtype)
            self._narrow, gradients = _flat(self.trainable, dtype)
        tied = [isinstance(layer, TiedLinearAct) for layer in layers]
        self.weights = [used[w].t() if transposed else used[w] for (w, _), transposed in zip(pairs, tied, strict=True)]
        self.biases = [None if b is None else used[b] for _, b in pairs]
        self.needs = [(w.requires_grad, b is not None and b.requires_grad) for w, b in pairs]
        self.plan = plan_of(layers, self.weights[0], rows)
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
        if self._copies:
            torch._foreach_copy_(self._copies, self._parameters)

    def publish(self, grads: Sequence[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
        """Put (dw, db) of every layer into `.grad`, in the parameters' dtype; return them in `trainable`'s order."""
        found: list[Tensor] = [grads[layer][which] for layer, which in self._places]  # type: ignore[misc]
        for index, layer in self._ties:
            found[index].add_(grads[layer][0].t())  # type: ignore[union-attr]
        if self._copies:
            self._wide.copy_(self._narrow)
            found = self._gradients
        for p, grad in zip(self.trainable, found, strict=True):
            if p.grad is not grad:
                p.grad = grad
        return found


def _flat(like: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and views of it in the shapes of `like`, each beginning at a multiple of 64 bytes."""
    ends = list(accumulate(math.ceil(t.numel() / ALIGNMENT) * ALIGNMENT for t in like))
    memory = torch.zeros(ends[-1] if ends else 0, dtype=dtype, device=like[0].device if like else None)
    return memory, [
        memory[end - math.ceil(t.numel() / ALIGNMENT) * ALIGNMENT :][: t.numel()].view(t.shape)
        for t, end in zip(like, ends, strict=True)
    ]
