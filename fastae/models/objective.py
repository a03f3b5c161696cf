"""What a model is trained on, by PyTorch's own ops: loss on noisy rows, a sampled code, its divergence, weights.

`TrainStep` computes the same with kernels. Random numbers are PyTorch's here: `torch.manual_seed` decides them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fastae_kernels.noise import Key, corrupt, hide
from fastae_kernels.sampling import HIGHEST, LOWEST
from torch import Tensor

from fastae.bottlenecks import Contractive, Variational
from fastae.engine.penalties import code_penalty, contraction
from fastae.engine.randomness import corruption_of, group_count, groups_of
from fastae.models.program import encoder_layers
from fastae.nn.log_likelihood import log_likelihood, scored
from fastae.nn.losses import eager_loss, row_losses
from fastae.noise import Noise


def objective(model: Any, x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over the rows of x of loss and penalty, each row's times its weight: []."""
    counted, share = target, 1.0
    noise = model.corrupt if model.training else None
    if noise is not None:
        if x.requires_grad:
            raise ValueError("loss: x must not require a gradient where it is corrupted; pass it detached")
        rows, counted = _corrupted(noise, x, target)
        share = noise.q if getattr(noise, "loss_on", "all") == "masked" else 1.0
    else:
        rows = x
    part, kl, more = model.bottleneck, None, None
    if part is None:
        y = model.logits(rows)
    elif isinstance(part, Contractive):
        if not torch.compiler.is_compiling():
            encoder_layers(model)  # or it raises
        y, more = model.logits(rows), contraction(part, [*model.encoder], rows, weight)
    elif not isinstance(part, Variational):
        z = model.encoder(rows)
        y, more = model.decoder(z), code_penalty(part, z, weight)
    else:
        mu, log_var = halves(model.encoder(rows))
        z = mu + (log_var / 2).exp() * torch.randn_like(mu) if model.training else mu
        y, kl = model.decoder(z), divergence(mu, log_var)
    y, counted, trained = wide(y), wide(counted), wide_or_none(model.loss_parameter)
    if weight is None and kl is None and share == 1:
        loss = eager_loss(y, counted, model.kind, "mean", trained)
        return loss if more is None else loss + more
    if share < 1:
        missing = counted.isnan()
        values = eager_loss(y, counted.masked_fill(missing, 0.5), model.kind, "none", trained)
        values = values.masked_fill(missing, 0) / share
    else:
        values = eager_loss(y, counted, model.kind, "none", trained)
    losses = row_losses(values, model.kind)
    r = 1 if weight is None else weight
    loss = (losses * r).mean()
    if isinstance(part, Variational) and kl is not None:
        return loss + penalty(part, kl if weight is None else kl * weight.unsqueeze(1))
    return loss if more is None else loss + more


def wide(t: Tensor) -> Tensor:
    """t, in half precision as fp32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def wide_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else wide(t)


def halves(p: Tensor) -> tuple[Tensor, Tensor]:
    """mu and log sigma^2 [..., Z] of [mu | log sigma^2], the second within its bounds."""
    mu, log_var = p.chunk(2, -1)
    return mu, log_var.clamp(LOWEST, HIGHEST)


def divergence(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL of each latent from the standard normal law [..., Z], in nats."""
    mu, log_var = wide(mu), wide(log_var)
    return (mu**2 + torch.expm1(log_var) - log_var) / 2


def penalty(part: Variational, kl: Tensor) -> Tensor:
    """What the objective is raised by for the divergence [rows, Z], with beta in full: []."""
    means = kl.mean(0)
    if part.capacity is not None:
        return part.beta * (means.sum() - part.capacity).abs()
    return part.beta * (means.clamp(min=part.free_bits) if part.free_bits else means).sum()


def _corrupted(part: Noise, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """x with noise, and the target, NaN where it is not to be compared."""
    groups = groups_of(part, x.shape[1], x.device)
    shape = len(x), group_count(part, x.shape[1])
    drawn: tuple[Tensor, ...] = (torch.rand(shape, device=x.device),)
    if part.name == "gaussian":
        drawn = (torch.randn(shape, device=x.device),)
    elif part.name == "swap":
        drawn = (*drawn, torch.randint(len(x), shape, device=x.device))
    noise = corruption_of(part, Key(torch.zeros(3, dtype=torch.int64), 0, drawn), groups)
    with torch.no_grad():
        rows = torch.empty_like(x)
        corrupt(x, x, noise, rows)
        if getattr(part, "loss_on", "all") == "masked":
            target = target.clone()
            hide(target, noise)
    return rows, target


def noisy(part: Noise, x: Tensor, seed: int = 0) -> Tensor:
    """x [rows, features] with that noise, the same for the same seed; swapped values are x's own."""
    state = torch.tensor([seed, 0, 0], device=x.device)
    rows = torch.empty_like(x)
    with torch.no_grad():
        corrupt(x, x, corruption_of(part, Key(state, 0), groups_of(part, x.shape[1], x.device)), rows)
    return rows


# ---------------------------------------------------------------- bounds of the likelihood


def row_bounds(model: Any, x: Tensor, samples: int, importance: bool, generator: torch.Generator) -> Tensor:
    """The evidence lower bound of each row of x in nats [rows]; with `importance`, the importance-weighted one."""
    constants, kind = log_likelihood(model.likelihood.name).constants, scored(model.kind)
    trained = wide_or_none(model.loss_parameter)
    mu, log_var = (wide(t) for t in halves(model.encoder(x)))
    target = wide(x)
    fixed = 0.0 if constants is None else constants(target, kind.setting)
    # a running log-sum-exp, or a running sum: no more than one sample is in memory
    highest, total = mu.new_full((len(x),), -math.inf), mu.new_zeros(len(x))
    for _ in range(samples):
        e = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        z = mu + (log_var / 2).exp() * e
        y = wide(model.decoder(z.to(x.dtype)))
        log_p = -row_losses(eager_loss(y, target, kind, "none", trained), kind) - fixed
        if not importance:
            total += log_p
            continue
        log_w = log_p + (e**2 + log_var - z**2).sum(-1) / 2  # log p(x | z) + log p(z) - log q(z | x)
        above = torch.maximum(highest, log_w)
        total = total * (highest - above).exp() + (log_w - above).exp()
        highest = above
    if importance:
        return highest + total.log() - math.log(samples)
    return total / samples - divergence(mu, log_var).sum(-1)
