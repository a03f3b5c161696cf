"""Losses of a reconstruction as parts: frozen dataclasses that print, compare, hash and go into config.json.

`DenseAutoencoder(..., likelihood="huber")` is `likelihood=fastae.likelihoods.Huber()`. y is the reconstruction, t the
target. `MSE`, `MAE` and `Huber` are losses of y; their mean is taken over all values. The others are negative
log-likelihoods of t in nats: the last layer gives p, from which the mean of t follows, and a row's loss is the sum over
its features; the mean is taken over rows. Constants (those without p) are in `score` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True)
class MSE:
    """(y - t)^2."""

    name: ClassVar[str] = "mse"
    setting: ClassVar[float] = 0.0


@dataclass(frozen=True)
class MAE:
    """|y - t|, whose derivative is the sign, 0 at 0."""

    name: ClassVar[str] = "mae"
    setting: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Huber:
    """(y - t)^2 / 2 where |y - t| is at most `delta`, delta (|y - t| - delta / 2) beyond (Huber 1964).

    Raises ValueError for a delta that is not a positive number.
    """

    delta: float = 1.0
    name: ClassVar[str] = "huber"

    def __post_init__(self) -> None:
        number = float(self.delta) if isinstance(self.delta, (int, float)) else math.nan
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"Huber: delta must be a positive number; got {self.delta!r}")
        object.__setattr__(self, "delta", number)

    @property
    def setting(self) -> float:
        """Number passed to the kernels."""
        return self.delta


@dataclass(frozen=True)
class Gaussian:
    """(p - t)^2 / 2 + log(2 pi) / 2: normal noise of standard deviation 1 around the mean p."""

    name: ClassVar[str] = "gaussian"
    setting: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Bernoulli:
    """log(1 + exp p) - t p: binary cross-entropy of t in [0, 1], whose mean is sigmoid(p)."""

    name: ClassVar[str] = "bernoulli"
    setting: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Poisson:
    """exp(p) - t p + log(t!): counts t with mean exp(p)."""

    name: ClassVar[str] = "poisson"
    setting: ClassVar[float] = 0.0


Likelihood = MSE | MAE | Huber | Gaussian | Bernoulli | Poisson


def spelled(part: Likelihood) -> str:
    """The part as the command line and config.json have it: "huber", "huber:delta=2.0"."""
    options = [f"{f.name}={getattr(part, f.name)}" for f in fields(part) if getattr(part, f.name) != f.default]
    return part.name if not options else f"{part.name}:{','.join(options)}"


def parsed(text: str) -> Likelihood:
    """The part that `spelled` spells. Raises ValueError for a name or an option that there is not."""
    name, _, rest = text.partition(":")
    if name not in PARTS:
        raise ValueError(f"likelihood must be one of {', '.join(PARTS)}; got {text!r}")
    known = PARTS[name].__match_args__  # of the options: `fields` of a class is nothing for torch.compile
    options = dict(option.partition("=")[::2] for option in rest.split(",")) if rest else {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"likelihood: {name} has {', '.join(known) or 'no options'}; got {option!r}")
        try:
            float(value)
        except ValueError:
            raise ValueError(f"likelihood: {option} must be a number; got {value!r}") from None
    return PARTS[name](**{option: float(value) for option, value in options.items()})


PARTS = {part.name: part for part in (MSE, MAE, Huber, Gaussian, Bernoulli, Poisson)}
