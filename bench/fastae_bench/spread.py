"""Figures from times: medians with their 10 % and 90 % quantiles, ratios round by round, exponents of growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The median between the 10 % and the 90 % quantile."""

    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more; quantiles are interpolated between the values, never beyond them."""
    if not values:
        raise ValueError("spread: values must hold one number or more; got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(tenths[0], statistics.median(values), tenths[-1])


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Of theirs / ours, round by round: what slowed both in a round leaves the ratio of that round as it is."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


class Growth(NamedTuple):
    """y = c x^exponent, and the standard error of the exponent: how far the points are from one straight line."""

    exponent: float
    error: float


def growth(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Least squares of log y on log x, over three points or more."""
    if len(x) < 3 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(f"growth: x and y must be three or more positive numbers each; got {list(x)} and {list(y)}")
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    slope, start = statistics.linear_regression(log_x, log_y)
    middle = statistics.fmean(log_x)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(log_x, log_y, strict=True))
    return Growth(slope, math.sqrt(left / (len(x) - 2) / sum((a - middle) ** 2 for a in log_x)))
