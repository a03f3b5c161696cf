"""A variant: one way of doing a piece of work; and whether two of them did the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FASTAE = "fastae"
MATMUL_ONLY = "products"  # the bare matrix products of the work: no result to compare, a share instead of a ratio

# The largest relative distance |a - b| / |b| (Frobenius) of two results that count as the same. In fp32 rounding moves
# a sum of 20,000 terms by 1e-5, and a pre-activation that rounding takes across the kink of relu moves a gradient by
# some 1e-4; in bf16 a gradient that is rounded eight times, 2^-9 each, moves by up to 2e-2. A missing bias, another
# factor or another activation moves it by 1e-1 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Variant:
    """`run` is what is timed, one call at a time. `results` is what it computes, from the state that all begin with."""

    name: str
    run: Callable[[], object]
    results: Callable[[], Mapping[str, Tensor]] | None = None


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> str | None:
    """None if the results are the same within the tolerance, or which differ and by how much."""
    if ours.keys() != theirs.keys():
        return f"results are {sorted(ours)} here and {sorted(theirs)} there"
    found = []
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape:
            found.append(f"{name} is {list(a.shape)} here and {list(b.shape)} there")
            continue
        distance = relative_distance(a, b)
        if not distance <= tolerance:  # NaN is no agreement
            found.append(f"{name} differs by {distance:.1e}, allowed {tolerance:.0e}")
    return "; ".join(found) or None


def relative_distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; 0 for two zeros."""
    a, b = a.detach().double(), b.detach().double()
    apart, size = torch.linalg.vector_norm(a - b).item(), torch.linalg.vector_norm(b).item()
    return 0.0 if apart == 0 else apart / size if size else float("inf")
