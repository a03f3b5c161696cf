"""A training step as a CUDA graph, by PyTorch's documented pattern: warm up on a side stream, capture, replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # real steps: libraries make their workspaces, optimizers their state


class GraphedStep:
    """Calls `compute` and `update`, the same work on the same memory every time, through a graph.

    An optimizer that is not `capturable` updates outside it, and so does every one if `capture_optimizer` is False.
    `publish` puts the gradients into `.grad` again: a replay runs none of the Python that did it.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        update: Callable[[Tensor], object],
        publish: Callable[[], object],
        optimizer: torch.optim.Optimizer,
        capture_optimizer: bool,
    ) -> None:
        self.compute, self.update, self.publish = compute, update, publish
        self.optimizer, self.capture_optimizer = optimizer, capture_optimizer
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(0)
        self.settings: list[dict[str, Any]] = []
        self.warm = 0

    def __call__(self) -> Tensor:
        groups = self.optimizer.param_groups
        inside = self.capture_optimizer and all(group.get("capturable", False) for group in groups)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups] if inside else []
        if settings != self.settings:  # numbers such as the learning rate are part of a graph
            self.graph, self.settings, self.warm = None, settings, min(self.warm, WARM_UP - 1)
        if self.graph is None and self.warm < WARM_UP:
            return self._warm_up()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.loss = self.compute()
                if inside:
                    self.update(self.loss)
            self.graph = graph  # only one that was captured whole
        self.graph.replay()
        self.publish()
        if not inside:
            self.update(self.loss)
        return self.loss

    def _warm_up(self) -> Tensor:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            loss = self.compute()
            self.update(loss)
        current.wait_stream(side)
        self.warm += 1
        return loss
