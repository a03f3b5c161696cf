"""The negative binomial likelihood as jit functions of tiles: p and t [M, N], a = log theta [1, N] or None for 0.

Twin, with the reasons: `fastae_kernels/negative_binomial.py`; formulas: `kernels/README.md`. SETTING is its `setting`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastae_kernels import negative_binomial as twin
from fastae_kernels.jit.activations import _log1p_unit

_LIMIT = tl.constexpr(twin.LIMIT)
_MOST = tl.constexpr(twin.MOST)
_STIRLING = tl.constexpr(twin.STIRLING)
_DIGAMMA = tl.constexpr(twin.DIGAMMA)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0."""
    unit = x < 1.0
    return tl.where(unit, _log1p_unit(tl.where(unit, x, 1.0)), tl.log(1.0 + x))


@triton.jit
def _theta(p, a):
    """log theta within its limits, and theta; 0 and 1 without a parameter."""
    if a is None:
        clamped = tl.zeros((1, 1), p.dtype)
    else:
        clamped = tl.where(a > _LIMIT, _LIMIT, tl.where(a < -_LIMIT, -_LIMIT, a))
    return clamped, tl.exp(clamped)


@triton.jit
def _mu(p):
    return tl.exp(tl.where(p > _MOST, _MOST, p))  # NaN stays NaN


@triton.jit
def _less_log1p(x, log1p):
    """x - log(1 + x), `log1p` being that log where 1 + x has lost its digits."""
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 8
    low, high = x < -0.5, x > 1.0
    inside = tl.where(low, -0.5, tl.where(high, 1.0, x))
    v = inside / (2.0 + inside)
    square = v * v
    series = v * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * i + 1)
    series = v * (inside - 2.0 * square * series)
    return tl.where(low, x - log1p, tl.where(high, x - tl.log(1.0 + tl.where(high, x, 1.0)), series))


@triton.jit
def _stirling(x):
    """lgamma(x) - (x - 1/2) log x + x - log(2 pi) / 2, for x > 0."""
    TERMS: tl.constexpr = 8 if x.dtype == tl.float64 else 4
    SHIFT: tl.constexpr = 10 if x.dtype == tl.float64 else 4
    small = x < SHIFT
    inverse = 1.0 / tl.where(small, x + SHIFT, x)
    square = inverse * inverse
    series = x * 0.0 + _STIRLING[TERMS - 1]
    for k in tl.static_range(TERMS - 2, -1, -1):
        series = series * square + _STIRLING[k]
    near = tl.where(small, x, SHIFT * 1.0)
    over = 1.0 / (near + SHIFT)
    product = near * over
    for i in tl.static_range(1, SHIFT):
        product *= (near + i) * over
    shifted = (near - 0.5) * _log1p(SHIFT / near) - SHIFT - tl.log(product)
    return series * inverse + tl.where(small, shifted, 0.0)


@triton.jit
def _parts(p, t, clamped, theta):
    """d = (t - mu) / (theta + mu), log1p(t / theta), log1p(t / theta) - log1p(mu / theta), theta (d - log1p(d))."""
    mu = _mu(p)
    d = (t - mu) / (theta + mu)
    r = p - clamped
    log_t = _log1p(t / theta)
    between = log_t - (tl.where(r < 0, 0.0, r) + _log1p_unit(tl.exp(-tl.abs(r))))
    return d, log_t, between, theta * _less_log1p(d, between)


@triton.jit
def nb_value(p, t, a, SETTING: tl.constexpr):
    clamped, theta = _theta(p, a)
    d, log_t, between, excess = _parts(p, t, clamped, theta)
    some = t > 0
    positive = tl.where(some, t, 1.0)
    log = tl.log(positive)
    e = -(theta * d) / positive
    counted = tl.where(some, t * _less_log1p(e, between + (p - log)), -(theta * d))
    made = excess + counted + log_t * 0.5 + (_stirling(theta) - _stirling(t + theta))
    if SETTING == 0.0:
        made -= t * log - t
    return made


@triton.jit
def nb_gradient(p, t, a, SETTING: tl.constexpr):
    _, theta = _theta(p, a)
    mu = _mu(p)
    return theta * ((mu - t) / (theta + mu))


@triton.jit
def nb_parameter(p, t, a, SETTING: tl.constexpr):
    TERMS: tl.constexpr = 8 if p.dtype == tl.float64 else 4
    SHIFT: tl.constexpr = 10 if p.dtype == tl.float64 else 4
    clamped, theta = _theta(p, a)
    _, _, _, excess = _parts(p, t, clamped, theta)
    small = theta < SHIFT
    shift = tl.where(small, SHIFT * 1.0, 0.0)
    u = 1.0 / (theta + shift)
    v = 1.0 / (t + (theta + shift))
    square_u = u * u
    square_v = v * v
    power = u * 0.0 + 1.0
    sums = v * 0.0 + 1.0
    series = v * 0.0 + _DIGAMMA[0]
    for k in tl.static_range(1, TERMS):
        power *= square_u
        sums = sums * square_v + power
        series += sums * _DIGAMMA[k]
    made = theta * u * t * v * ((u + v) * series + 0.5)
    for i in tl.static_range(SHIFT):
        made += tl.where(small, theta / (theta + i), 0.0) * (t / (t + theta + i))
    return excess - made + theta * _log1p(shift * t / (theta * (t + (theta + SHIFT))))
