"""The parts of a model as its constructor takes them, and what excludes what."""

from __future__ import annotations

from typing import Any

from fastae.bottlenecks import PARTS as BOTTLENECKS
from fastae.bottlenecks import Bottleneck, KLSparse, Variational
from fastae.likelihoods import Likelihood
from fastae.nn.log_likelihood import LOG_LIKELIHOODS
from fastae.noise import PARTS as NOISES
from fastae.noise import Noise
from fastae.parts import part_of, spelled


def corrupt_of(given: str | Noise | None, features: int, what: str) -> Noise | None:
    """The noise that a part or its spelling stands for, for rows of so many features."""
    if given is None:
        return None
    part: Noise = part_of(given, NOISES, what, "noise")
    columns = [n for group in getattr(part, "groups", ()) for n in group]
    if columns and max(columns) >= features:
        raise ValueError(f"{what}: groups must hold columns below {features}; got {max(columns)}")
    return part


def bottleneck_of(
    given: str | Bottleneck | None, likelihood: Likelihood, tied: bool, code_activation: str, owner: str
) -> Bottleneck | None:
    """The bottleneck that a part or its spelling stands for; ValueError for what it excludes."""
    if given is None:
        return None
    part: Bottleneck = part_of(given, BOTTLENECKS, f"{owner}: bottleneck", "bottlenecks")
    got = repr(code_activation)
    if isinstance(part, KLSparse) and code_activation != "sigmoid":
        raise ValueError(f"{owner}: code_activation must be 'sigmoid' beside kl_sparse; got {got}")
    if not isinstance(part, Variational):
        return part
    if likelihood.name not in LOG_LIKELIHOODS:
        raise ValueError(
            f"{owner}: likelihood must be one of {', '.join(LOG_LIKELIHOODS)} beside a variational code; got "
            f"{likelihood.name!r}, a mean over values: the divergence would weigh by their number ('gaussian' is a sum)"
        )
    if tied:
        raise ValueError(f"{owner}: tied must be False beside a variational code, whose last layer is twice as wide")
    if code_activation != "identity":
        raise ValueError(f"{owner}: code_activation must be 'identity' beside a variational code; got {got}")
    return part


def spelled_parts(model: Any) -> dict[str, str]:
    """The parts of a model as its `config` has them."""
    parts = {name: getattr(model, name) for name in ("corrupt", "bottleneck")}
    return {name: spelled(part) for name, part in parts.items() if part is not None}
