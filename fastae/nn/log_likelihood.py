"""What a log-likelihood has beside its kernel: the mean function of p, its constants, and the targets it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from fastae_kernels import negative_binomial
from fastae_kernels.elementwise import LossKind
from torch import Tensor


class LogLikelihood(NamedTuple):
    """`mean(p)` is the expected target, None where it is p; targets lie in [low, high].

    `constants(t, setting)`, [..., features] -> [...], is what completes a row's loss to -log p(t): of the loss that is
    trained or, with `scored`, of the one under that setting, where training leaves out numbers so large that adding
    them again would round what is left.
    """

    mean: Callable[[Tensor], Tensor] | None = None
    constants: Callable[[Tensor, float], Tensor] | None = None
    low: float = -math.inf
    high: float = math.inf
    scored: float | None = None


def _normal(t: Tensor, log_variance: float) -> Tensor:
    return t.new_full(t.shape[:-1], 0.5 * (math.log(2 * math.pi) + log_variance) * t.shape[-1])


def _factorials(t: Tensor, _: float) -> Tensor:
    return torch.lgamma(t + 1).sum(-1)


def _remainders(t: Tensor, _: float) -> Tensor:
    return negative_binomial.remainder(t).sum(-1)


#: name -> what it has; the losses that are taken of y = f(p) have nothing
LOG_LIKELIHOODS = {
    "gaussian": LogLikelihood(constants=_normal),
    "bernoulli": LogLikelihood(torch.sigmoid, low=0, high=1),
    "poisson": LogLikelihood(torch.exp, _factorials, low=0),
    "nb": LogLikelihood(torch.exp, _remainders, low=0, scored=1.0),
}
_NONE = LogLikelihood()


def log_likelihood(loss: str) -> LogLikelihood:
    """What the loss of that name has."""
    return LOG_LIKELIHOODS.get(loss, _NONE)


def scored(kind: LossKind) -> LossKind:
    """The loss that `constants` completes to a score."""
    setting = log_likelihood(kind.name).scored
    return kind if setting is None else LossKind(kind.name, setting)


def check_support(loss: str, x: Tensor, name: str) -> None:
    """ValueError with the place if x [rows, features], which is finite, holds what the likelihood gives no mass."""
    law = log_likelihood(loss)
    low, high = law.low, law.high
    if x.numel() == 0 or (low == -math.inf and high == math.inf):
        return
    ends = torch.aminmax(x)
    if float(ends.min) >= low and float(ends.max) <= high:
        return
    bad = int(((x < low) | (x > high)).flatten().byte().argmax())
    row, column = divmod(bad, x.shape[1])
    wanted = f"between {low:g} and {high:g}" if high < math.inf else f"at least {low:g}"
    raise ValueError(
        f"{name} must be {wanted} for likelihood {loss!r}; got {x[row, column].item():.6g} at row {row}, column "
        f"{column}"
    )
