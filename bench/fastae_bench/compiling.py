"""`torch.compile` as the baselines use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """For the shapes at hand, as one graph: a break in the graph would be a slower baseline, so it raises."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
