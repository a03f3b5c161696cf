"""Losses of a reconstruction as parts: frozen dataclasses that print, compare, hash and go into config.json.

`DenseAutoencoder(..., likelihood="huber")` is `likelihood=fastae.likelihoods.Huber()`. The mean of each is taken over
all values. y is the reconstruction, t the target.
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


Likelihood = MSE | MAE | Huber


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


PARTS = {part.name: part for part in (MSE, MAE, Huber)}
