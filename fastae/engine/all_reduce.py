"""The mean of loss and gradients over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastae.engine.parameters import is_dense


class GradientAllReduce:
    """The mean of loss and gradients over all rows of a group of processes, in one all-reduce.

    Each process weighs by its rows. `DistributedDataParallel` weighs all the same, which is another mean where a batch
    does not divide by their number, and asks every process for a row.
    """

    def __init__(self, parameters: Sequence[Tensor], group: dist.ProcessGroup, extras: int = 0) -> None:
        """extras: how many other numbers are to be averaged in the same way."""
        self.parameters, self.group = parameters, group
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        sizes = [p.numel() for p in parameters]
        # gradients, for each parameter whether it has one, other numbers, the loss, and 1: times this process's rows,
        # those rows
        self._memory = torch.zeros(sum(sizes) + len(sizes) + extras + 2, dtype=dtype, device=parameters[0].device)
        *parts, self._present, self.extra, _, _ = self._memory.split([*sizes, len(sizes), extras, 1, 1])
        self._gradients = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
        self.loss = self._memory[-2]
        self.rows = torch.zeros((), dtype=torch.float64, device=self._memory.device)

    def __call__(
        self, loss: Tensor | float, gradients: Sequence[Tensor | None], rows: int, extra: Sequence[Tensor] = ()
    ) -> list[Tensor | None]:
        """The mean gradients, also put into `.grad`, None where no process has one; sets `loss`, `extra` and `rows`.

        loss, gradients, extra: the means over this process's `rows` rows; without rows, 0 and None.
        """
        with torch.no_grad():
            for place, grad in enumerate(gradients):
                if grad is None:
                    self._gradients[place].zero_()
                else:
                    self._gradients[place].copy_(grad)
                self._present[place] = grad is not None
            self.extra.zero_()
            for place, number in enumerate(extra):
                self.extra[place] = number
            self._memory[-2], self._memory[-1] = loss, 1
            self._memory.mul_(rows)
            dist.all_reduce(self._memory, group=self.group)
            self.rows.copy_(self._memory[-1])
            self._memory.div_(self.rows.clamp(min=1))
        return [self._publish(place, grad is not None) for place, grad in enumerate(gradients)]

    def _publish(self, place: int, present: bool) -> Tensor | None:
        p = self.parameters[place]
        # only a gradient that this process lacks, and another may have, makes the host wait for the device
        if not (present or self._present[place] > 0):
            p.grad = None
            return None
        grad = self._gradients[place].to(p.dtype)
        if grad.stride() != p.stride() and is_dense(p):  # as autograd lays gradients out
            grad = torch.empty_like(p).copy_(grad)
        p.grad = grad
        return p.grad
