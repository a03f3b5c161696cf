"""What a log-likelihood has beside its kernel: the mean function of p, its constants, and the targets it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LogLikelihood(NamedTuple):
    """`mean(p)` is the expected target, None where it is p; `constants(t)`, [..., features] -> [...], what training
    leaves out of a row's loss; targets lie in [low, high]."""

    mean: Callable[[Tensor], Tensor] | None = None
    constants: Callable[[Tensor], Tensor] | None = None
    low: float = -math.inf
    high: float = math.inf


def _normal(t: Tensor) -> Tensor:
    return t.new_full(t.shape[:-1], 0.5 * math.log(2 * math.pi) * t.shape[-1])


def _factorials(t: Tensor) -> Tensor:
    return torch.lgamma(t + 1).sum(-1)


#: name -> what it has; the losses that are taken of y = f(p) have nothing
LOG_LIKELIHOODS = {
    "gaussian": LogLikelihood(constants=_normal),
    "bernoulli": LogLikelihood(torch.sigmoid, low=0, high=1),
    "poisson": LogLikelihood(torch.exp, _factorials, low=0),
}
_NONE = LogLikelihood()


def log_likelihood(loss: str) -> LogLikelihood:
    """What the loss of that name has."""
    return LOG_LIKELIHOODS.get(loss, _NONE)


def check_support(loss: str, x: Tensor, name: str) -> None:
    """ValueError with the place if x [rows, features], which is finite, holds what the likelihood gives no mass."""
    low, high = log_likelihood(loss)[2:]
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
