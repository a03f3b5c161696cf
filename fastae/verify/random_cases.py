"""Cases of the ops that draw random numbers: noise on rows, dropout, the sample of a variational code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fastae_kernels.noise import Corruption, Dropout, Key
from fastae_kernels.ops import Layer
from fastae_kernels.sampling import Penalty, Sample, Sampled
from torch import Tensor

from fastae.verify.inputs import Draw

Views = Callable[[str, Tensor], Tensor]


def key(draw: Draw) -> Key:
    return Key(torch.tensor([12345, 67, 8], device=draw.device), 3)


def dropout(case: Any, draw: Draw) -> Dropout | None:
    return Dropout(0.3, key(draw)) if case.option("dropout") else None


def penalty(case: Any, draw: Draw) -> Penalty | None:
    """More partial sums than a program adds at once, and their factor."""
    if not case.option("more") or case.option("reduction") == "none":
        return None
    return Penalty(draw.uniform(300, low=0, high=1), draw.uniform(1, low=0.5, high=2)[0])


def with_missing(case: Any, target: Tensor) -> Tensor:
    """The target, NaN at every third value if some do not count."""
    if case.option("more"):
        target.view(-1)[::3] = math.nan
    return target


def linear_sample(case: Any, draw: Draw, view: Views) -> tuple[Any, ...]:
    """A code of N latents."""
    M, N, K = case.shape
    x, w, b = draw.layer("identity", M, 2 * N, K, case.dtype)
    layer = Layer(view("w", w), view("b", b) if case.option("bias") else None, "identity")
    row_weight = draw.uniform(M, low=0, high=3) if case.option("row_weight") else None
    return view("x", x), layer, Sample(N, key(draw), row_weight, case.option("per_latent"))


def linear_dgrad_sample(case: Any, draw: Draw, view: Views) -> tuple[Any, ...]:
    """Through a code of K latents."""
    M, N, K = case.shape
    dp, w = draw.normal(M, N, dtype=case.dtype), draw.normal(N, K, dtype=case.dtype)
    p, slopes = draw.normal(M, 2 * K, dtype=case.dtype), draw.uniform(K + 1, low=0.1, high=2)
    row_weight = draw.uniform(M, low=0, high=3) if case.option("row_weight") else None
    slope = slopes[1:] if case.option("per_latent") else slopes[0]
    sampled = Sampled(Sample(K, key(draw), row_weight), view("p", p), slope, 1 if case.option("lacks_scale") else M + 1)
    return view("dp", dp), view("w", w), sampled


def gather(case: Any, draw: Draw, view: Views) -> tuple[Any, ...]:
    """M of K + 3 rows of N columns."""
    M, N, K = case.shape
    kind = case.option("noise")
    low, high = {"salt_pepper": (-0.5, 2.0), "gaussian": (-1.0, 1.5)}.get(kind, (-math.inf, math.inf))
    groups = torch.arange(N, device=draw.device) // 2 if kind == "swap" else None
    rows = (torch.arange(M, device=draw.device) * 7) % (K + 3)
    source = view("source", draw.normal(K + 3, N, dtype=case.dtype))
    return source, rows, Corruption(kind, 0.3, low, high, key(draw), groups)


def sample_results(call: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """z, p and the sums of KL, whose parts an implementation chooses."""
    z, p, kl, _ = call(*args)
    return z, p, kl.sum(0)


def gather_results(call: Callable[..., Any], source: Tensor, rows: Tensor, corruption: Corruption) -> tuple[Any, ...]:
    out, clean = (source.new_empty(len(rows), source.shape[1]) for _ in range(2))
    groups = None if corruption.groups is None else corruption.groups.long()
    call(source, rows.long(), out, corruption._replace(groups=groups), clean)
    return out, clean
