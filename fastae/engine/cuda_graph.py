"""A training step as a CUDA graph, by PyTorch's documented pattern: warm up on a side stream, capture, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # real steps: libraries make their workspaces, optimizers their state


class Captured:
    """Calls `compute` and `update`, the same work on the same memory every time, through a graph.

    An optimizer that is not `capturable` updates outside it, and so does every one if `whole` is False.
    """

    def __init__(
        self, compute: Callable[[], Tensor], update: Callable[[], None], optimizer: torch.optim.Optimizer, whole: bool
    ) -> None:
        self.compute, self.update, self.optimizer, self.whole = compute, update, optimizer, whole
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(0)
        self.settings: list[dict[str, Any]] = []
        self.warm = 0

    def __call__(self) -> Tensor:
        groups = self.optimizer.param_groups
        inside = self.whole and all(group.get("capturable", False) for group in groups)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups] if inside else []
        if settings != self.settings:  # numbers such as the learning rate are part of a graph
            self.graph, self.settings, self.warm = None, settings, min(self.warm, WARM_UP - 1)
        if self.graph is None and self.warm < WARM_UP:
            return self._warm_up()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.compute()
                if inside:
                    self.update()
        self.graph.replay()
        if not inside:
            self.update()
        return self.loss

    def _warm_up(self) -> Tensor:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self.compute()
            self.update()
        current.wait_stream(side)
        self.warm += 1
        return loss
