"""Random numbers of a tile, by Philox4x32-10: jit helpers. The same in torch: `fastae_kernels/noise.py`.

A counter is (column // 4, row of the batch of all processes, step, stream) and gives four words, for four columns
beside each other. The key is the seed. Seed, step and first row are read from memory, so that a graph replays with
others.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastae_kernels.elementwise import ACTIVATIONS
from fastae_kernels.noise import STREAMS, Dropout

_STREAMS = tl.constexpr(STREAMS)
_PI = tl.constexpr(3.141592653589793)


@triton.jit
def words(state_ptr, offs_m, columns, STREAM: tl.constexpr):
    """Four words [rows, columns] of the counters (column, row, step, stream)."""
    step = tl.load(state_ptr + 1)
    row = (offs_m + tl.load(state_ptr + 2)).to(tl.uint32)[:, None]
    column = columns.to(tl.uint32)[None, :] + tl.zeros_like(row)
    return tl.philox(
        tl.load(state_ptr), column, row, step.to(tl.uint32), ((step >> 32) * _STREAMS + STREAM).to(tl.uint32)
    )


@triton.jit
def unit(word):
    """A word as a multiple of 2^-24 in [0, 1): fp32."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _interleaved(a, b, c, d):
    """Columns a0 b0 c0 d0 a1 b1 ... of four tiles [I, J], as [I, 4 J]."""
    both = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(both, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def uniform_tile(state_ptr, offs_m, pid_n, BLOCK_N: tl.constexpr, STREAM: tl.constexpr):
    """Uniform numbers in [0, 1) of the columns of tile `pid_n`, as [rows, BLOCK_N]."""
    a, b, c, d = words(state_ptr, offs_m, tl.arange(0, BLOCK_N // 4) + pid_n * (BLOCK_N // 4), STREAM)
    return _interleaved(unit(a), unit(b), unit(c), unit(d))


@triton.jit
def _normals(radius_word, angle_word):
    """Two normal numbers of two words (Box and Muller 1958).

    sin and cos of the half angle, which lies within a quarter turn, by their series: 1e-7 off at most, and the same
    bits on every target.
    """
    u = ((radius_word >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
    h = (unit(angle_word) - 0.5) * _PI
    h2 = h * h
    sine = 1.6059043836821613e-10
    sine = sine * h2 - 2.505210838544172e-08
    sine = sine * h2 + 2.7557319223985893e-06
    sine = sine * h2 - 0.0001984126984126984
    sine = sine * h2 + 0.008333333333333333
    sine = sine * h2 - 0.16666666666666666
    sine = (sine * h2 + 1.0) * h
    cosine = 2.08767569878681e-09
    cosine = cosine * h2 - 2.755731922398589e-07
    cosine = cosine * h2 + 2.48015873015873e-05
    cosine = cosine * h2 - 0.001388888888888889
    cosine = cosine * h2 + 0.041666666666666664
    cosine = cosine * h2 - 0.5
    cosine = cosine * h2 + 1.0
    return radius * (1.0 - 2.0 * sine * sine), radius * (2.0 * sine * cosine)


@triton.jit
def normal_tile(state_ptr, offs_m, pid_n, BLOCK_N: tl.constexpr, STREAM: tl.constexpr):
    """Standard normal numbers of the columns of tile `pid_n`, as [rows, BLOCK_N] in fp32."""
    a, b, c, d = words(state_ptr, offs_m, tl.arange(0, BLOCK_N // 4) + pid_n * (BLOCK_N // 4), STREAM)
    n_0, n_1 = _normals(a, b)
    n_2, n_3 = _normals(c, d)
    return _interleaved(n_0, n_1, n_2, n_3)


@triton.jit
def dropout_tile(
    state_ptr, offs_m, pid_n, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, STREAM: tl.constexpr, ACC: tl.constexpr
):
    """What the outputs of tile `pid_n` are multiplied with: 0, or 1 / (1 - DROPOUT)."""
    kept = uniform_tile(state_ptr, offs_m, pid_n, BLOCK_N, STREAM) >= DROPOUT
    return tl.where(kept, tl.full((), 1.0 / (1.0 - DROPOUT), ACC), tl.full((), 0.0, ACC))


# ---------------------------------------------------------------- host side


def state_of(dropout: Dropout | None) -> Tensor | None:
    """The pointer that says that there is a dropout."""
    return None if dropout is None else dropout.key.state


def dropping(dropout: Dropout | None) -> dict[str, object]:
    """Its share and stream as constants of the kernel."""
    share, stream = (0.0, 0) if dropout is None else (dropout.share, dropout.key.stream)
    return {"DROPOUT": share, "STREAM": stream}


def kept_of(dropout: Dropout | None, activation: str) -> float:
    """The factor that makes y of what a dropout has left of it; what it has not left has no gradient any more."""
    return 1.0 if dropout is None or ACTIVATIONS[activation].saves != "y" else 1 - dropout.share
