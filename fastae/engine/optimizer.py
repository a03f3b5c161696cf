"""One step of an optimizer at the least cost on the host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor, is_tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as _optimizer

# What `Optimizer.step` does around the update of eight small parameters takes 0.05 ms, the update itself 0.01.
PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False, "fused": True}
_options_of, _PLAIN_VALUES = itemgetter(*PLAIN), tuple(PLAIN.values())
_tensors_of = itemgetter("step", "exp_avg", "exp_avg_sq")


class Update:
    """Steps an optimizer with the gradients of `parameters`, which have them in `.grad` as well.

    For a fused `Adam` or `AdamW` over these parameters on a CPU it calls the update itself; the optimizer's state is
    the one it would have. Whether that may be is asked at every step: options, hooks, groups and state can change.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], may_lack: bool = True) -> None:
        """may_lack: whether a gradient may be None."""
        self.optimizer, self.parameters, self._may_lack = optimizer, list(parameters), may_lack
        self._fits = (
            type(optimizer) in (Adam, AdamW) and bool(parameters) and all(p.device.type == "cpu" for p in parameters)
        )
        self._tensors: list[Any] = []
        self._members: list[Tensor] = []

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        if not self._is_plain() or (self._may_lack and not all(map(is_tensor, gradients))):
            self.optimizer.step()
            return
        if not self._is_bound():
            self._bind()
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        run = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        self._steps.add_(1)
        run(
            self.parameters, gradients, self._average, self._average_of_squares, [], self._step_of,
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # type: ignore[call-overload]  # fmt: skip

    def _is_plain(self) -> bool:
        """Whether `Optimizer.step` would do no more than the fused update of these parameters."""
        optimizer = self.optimizer
        if not self._fits or len(optimizer.param_groups) != 1:
            return False
        group = optimizer.param_groups[0]
        if (
            _options_of(group) != _PLAIN_VALUES
            or isinstance(group["lr"], Tensor)
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _optimizer._global_optimizer_pre_hooks
            or _optimizer._global_optimizer_post_hooks
            or "step" in vars(optimizer)  # a learning-rate scheduler wraps it
        ):
            return False
        members = group["params"]
        if len(members) != len(self._members) or not all(map(is_, members, self._members)):
            wanted = {id(p) for p in members if p.requires_grad}
            if wanted != {id(p) for p in self.parameters}:
                return False
            self._members = list(members)
        return True

    def _is_bound(self) -> bool:
        """Whether the optimizer's state is the memory that the update writes; `load_state_dict` replaces it."""
        try:
            states: Any = map(self.optimizer.state.get, self.parameters)
            found = chain.from_iterable(map(_tensors_of, states))
            return bool(self._tensors) and all(map(is_, found, self._tensors))
        except (TypeError, KeyError):  # a parameter has no state, or another optimizer's
            return False

    def _bind(self) -> None:
        """Make the optimizer's state or take it over; its steps become views of one tensor: one addition counts all."""
        self._steps = torch.zeros(len(self.parameters), dtype=torch.float32)  # as PyTorch's, whatever the default dtype
        states = [self.optimizer.state[p] for p in self.parameters]
        for p, state, step in zip(self.parameters, states, self._steps, strict=True):
            if not state:
                state["step"] = step
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            step.copy_(state["step"])
            state["step"] = step
        self._step_of = [state["step"] for state in states]
        self._average = [state["exp_avg"] for state in states]
        self._average_of_squares = [state["exp_avg_sq"] for state in states]
        self._tensors = list(chain.from_iterable(map(_tensors_of, states)))
