"""Noise that rows get on their way into a training step: parts for `DenseAutoencoder(..., corrupt=Mask(0.3))`.

What is to be reconstructed stays the clean row. Noise is drawn anew at every step from (seed, step, row, column), is
never stored, and is there in training mode alone: `encode`, `score` and calls of the model see rows as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastae.parts import number


@dataclass(frozen=True)
class Gaussian:
    """x + std n, n of the standard normal law, clamped to [low, high] (Vincent et al. 2010).

    Raises ValueError for a std below 0 or a low that is not below high.
    """

    std: float
    low: float = -math.inf
    high: float = math.inf
    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        _set(self, std=number("Gaussian", "std", self.std, 0), **_bounds("Gaussian", self.low, self.high))


@dataclass(frozen=True)
class Mask:
    """0 in place of a share q of the values (Vincent et al. 2008).

    loss_on="masked" compares the masked values alone; the mean is over their expected number.
    Raises ValueError for a q outside of [0, 1), or 0 beside loss_on="masked", or another loss_on.
    """

    q: float
    loss_on: str = "all"
    name: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        _set(self, q=number("Mask", "q", self.q, 0, 1, below=True))
        if self.loss_on not in ("all", "masked"):
            raise ValueError(f"Mask: loss_on must be 'all' or 'masked'; got {self.loss_on!r}")
        if self.loss_on == "masked" and self.q == 0:
            raise ValueError("Mask: q must be above 0 where the loss is on masked values; got 0")


@dataclass(frozen=True)
class SaltPepper:
    """`low` in place of q / 2 of the values, `high` in place of as many.

    Raises ValueError for a q outside of [0, 1] or a low that is not below high.
    """

    q: float
    low: float = 0.0
    high: float = 1.0
    name: ClassVar[str] = "salt_pepper"

    def __post_init__(self) -> None:
        _set(self, q=number("SaltPepper", "q", self.q, 0, 1), **_bounds("SaltPepper", self.low, self.high))


@dataclass(frozen=True)
class Swap:
    """Values of other rows, drawn at random, in place of a share q: each column keeps its distribution.

    groups: columns that come from the same other row together, as one-hot columns must: ((3, 4, 5), (7, 8)); a column
    in no group is alone. The other rows are those that the step is given: all training rows.
    Raises ValueError for a q outside of [0, 1] or a column that is in two groups.
    """

    q: float
    groups: tuple[tuple[int, ...], ...] = ()
    name: ClassVar[str] = "swap"

    def __post_init__(self) -> None:
        _set(self, q=number("Swap", "q", self.q, 0, 1))
        try:
            groups = tuple(tuple(int(n) for n in group) for group in self.groups)
        except (TypeError, ValueError):
            raise ValueError(
                f"Swap: groups must be tuples of columns, ((3, 4, 5), (7, 8)); got {self.groups!r}"
            ) from None
        columns = [n for group in groups for n in group]
        if len(set(columns)) != len(columns) or any(n < 0 for n in columns):
            raise ValueError(f"Swap: groups must hold each column once, counted from 0; got {self.groups!r}")
        _set(self, groups=groups)


@dataclass(frozen=True)
class Drop:
    """0 in place of a share q of the values, the others divided by 1 - q: `Mask` that keeps the mean.

    Raises ValueError for a q outside of [0, 1).
    """

    q: float
    name: ClassVar[str] = "drop"

    def __post_init__(self) -> None:
        _set(self, q=number("Drop", "q", self.q, 0, 1, below=True))


Noise = Gaussian | Mask | SaltPepper | Swap | Drop
PARTS = {part.name: part for part in (Gaussian, Mask, SaltPepper, Swap, Drop)}


def _set(part: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(part, name, value)


def _bounds(owner: str, low: object, high: object) -> dict[str, float]:
    made = {"low": number(owner, "low", low, -math.inf), "high": number(owner, "high", high, -math.inf)}
    if not made["low"] < made["high"]:
        raise ValueError(f"{owner}: low must be below high; got {low!r} and {high!r}")
    return made
