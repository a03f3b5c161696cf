"""One step of an optimizer at the least cost on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

# What `Optimizer.step` does around the update of eight small parameters takes 0.05 ms, the update itself 0.01.
PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False, "fused": True}


def update_of(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Callable[[list[Tensor]], object]:
    """A function that steps `optimizer` with the gradients of `parameters`, which have them in `.grad` as well.

    For a fused `Adam` or `AdamW` on a CPU it calls the update itself; the optimizer's state is the one it would have.
    """
    if _is_plain(optimizer, parameters):
        return _AdamUpdate(optimizer, parameters)
    return lambda _: optimizer.step()


def _is_plain(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether the optimizer does what `_AdamUpdate` does, to these parameters."""
    if type(optimizer) not in (Adam, AdamW) or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    return (
        not isinstance(group["lr"], Tensor)
        and all(group[option] == value for option, value in PLAIN.items())
        and [id(p) for p in group["params"] if p.requires_grad] == [id(p) for p in parameters]
        and all(p.device.type == "cpu" for p in parameters)
    )


class _AdamUpdate:
    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.run = torch._fused_adamw_ if optimizer.param_groups[0]["decoupled_weight_decay"] else torch._fused_adam_
        self.steps = torch.zeros(len(parameters))
        self.step_of: list[Tensor] = []
        self.average: list[Tensor] = []
        self.average_of_squares: list[Tensor] = []

    def __call__(self, gradients: list[Tensor]) -> object:
        optimizer = self.optimizer
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer):
            return optimizer.step()  # someone listens; a learning-rate scheduler replaces `step` itself
        first = optimizer.state.get(self.parameters[0])
        if not self.step_of or first is None or first["step"] is not self.step_of[0]:
            self._bind()
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        self.steps.add_(1)
        return self.run(
            self.parameters, gradients, self.average, self.average_of_squares, [], self.step_of,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def _bind(self) -> None:
        """Make the optimizer's state or take it over; its steps become views of one tensor: one addition counts all."""
        states: list[dict[str, Any]] = [self.optimizer.state[p] for p in self.parameters]
        for p, state, step in zip(self.parameters, states, self.steps, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            step.copy_(state["step"])
            state["step"] = step
        self.step_of = [state["step"] for state in states]
        self.average = [state["exp_avg"] for state in states]
        self.average_of_squares = [state["exp_avg_sq"] for state in states]
