"""The training step of a stack of layers as one list of kernel calls, the same for autograd and for `TrainStep`.

Forward: L - 1 `linear_act_fwd` and one `linear_act_mse`, or `decoder_mse`. Backward: L `linear_wgrad` and L - 1
`linear_dgrad_act`, L - 2 after `decoder_mse`; what the kernels leave to be summed is summed in one launch at the end.
The gradients between layers lack the loss's 2 / n and what stands above the loss; all is linear in both, so each
`linear_wgrad` puts them in, in its accumulator: no fp16 gradient vanishes between layers, and no multiplication is a
pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastae_kernels.reference import ACTIVATIONS, Pending
from torch import Tensor

from fastae.nn.backend import op


@dataclass(frozen=True)
class Plan:
    """What the schedule needs to know of the layers, first to last."""

    activations: Sequence[str]
    backends: Sequence[str]
    features: int | None = None  # columns of the output that count, where rows of memory are longer

    def __len__(self) -> int:
        return len(self.activations)

    def ops(self, name: str) -> list[Callable[..., Any]]:
        """The implementation of an op in every layer."""
        if name not in self._ops:
            self._ops[name] = [op(backend, name) for backend in self.backends]
        return self._ops[name]

    def sum_together(self, pairs: Pending) -> None:
        """For each pair (src [R, ...], dst): dst = src.sum(0), in one launch of the kernels."""
        op("triton", "sum_together")(pairs)

    @cached_property
    def _ops(self) -> dict[str, list[Callable[..., Any]]]:
        return {}

    @cached_property
    def saves(self) -> list[str | None]:
        """What f' of every layer is written from: "y", "p" or nothing."""
        return [ACTIVATIONS[activation].saves for activation in self.activations]

    def makes_dx(self, last_weight: Tensor, below: bool) -> bool:
        """Whether the last layer's kernel makes the gradient of the layer below as well."""
        if not below or len(self) == 1 or self.backends[-1] != "triton":
            return False
        from fastae_kernels.jit.linear_act_loss import fits_decoder_mse

        return fits_decoder_mse(last_weight.shape[1], last_weight.dtype)

    def whole(self, weights: Sequence[Tensor]) -> str | None:
        """The backend that takes rows through all layers in one call, if one does."""
        if "triton" not in self.backends:
            return "onednn" if "onednn" in self.backends else "torch"
        from fastae_kernels.jit.stack import fits_stack_score

        dims = [weights[0].shape[1], *(w.shape[0] for w in weights)]
        return "triton" if set(self.backends) == {"triton"} and fits_stack_score(dims, weights[0].dtype) else None


@dataclass
class Buffers:
    """Memory for the results of a step on up to `len(x)` rows; with `None` in it, results are fresh."""

    outputs: Sequence[tuple[Tensor, Tensor | None] | None]  # y, and p where it is kept, of every layer but the last
    gradients: Sequence[Tensor | None]  # dp of every layer, [M, N]
    scratch: Tensor | None  # in half precision on a CPU, fp32 of the last dp's shape
    loss: Tensor | None  # []
    parameters: Sequence[tuple[Tensor, Tensor | None] | None]  # (dw [N, K], db [N]) of every layer


@dataclass
class Activity:
    """What the forward pass leaves for the backward pass."""

    loss: Tensor  # [], there once what is `pending` has been summed
    dp: Tensor  # of the last layer, without the loss's 2 / n
    dx: Tensor | None  # of the layer below it, if `decoder_mse` has made it
    inputs: list[Tensor] = field(default_factory=list)  # of every layer; the first is x
    kept: list[Tensor | None] = field(default_factory=list)  # p of every layer but the last, where f' is written from p
    pending: Pending = field(default_factory=list)

    def saved(self, layer: int, plan: Plan) -> Tensor | None:
        """What f' of a layer below the last is written from."""
        saves = plan.saves[layer]
        return None if saves is None else self.inputs[layer + 1] if saves == "y" else self.kept[layer]


def forward(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    plan: Plan,
    buffers: Buffers,
    below: bool,
    later: bool = False,
) -> Activity:
    """The mean squared error of the stack's output against target [M, N].

    `below`: whether x or a layer below the last needs a gradient. `later`: whether the loss may wait for `backward`.
    """
    inputs, kept, h = [x], list[Tensor | None](), x
    pending = Pending() if later else None
    last = len(plan) - 1
    for layer, fwd in enumerate(plan.ops("linear_act_fwd")[:-1]):
        keep_p = below and plan.saves[layer] == "p"
        h, p = fwd(h, weights[layer], biases[layer], plan.activations[layer], keep_p, buffers.outputs[layer])
        inputs.append(h)
        kept.append(p)
    args = h, weights[last], biases[last], target, plan.activations[last], "mean"
    if not plan.makes_dx(weights[last], below):
        end = plan.ops("linear_act_mse")[last]
        out = buffers.gradients[last], buffers.scratch, buffers.loss
        loss, dp, _ = end(*args, need_dp=True, features=plan.features, out=out, pending=pending)
        return Activity(loss, dp, None, inputs, kept, pending or [])
    below_it = h if plan.saves[last - 1] == "y" else kept[-1], plan.activations[last - 1]
    loss, dp, dx = plan.ops("decoder_mse")[last](*args, *below_it, features=plan.features, pending=pending)
    return Activity(loss, dp, dx, inputs, kept, pending or [])


def backward(
    activity: Activity,
    weights: Sequence[Tensor],
    plan: Plan,
    buffers: Buffers,
    needs: Sequence[tuple[bool, bool]],
    scale: Tensor | float | None,
    need_dx: bool = False,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """dx [M, K] and (dw, db) of every layer, as far as asked for.

    `scale` [] is the gradient above the loss times 2 / n; None if `activity.dp` holds it already.
    """
    grads: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(plan)
    lowest = 0 if need_dx else next((layer for layer, need in enumerate(needs) if any(need)), len(plan))
    dp, pending = activity.dp, activity.pending
    wgrad, dgrad = plan.ops("linear_wgrad"), plan.ops("linear_dgrad_act")
    for layer in range(len(plan) - 1, lowest - 1, -1):
        need_dw, need_db = needs[layer]
        if need_dw:
            grads[layer] = wgrad[layer](dp, activity.inputs[layer], need_db, scale, buffers.parameters[layer], pending)
        elif need_db:
            db = plan.ops("act_bwd")[layer](dp, None, "identity", True)[1]
            grads[layer] = None, db if scale is None else db.mul_(scale)
        if layer == lowest:
            break
        if layer == len(plan) - 1 and activity.dx is not None:
            dp = activity.dx
        else:
            lower = layer - 1
            below = activity.saved(lower, plan), plan.activations[lower], buffers.gradients[lower]
            dp = dgrad[layer](dp, weights[layer], *below)
    if pending:  # which only the kernels leave
        plan.sum_together(pending)
    if not need_dx:
        return None, grads
    dx = dgrad[0](dp, weights[0], None, "identity")
    return dx if scale is None else dx.mul_(scale), grads


def fresh(layers: int) -> Buffers:
    """No buffers: every result is a tensor of its own."""
    return Buffers([None] * layers, [None] * layers, None, None, [None] * layers)
