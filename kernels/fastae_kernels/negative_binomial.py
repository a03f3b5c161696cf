"""The negative binomial likelihood as torch functions of p, t and a = log theta: its value without lgamma(t + 1), and
its derivatives. The same in Triton: `jit/negative_binomial.py`; formulas: `kernels/README.md`.

Nothing here subtracts large numbers that nearly cancel: not lgamma(t + theta) from lgamma(theta), whose difference is
lost in fp32 from theta = 1e4 on, but terms that are small where the result is (Loader 2000, "Fast and accurate
computation of binomial probabilities").
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

LIMIT = 60.0  # log theta is clamped to +- this: beyond, neither fp32 nor a likelihood tells theta from its limits
MOST = 80.0  # p is clamped to this where exp(p) is wanted: there mu / (theta + mu) has long been 1

# lgamma(x) = (x - 1/2) log x - x + log(2 pi) / 2 + sum of STIRLING[k] / x^(2k + 1)
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
# log x - digamma(x) = 1 / (2x) + sum of DIGAMMA[k] / x^(2k + 2)
DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12, -3617 / 8160)


class Series(NamedTuple):
    """How far series go: terms of log1p, those of Stirling's, and from which x on those are taken."""

    log1p: int
    stirling: int
    shift: int


SERIES = {torch.float32: Series(8, 4, 4), torch.float64: Series(16, 8, 10)}  # what they leave out is below eps / 10


class Parts(NamedTuple):
    """What value and derivatives have in common: mu, theta, d = (t - mu) / (theta + mu), log1p(t / theta),
    log1p(mu / theta), and theta (d - log1p(d))."""

    mu: Tensor
    theta: Tensor
    d: Tensor
    log_t: Tensor
    log_mu: Tensor
    excess: Tensor


def parts(p: Tensor, t: Tensor, a: Tensor) -> Parts:
    a = a.clamp(-LIMIT, LIMIT)
    mu, theta = p.clamp(max=MOST).exp(), a.exp()
    d = (t - mu) / (theta + mu)
    r = p - a
    log_t, log_mu = torch.log1p(t / theta), torch.log1p(torch.exp(-r.abs())) + r.clamp(min=0)
    return Parts(mu, theta, d, log_t, log_mu, theta * less_log1p(d, log_t - log_mu))


def less_log1p(x: Tensor, log1p: Tensor) -> Tensor:
    """x - log(1 + x), without cancellation for small x; `log1p` is that log where 1 + x has lost its digits."""
    inside = x.clamp(-0.5, 1.0)
    v = inside / (2 + inside)
    square, terms = v * v, SERIES[x.dtype].log1p
    series = torch.full_like(v, 1 / (2 * terms + 1))
    for i in range(terms - 1, 0, -1):
        series = series * square + 1 / (2 * i + 1)
    series = v * (inside - 2 * square * series)
    return torch.where(x < -0.5, x - log1p, torch.where(x > 1, x - torch.log1p(x.clamp(min=1)), series))


def stirling(x: Tensor) -> Tensor:
    """lgamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, for x > 0."""
    _, terms, shift = SERIES[x.dtype]
    small = x < shift
    y = torch.where(small, x + shift, x)
    inverse = 1 / y
    square, series = inverse * inverse, torch.full_like(x, STIRLING[terms - 1])
    for k in range(terms - 2, -1, -1):
        series = series * square + STIRLING[k]
    near = torch.where(small, x, float(shift))
    product = near / y
    for i in range(1, shift):
        product = product * ((near + i) / y)
    shifted = (near - 0.5) * torch.log1p(shift / near) - shift - product.log()
    return series * inverse + torch.where(small, shifted, 0.0)


def value(p: Tensor, t: Tensor, a: Tensor, setting: float, made_of: Parts | None = None) -> Tensor:
    """-log p(t) - lgamma(t + 1); with a setting, without t log t - t in it, which `remainder` takes account of."""
    _, theta, d, log_t, log_mu, excess = parts(p, t, a) if made_of is None else made_of
    some = t > 0
    positive = torch.where(some, t, 1.0)
    log = positive.log()
    e = -theta * d / positive
    counted = torch.where(some, t * less_log1p(e, log_t - log_mu + (p - log)), theta * -d)
    made = excess + counted + 0.5 * log_t + (stirling(theta) - stirling(t + theta))
    return made if setting else made - (t * log - t)


