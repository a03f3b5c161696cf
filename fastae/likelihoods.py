"""Losses of a reconstruction as parts: frozen dataclasses that print, compare, hash and go into config.json.

`DenseAutoencoder(..., likelihood="huber")` is `likelihood=fastae.likelihoods.Huber()`. y is the reconstruction, t the
target. `MSE`, `MAE` and `Huber` are losses of y; their mean is taken over all values. The others are negative
log-likelihoods of t in nats: the last layer gives p, from which the mean of t follows, and a row's loss is the sum over
its features; the mean is taken over rows. Constants (those of t alone, and of fixed numbers) are in `score` alone.

A part has a `name`, a `setting` (the number passed to the kernels) and a `parameter`: what is trained with the model
beside its weights, or None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple


class Trained(NamedTuple):
    """What a likelihood has trained with the model: its name, one for each feature or one for all, where it starts."""

    name: str
    per_feature: bool
    start: float = 0.0


def _positive(part: str, option: str, value: object, words: tuple[str, ...] = ()) -> float:
    """The value as a positive number, else a ValueError that names the words which may stand there as well."""
    number = float(value) if isinstance(value, (int, float)) else math.nan
    if math.isfinite(number) and number > 0:
        return number
    others = "".join(f" or {word!r}" for word in words)
    raise ValueError(f"{part}: {option} must be a positive number{others}; got {value!r}")


@dataclass(frozen=True)
class MSE:
    """(y - t)^2."""

    name: ClassVar[str] = "mse"
    setting: ClassVar[float] = 0.0
    parameter: ClassVar[None] = None


@dataclass(frozen=True)
class MAE:
    """|y - t|, whose derivative is the sign, 0 at 0."""

    name: ClassVar[str] = "mae"
    setting: ClassVar[float] = 0.0
    parameter: ClassVar[None] = None


@dataclass(frozen=True)
class Huber:
    """(y - t)^2 / 2 where |y - t| is at most `delta`, delta (|y - t| - delta / 2) beyond (Huber 1964).

    Raises ValueError for a delta that is not a positive number.
    """

    delta: float = 1.0
    name: ClassVar[str] = "huber"
    parameter: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "delta", _positive("Huber", "delta", self.delta))

    @property
    def setting(self) -> float:
        """Number passed to the kernels."""
        return self.delta


@dataclass(frozen=True)
class Gaussian:
    """((p - t)^2 / sigma^2 + log sigma^2 + log(2 pi)) / 2: normal noise around the mean p.

    scale: sigma, a positive number, or "learned": log sigma^2 is trained with the model, one number for all features,
    or "per_feature": one for each. It starts at 0.

    Raises ValueError for any other scale.
    """

    scale: float | str = 1.0
    name: ClassVar[str] = "gaussian"
    words: ClassVar[tuple[str, ...]] = ("learned", "per_feature")  # options that are no numbers

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, str) and self.scale in self.words):
            object.__setattr__(self, "scale", _positive("Gaussian", "scale", self.scale, self.words))

    @property
    def setting(self) -> float:
        """log sigma^2 where it is fixed, else 0."""
        return 2 * math.log(self.scale) if isinstance(self.scale, float) else 0.0

    @property
    def parameter(self) -> Trained | None:
        """log sigma^2 where it is trained."""
        return Trained("log_variance", self.scale == "per_feature") if isinstance(self.scale, str) else None


@dataclass(frozen=True)
class Bernoulli:
    """log(1 + exp p) - t p: binary cross-entropy of t in [0, 1], whose mean is sigmoid(p)."""

    name: ClassVar[str] = "bernoulli"
    setting: ClassVar[float] = 0.0
    parameter: ClassVar[None] = None


@dataclass(frozen=True)
class Poisson:
    """exp(p) - t p + log(t!): counts t with mean exp(p)."""

    name: ClassVar[str] = "poisson"
    setting: ClassVar[float] = 0.0
    parameter: ClassVar[None] = None


@dataclass(frozen=True)
class NegativeBinomial:
    """-log of the negative binomial law of counts t with mean mu = exp(p) and variance mu + mu^2 / theta.

    log theta, one number for each feature, is trained with the model.

    theta: where it starts. Raises ValueError for one that is not a positive number.
    """

    theta: float = 1.0
    name: ClassVar[str] = "nb"
    setting: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", _positive("NegativeBinomial", "theta", self.theta))

    @property
    def parameter(self) -> Trained:
        """log theta."""
        return Trained("log_theta", True, math.log(self.theta))


Likelihood = MSE | MAE | Huber | Gaussian | Bernoulli | Poisson | NegativeBinomial


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
    words: tuple[str, ...] = getattr(PARTS[name], "words", ())
    options: dict[str, float | str] = {}
    for option, _, value in (option.partition("=") for option in rest.split(",")) if rest else ():
        if option not in known:
            raise ValueError(f"likelihood: {name} has {', '.join(known) or 'no options'}; got {option!r}")
        try:
            options[option] = value if value in words else float(value)
        except ValueError:
            wanted = ", ".join(("a number", *words))
            raise ValueError(f"likelihood: {option} must be {wanted}; got {value!r}") from None
    part: Likelihood = PARTS[name](**options)
    return part


PARTS: dict[str, Any] = {part.name: part for part in (MSE, MAE, Huber, Gaussian, Bernoulli, Poisson, NegativeBinomial)}
