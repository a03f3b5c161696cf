"""Each activation as a pair of jit functions: `<name>_fwd(p)` is f(p), `<name>_bwd(dy, s)` is dy * f'(p).

Arguments are fp32 or fp64 tiles, and stand left of a constant: the interpreter turns `constexpr * tile` into a
constexpr.
`s` is the output y or the pre-activation p, as `elementwise.ACTIVATIONS[name].saves` says.
At kinks, inf and NaN they follow torch's own derivatives: f'(0) is 0 for relu, the slope for leaky_relu, 1 for elu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastae_kernels import elementwise

_LEAKY_RELU_SLOPE = tl.constexpr(elementwise.LEAKY_RELU_SLOPE)
_LOGIT_EPS = tl.constexpr(elementwise.LOGIT_EPS)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_GELU_CUBIC = tl.constexpr(0.044715)  # Hendrycks & Gimpel, 2016, arXiv:1606.08415
_SOFTPLUS_THRESHOLD = tl.constexpr(float(elementwise.SOFTPLUS_THRESHOLD))


@triton.jit
def _expm1(t):
    """exp(t) - 1 without cancellation: below 0.35 the Taylor series, whose 13th term is under 1e-15 of the first."""
    small = tl.abs(t) < 0.35
    s = tl.where(small, t, 0.0)
    series = s * 0.0 + 1.0
    for i in tl.static_range(12, 1, -1):
        series = 1.0 + series * s * (1.0 / i)
    return tl.where(small, series * s, tl.exp(t) - 1.0)


@triton.jit
def _log1p_unit(u):
    """log(1 + u) for u in [0, 1], as 2 atanh(v), v = u / (2 + u) <= 1/3: the terms fall by 9 each."""
    TERMS: tl.constexpr = 16 if u.dtype == tl.float64 else 8
    v = u / (2.0 + u)
    square = v * v
    series = v * 0.0 + 1.0 / (2 * TERMS + 1)
    for i in tl.static_range(TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * i + 1)
    return 2.0 * v * series


@triton.jit
def _sigmoid(p):
    z = tl.exp(-tl.abs(p))  # never overflows
    return tl.where(p < 0, z, 1.0) / (1.0 + z)


@triton.jit
def _sigmoid_slope(p):
    """s (1 - s), without the cancellation of 1 - s for large p."""
    z = tl.exp(-tl.abs(p))
    return z / ((1.0 + z) * (1.0 + z))


@triton.jit
def identity_fwd(p):
    return p


@triton.jit
def identity_bwd(dy, s):
    return dy


@triton.jit
def relu_fwd(p):
    return tl.where(p < 0, 0.0, p)  # NaN stays NaN


@triton.jit
def relu_bwd(dy, y):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def leaky_relu_fwd(p):
    return tl.where(p > 0, p, p * _LEAKY_RELU_SLOPE)


@triton.jit
def leaky_relu_bwd(dy, s):  # y or p: they have one sign
    return tl.where(s > 0, dy, dy * _LEAKY_RELU_SLOPE)


@triton.jit
def elu_fwd(p):
    return tl.where(p > 0, p, _expm1(tl.where(p > 0, 0.0, p)))


@triton.jit
def elu_bwd(dy, p):
    return tl.where(p <= 0, dy * tl.exp(tl.where(p <= 0, p, 0.0)), dy)


@triton.jit
def gelu_fwd(p):
    return 0.5 * p * (1.0 + tl.erf(p * _SQRT_HALF))


@triton.jit
def gelu_bwd(dy, p):
    cdf = 0.5 * (1.0 + tl.erf(p * _SQRT_HALF))
    return dy * (cdf + p * tl.exp(-0.5 * p * p) * _INV_SQRT_2PI)


@triton.jit
def gelu_tanh_fwd(p):
    # (1 + tanh(u)) / 2 is sigmoid(2 u)
    return p * _sigmoid((p + p * p * p * _GELU_CUBIC) * (2.0 * _SQRT_2_OVER_PI))


@triton.jit
def gelu_tanh_bwd(dy, p):
    u = (p + p * p * p * _GELU_CUBIC) * (2.0 * _SQRT_2_OVER_PI)
    slope = (1.0 + p * p * (3.0 * _GELU_CUBIC)) * (2.0 * _SQRT_2_OVER_PI)
    return dy * (_sigmoid(u) + p * _sigmoid_slope(u) * slope)  # in this order: p * slope overflows first


@triton.jit
def silu_fwd(p):
    return p * _sigmoid(p)


@triton.jit
def silu_bwd(dy, p):
    return dy * (_sigmoid(p) + p * _sigmoid_slope(p))


@triton.jit
def _mish_parts(p):
    """a, c and d of tanh(log(1 + exp p)) = a / d = 1 - c / d, without overflow or cancellation."""
    z = tl.exp(-tl.abs(p))
    below = p < 0
    a = tl.where(below, z * (z + 2.0), 2.0 * z + 1.0)
    c = tl.where(below, 2.0, 2.0 * z * z)
    return a, c, a + c


@triton.jit
def mish_fwd(p):
    a, _, d = _mish_parts(p)
    return p * (a / d)


@triton.jit
def mish_bwd(dy, p):
    a, c, d = _mish_parts(p)
    return dy * (a / d + p * _sigmoid(p) * (c / d) * (1.0 + a / d))


@triton.jit
def sigmoid_fwd(p):
    return _sigmoid(p)


@triton.jit
def sigmoid_bwd(dy, y):
    return dy * y * (1.0 - y)


@triton.jit
def tanh_fwd(p):
    size = tl.abs(p)
    t, z = _expm1(-2.0 * size), tl.exp(-2.0 * size)
    # The second form is right to half a unit near 1, where the derivative 1 - y * y magnifies an error of y
    size = tl.where(size < 0.7, -t / (2.0 + t), 1.0 - 2.0 * z / (1.0 + z))
    return tl.where(p < 0, -size, size)


@triton.jit
def tanh_bwd(dy, y):
    return dy * ((1.0 - y) * (1.0 + y))  # 1 - y is exact above 1/2, y * y is not


@triton.jit
def softplus_fwd(p):
    return tl.where(p > _SOFTPLUS_THRESHOLD, p, tl.where(p < 0, 0.0, p) + _log1p_unit(tl.exp(-tl.abs(p))))


@triton.jit
def softplus_bwd(dy, p):
    return dy * tl.where(p > _SOFTPLUS_THRESHOLD, 1.0, _sigmoid(p))


@triton.jit
def _logit_bounds(dtype: tl.constexpr):
    # As tensors: a number that a comparison or tl.where meets becomes fp32, in fp64 another bound
    return tl.full((), _LOGIT_EPS, dtype), tl.full((), 1.0 - _LOGIT_EPS, dtype)


@triton.jit
def logit_fwd(p):
    low, high = _logit_bounds(p.dtype)
    p = tl.where(p < low, low, tl.where(p > high, high, p))  # NaN is kept: both comparisons are false for it
    return tl.log(p / (1.0 - p))


@triton.jit
def logit_bwd(dy, p):
    low, high = _logit_bounds(p.dtype)
    clamped = (p < low) | (p > high)
    q = tl.where(clamped, 0.5, p)
    return tl.where(clamped, 0.0, dy / (q * (1.0 - q)))


#: name -> (forward, backward)
PAIRS = {name: (globals()[f"{name}_fwd"], globals()[f"{name}_bwd"]) for name in elementwise.ACTIVATIONS}
