"""The same training step in eager PyTorch: the ops that ran, and the bytes they move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastae.analysis.cost import OpCounter, distinct_bytes
from fastae.models.dense import DenseAutoencoder
from fastae.verify.inputs import EAGER


def eager_step(model: DenseAutoencoder, x: Tensor) -> OpCounter:
    """Forward and backward pass as written with torch.nn, without the optimizer; they run, on the CPU."""
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    with OpCounter() as ran:
        h = x
        for number, layer in enumerate([*model.encoder, *model.decoder]):
            h = EAGER[layer.activation](F.linear(h, parameters[2 * number], parameters[2 * number + 1]))
        F.mse_loss(h, x).backward()
    del parameters
    return ran


def fewest_bytes(model: DenseAutoencoder, x: Tensor) -> int:
    """x and every parameter read once, every gradient and the loss written once, nothing else leaving the chip."""
    return distinct_bytes(x) + 2 * sum(distinct_bytes(p) for p in model.parameters()) + torch.float32.itemsize
