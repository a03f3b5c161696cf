"""The training step of a list of stages, the same for autograd and for `StaticStep`.

Of dense layers: L - 1 `linear_act_fwd` and one `linear_act_loss`, or `decoder_loss`; L `linear_wgrad` and L - 1
`linear_dgrad_act`, L - 2 after `decoder_loss`; what the kernels leave to be summed is summed in one launch at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastae_kernels.ops import Criterion, Ops, Pending
from torch import Tensor

from fastae.engine.stages import NOTHING_BELOW, BoundStage, Gradients, Kept, Place, Scale


@dataclass(eq=False, repr=False)
class ForwardState:
    """Results of the forward pass that the backward pass needs."""

    loss: Tensor  # [], there once what is `pending` has been summed
    dp: Tensor  # the gradient that reaches the last stage, without the loss's scale
    dx: Tensor | None  # that of the stage below it, if `decoder_loss` has made it
    kept: list[Kept]
    pending: Pending = field(default_factory=list)


def forward(
    stages: Sequence[BoundStage],
    x: Tensor,
    target: Tensor,
    criterion: Criterion,
    places: Sequence[Place],
    hidden_grad: bool,
    defer_loss: bool = False,
) -> ForwardState:
    """The loss of the last stage's output against target [M, N].

    hidden_grad: whether x or a stage below the last needs a gradient. defer_loss: whether the loss may wait for
    `backward`.
    """
    kept, h = list[Kept](), x
    pending = Pending() if defer_loss else None
    for stage, place in zip(stages[:-1], places, strict=False):
        kept.append(stage.forward(h, hidden_grad, place))
        h = kept[-1].y
    penalty = next((k.penalty for k in kept if k.penalty is not None), None)
    criterion = criterion if penalty is None else criterion._replace(penalty=penalty)
    last = stages[-1]
    below = stages[-2].below(kept[-1]) if hidden_grad and kept else None
    loss, last_kept, dp, dx = last.loss(h, target, criterion, below, places[-1], pending)
    return ForwardState(loss, dp, dx, [*kept, last_kept], pending or [])


def backward(
    state: ForwardState,
    stages: Sequence[BoundStage],
    places: Sequence[Place],
    scale: Scale,
    sums: Ops,
    need_dx: bool = False,
) -> tuple[Tensor | None, list[Gradients]]:
    """dx [M, K] and the gradients of every stage's parameters, as far as asked for.

    scale: [], the gradient above the loss times the loss's scale; None if `state.dp` holds it already.
    sums: the implementation that adds what the kernels leave.
    """
    grads: list[Gradients] = [(None, None)] * len(stages)
    last = len(stages) - 1
    lowest = 0 if need_dx else next((i for i, stage in enumerate(stages) if any(stage.needs)), len(stages))
    dp, dx = state.dp, state.dx
    for i in range(last, lowest - 1, -1):
        below, out = None, None
        if i > lowest:
            below, out = stages[i - 1].below(state.kept[i - 1]), places[i - 1].dp
        elif need_dx:
            below = NOTHING_BELOW
        made, scale, grads[i] = stages[i].backward(
            state.kept[i], dp, dx if i == last else None, scale, below, out, state.pending
        )
        if made is not None:
            dp = made
    if state.pending:  # which only the kernels leave
        sums.sum_partials(state.pending)
    if not need_dx:
        return None, grads
    return dp if scale is None else dp.mul_(scale), grads
