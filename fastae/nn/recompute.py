"""Gradients that can themselves be differentiated, recomputed from PyTorch's own ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of function(*inputs), under create_graph=True; None where none is needed."""
    # Views, so that one tensor in two places (x is w, say, or tied weights) gets a gradient for each place.
    leaves = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t, need in zip(leaves, needs, strict=True) if t is not None and need]
    found: Any = iter(torch.autograd.grad(function(*leaves), wanted, grad_output, create_graph=True))
    return tuple(next(found) if t is not None and need else None for t, need in zip(leaves, needs, strict=True))