def remainder(t: Tensor) -> Tensor:
    """lgamma(t + 1) - (t log t - t): small, where its two parts are large."""
    x = t.double()
    grown = torch.where(x > 0, x * torch.log1p(1 / x.clamp(min=1e-300)), 0.0)  # t log((t + 1) / t)
    return (grown + 0.5 * torch.log1p(x) + (0.5 * math.log(2 * math.pi) - 1) + stirling(x + 1)).to(t.dtype)


def slope(p: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """theta (mu - t) / (theta + mu), the derivative by p."""
    theta = a.clamp(-LIMIT, LIMIT).exp()
    mu = p.clamp(max=MOST).exp()
    return theta * ((mu - t) / (theta + mu))


def slope_of_log_theta(p: Tensor, t: Tensor, a: Tensor) -> Tensor:
    """theta (d - log1p(d)) - theta (digamma(t + theta) - digamma(theta) - log1p(t / theta)): the derivative by a."""
    _, theta, _, _, _, excess = parts(p, t, a)
    return excess - _digammas(t, theta)


def _digammas(t: Tensor, theta: Tensor) -> Tensor:
    """theta (digamma(t + theta) - digamma(theta) - log1p(t / theta)) >= 0."""
    _, terms, most = SERIES[t.dtype]
    small = theta < most
    shift = torch.where(small, float(most), 0.0).to(theta.dtype)
    u, v = 1 / (theta + shift), 1 / (t + theta + shift)
    square_u, square_v, power, sums = u * u, v * v, torch.ones_like(u), torch.ones_like(v)
    series = torch.full_like(v, DIGAMMA[0])
    for k in range(1, terms):
        power = power * square_u
        sums = sums * square_v + power  # (u^(2k + 2) - v^(2k + 2)) / (u^2 - v^2)
        series = series + DIGAMMA[k] * sums
    made = theta * u * t * v * (0.5 + (u + v) * series)
    for i in range(most):
        made = made + torch.where(small, theta / (theta + i), 0.0) * (t / (t + theta + i))
    return made - theta * torch.log1p(shift * t / (theta * (theta + most + t)))


class NegativeBinomial(torch.autograd.Function):
    """`value` of each element with `slope` and `slope_of_log_theta` for autograd, which can differentiate those."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, t: Tensor, a: Tensor, setting: float) -> Tensor:
        return value(p, t, a, setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, t, a, ctx.setting = inputs
        ctx.save_for_backward(p, t, a)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        p, t, a = ctx.saved_tensors
        need_p, need_t, need_a, _ = ctx.needs_input_grad
        dp = grad_output * slope(p, t, a) if need_p else None
        dt = None
        if need_t:
            constant = torch.log(torch.where(t > 0, t, 1.0)) if ctx.setting else 0.0
            _, theta, _, _, log_mu, _ = parts(p, t, a)
            dt = grad_output * (a - torch.digamma(t + theta) + log_mu - p + constant)
        da = (grad_output * slope_of_log_theta(p, t, a)).sum_to_size(a.shape) if need_a else None
        return dp, dt, da, None


def evaluate_(
    gradient: Tensor, da: Tensor | None, out: Tensor, p: Tensor, t: Tensor, a: Tensor, setting: float
) -> Tensor:
    """The sum of all values, or of each row's, into `out`; the derivatives of each by p and by a into the others.

    One call to whoever records the calls of a step: its steps need memory of their own.
    """
    if has_torch_function_variadic(gradient, out, p, t, a):
        result: Tensor = handle_torch_function(evaluate_, (gradient, out, p, t, a), gradient, da, out, p, t, a, setting)
        return result
    t = t.to(p.dtype)
    made_of = parts(p, t, a)
    made = value(p, t, a, setting, made_of)
    torch.sum(made if out.dim() else made.view(-1), -1, out=out)
    if da is not None:
        torch.sub(made_of.excess, _digammas(t, made_of.theta), out=da)
    torch.mul(made_of.d, -made_of.theta, out=gradient)
    return out
