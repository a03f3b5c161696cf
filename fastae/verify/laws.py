"""Test statistics of samples against their laws, each as a standard normal number: beyond 5 it is no chance (6e-7)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Law = tuple[str, float]  # what, and how many standard errors off


def share(name: str, hits: Tensor, q: float) -> Law:
    """Of independent events with probability q."""
    n = hits.numel()
    return name, (float(hits.double().sum()) - n * q) / math.sqrt(n * q * (1 - q))


def mean(name: str, values: Tensor, truth: float) -> Law:
    """Of independent values whose variance is not known."""
    v = values.double().flatten()
    return name, (float(v.mean()) - truth) / max(float(v.std()) / math.sqrt(len(v)), 1e-300)


def uncorrelated(name: str, a: Tensor, b: Tensor) -> Law:
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return name, float((a @ b) / (a.norm() * b.norm())) * math.sqrt(len(a))


def uniform_counts(name: str, counts: Tensor) -> Law:
    """Pearson's chi^2 of counts in cells that are alike, by Wilson and Hilferty's root."""
    expected, cells = counts.double().mean(), counts.numel() - 1
    chi = float(((counts.double() - expected) ** 2 / expected).sum())
    return name, ((chi / cells) ** (1 / 3) - (1 - 2 / (9 * cells))) / math.sqrt(2 / (9 * cells))


def normal(z: Tensor) -> Iterator[Law]:
    """Independent standard normal numbers [rows, columns]: four moments, the whole law, neighbours."""
    n, v = z.numel(), z.double().flatten()
    yield "mean", float(v.mean()) * math.sqrt(n)
    yield "variance", float((v * v).mean() - 1) * math.sqrt(n / 2)
    yield "third moment", float((v**3).mean()) * math.sqrt(n / 15)
    yield "fourth moment", float((v**4).mean() - 3) * math.sqrt(n / 96)
    yield _kolmogorov((1 + torch.erf(v / math.sqrt(2))) / 2)
    yield from neighbours(z)


def neighbours(z: Tensor) -> Iterator[Law]:
    """Each value beside the next one in its row and in its column."""
    yield uncorrelated("columns", z[:, 1:], z[:, :-1])
    yield uncorrelated("rows", z[1:], z[:-1])


def _kolmogorov(u: Tensor) -> Law:
    """The greatest distance of the empirical distribution of uniform numbers from theirs: as far out as a normal
    number that is as rare, P(D sqrt(n) > d) = 2 exp(-2 d^2)."""
    u, n = u.sort().values, u.numel()
    steps = torch.arange(n, dtype=u.dtype)
    d = float(torch.maximum((steps + 1) / n - u, u - steps / n).max()) * math.sqrt(n)
    tail = min(2 * math.exp(-2 * d * d), 1.0)
    return "distribution", math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - tail, dtype=torch.float64)))
