"""The sample of a variational code, its divergence from the standard normal law, and their gradients, in torch.

A row's p is [mu | l], l = log sigma^2 clamped to [-30, 20], where exp(l) is finite and not 0 in fp32. z = mu +
exp(l / 2) e, e standard normal (Kingma and Welling 2014); KL = sum (mu^2 + expm1(l) - l) / 2, expm1 because exp(l) - 1
cancels near the prior. Twin of `jit/sampling.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastae_kernels.elementwise import accumulator
from fastae_kernels.noise import Key, normals

LOWEST, HIGHEST = -30.0, 20.0


class Sample(NamedTuple):
    """What `linear_sample` needs beside the layer.

    width: Z, of mu. key: of e; `key.drawn` is e [M, Z]. row_weight: [M] or None, factors of the rows' divergence.
    per_latent: whether its sums are to be apart.
    """

    width: int
    key: Key
    row_weight: Tensor | None = None
    per_latent: bool = False


class Sampled(NamedTuple):
    """What the gradient needs: the sample, its p [M, 2 Z], and what the objective's slope by KL is, in units of the
    gradient by z: `slope` [] or [Z] over `divisor`. `saved`, of a twin: what `sample` says."""

    sample: Sample
    p: Tensor
    slope: Tensor
    divisor: int = 1
    saved: tuple[Tensor, ...] = ()


class Penalty(NamedTuple):
    """What a loss is raised by: `factor` [], 1 if None, times the sum of `partials` [R], over the number of rows."""

    partials: Tensor
    factor: Tensor | None = None


def sample(p: Tensor, s: Sample, out: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Write z [M, Z] into `out`, which may be wider and is 0 there. The sums over rows of r KL, [1] or [1, Z], and what
    the gradient is made of: z - mu and expm1(l), [M, Z]."""
    wide, (M, Z) = accumulator(p), (len(p), s.width)
    mu, log_var = _halves(p, Z, wide)
    terms = torch.clamp(log_var, LOWEST, HIGHEST, out=mu.new_empty(M, Z))
    noise = torch.mul(terms, 0.5, out=mu.new_empty(M, Z)).exp_()
    noise.mul_(normals(s.key, M, Z))
    if out.dtype == wide and out.shape[1] == Z:
        torch.add(mu, noise, out=out)
    else:
        out.zero_()[:, :Z].copy_(torch.add(mu, noise, out=mu.new_empty(M, Z)))
    less = torch.expm1(terms, out=mu.new_empty(M, Z))
    torch.sub(less, terms, out=terms)
    terms.addcmul_(mu, mu)
    terms.mul_(0.5 if s.row_weight is None else torch.mul(s.row_weight, 0.5, out=mu.new_empty(M)).unsqueeze(1))
    kl = mu.new_empty(1, Z) if s.per_latent else mu.new_empty(1)
    torch.sum(terms if s.per_latent else terms.view(1, -1), 0 if s.per_latent else 1, keepdim=s.per_latent, out=kl)
    return kl, (noise, less)


def sample_bwd(dz: Tensor, s: Sampled, out: Tensor | None = None) -> Tensor:
    """The gradient by p [M, 2 Z], in p's dtype, from that by z [M, Z], and of the divergence."""
    wide, (M, Z) = accumulator(dz), (len(dz), s.sample.width)
    mu, log_var = _halves(s.p, Z, wide)
    dz = dz[:, :Z].to(wide)
    result = dz.new_empty(M, 2 * Z, dtype=s.p.dtype) if out is None else out
    if result.shape[1] > 2 * Z:
        result[:, 2 * Z :].zero_()
    noise, less = s.saved or sample(s.p, s.sample, dz.new_empty(M, Z))[1]
    by_mu = torch.mul(mu, s.slope, out=mu.new_empty(M, Z))
    by_log_var = torch.mul(less, s.slope, out=mu.new_empty(M, Z))
    for t in (by_mu, by_log_var):
        if s.divisor != 1:
            t.mul_(1 / s.divisor)
        if s.sample.row_weight is not None:
            t.mul_(s.sample.row_weight.unsqueeze(1))
    by_mu.add_(dz)
    by_log_var.addcmul_(dz, noise).mul_(0.5)
    # 0 where clamped, and the gradient where not
    torch.ops.aten.hardtanh_backward.grad_input(by_log_var, log_var, LOWEST, HIGHEST, grad_input=by_log_var)
    result[:, :Z].copy_(by_mu)
    result[:, Z : 2 * Z].copy_(by_log_var)
    return result


def penalised(loss: Tensor, penalty: Penalty | None, rows: int) -> Tensor:
    """The loss [], written over by what it is with the penalty."""
    if penalty is None:
        return loss
    more = torch.sum(penalty.partials, 0, out=loss.new_empty(()))
    if penalty.factor is not None:
        more.mul_(penalty.factor)
    return loss.add_(more, alpha=1 / rows)


def _halves(p: Tensor, Z: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    return p[:, :Z].to(wide), p[:, Z : 2 * Z].to(wide)
