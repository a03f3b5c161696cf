"""The same training step in eager PyTorch: the ops that ran, and the bytes they move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastae.analysis.cost import OpCounter, distinct_bytes
from fastae.models.dense import DenseAutoencoder
from fastae.nn.dropout import HiddenDropout
from fastae.nn.losses import eager_loss
from fastae.verify.inputs import EAGER


def eager_step(model: DenseAutoencoder, x: Tensor) -> OpCounter:
    """Forward and backward pass as written with torch.nn, without the optimizer; they run, on the CPU."""
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    given = iter(parameters)

    def through(stack: Sequence[nn.Module], h: Tensor) -> Tensor:
        for layer in stack:
            if isinstance(layer, HiddenDropout):
                h = F.dropout(h, layer.p)
            else:
                h = EAGER[str(layer.activation)](F.linear(h, next(given), next(given)))
        return h

    with OpCounter() as ran:
        noise = model.corrupt
        h = through([*model.encoder], x if noise is None else x * (torch.rand_like(x) >= getattr(noise, "q", 0.0)))
        kl: Tensor | None = None
        if model.variational is not None:
            mu, log_var = h.chunk(2, 1)
            kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum() / len(x)
            h = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        loss = eager_loss(through([*model.decoder], h), x, model.kind, "mean")
        (loss if kl is None else loss + kl).backward()
    del parameters
    return ran


def fewest_bytes(model: DenseAutoencoder, x: Tensor) -> int:
    """x and every parameter read once, every gradient and the loss written once, nothing else leaving the chip."""
    return distinct_bytes(x) + 2 * sum(distinct_bytes(p) for p in model.parameters()) + torch.float32.itemsize
