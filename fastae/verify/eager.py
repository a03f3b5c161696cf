"""What eager PyTorch does for the same training step: the ops that ran, and the bytes they move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastae.analysis.cost import distinct_bytes
from fastae.models.dense import DenseAutoencoder
from fastae.verify.inputs import EAGER


@dataclass
class Ran(TorchDispatchMode):
    """The ops that ran inside, and for each the bytes of its inputs and outputs; views are free."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        memory = {t.untyped_storage()._cdata for t in given}
        if not made or (all(t.untyped_storage()._cdata in memory for t in made) and not func._schema.is_mutable):
            return result
        self.launches[func._schema.name.removeprefix("aten::")] += 1
        self.bytes_moved += sum(distinct_bytes(t) for t in (*given, *made))
        return result


def eager_step(model: DenseAutoencoder, x: Tensor) -> Ran:
    """Forward and backward pass as written with torch.nn, without the optimizer; they run, on the CPU."""
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    with Ran() as ran:
        h = x
        for number, layer in enumerate([*model.encoder, *model.decoder]):
            h = EAGER[layer.activation](F.linear(h, parameters[2 * number], parameters[2 * number + 1]))
        F.mse_loss(h, x).backward()
    del parameters
    return ran


def fewest_bytes(model: DenseAutoencoder, x: Tensor) -> int:
    """x and every parameter read once, every gradient and the loss written once, nothing else leaving the chip."""
    return distinct_bytes(x) + 2 * sum(distinct_bytes(p) for p in model.parameters()) + torch.float32.itemsize
