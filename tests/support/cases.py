"""What the kernel tests have in common: dtypes, hostile shapes, awkward views, sensible numbers for each activation."""

import torch
from fastae_kernels.reference import ACTIVATIONS as TABLE
from torch import Tensor

from fastae.verify.inputs import EAGER as EAGER  # the activations as a user writes them in PyTorch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = tuple(TABLE)

# M, N, K: one, odd, one row or column, just past a tile of 32, several tiles each way
SHAPES = ((1, 1, 1), (3, 5, 7), (1, 33, 2), (33, 1, 17), (5, 2, 65), (70, 37, 96))
EMPTY_SHAPES = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 4), (0, 3, 0), (3, 0, 0), (0, 0, 0))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, low: float, high: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * u).to(dtype)


def layer(activation: str, M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, b with p of order one; for logit p lies in (0.05, 0.95), in every third column far outside it (clamped)."""
    if activation == "logit":
        x, w = (
            uniform(M, K, low=0.4, high=1, dtype=dtype),
            uniform(N, K, low=0.2, high=0.9, dtype=torch.float64, seed=1),
        )
        b = torch.tensor([0.02, -2.0, 2.0] * N, dtype=dtype)[:N]
        return x, (w / max(K, 1)).to(dtype), b
    w = normal(N, K, dtype=torch.float64, seed=1) * (2 / max(K, 1) ** 0.5)
    return normal(M, K, dtype=dtype), w.to(dtype), normal(N, dtype=dtype, seed=2)


def saved(activation: str, M: int, N: int, dtype: torch.dtype) -> Tensor | None:
    """What the backward pass of an activation gets: its y, its p, or nothing."""
    what = TABLE[activation].saves
    if what is None:
        return None
    if activation == "logit":
        p = uniform(M, N, low=0.05, high=0.95, dtype=dtype, seed=3)
        p.view(-1)[::5] = 1.5
        p.view(-1)[1::5] = -0.5
        return p
    p = normal(M, N, dtype=torch.float64, seed=3) * 3
    return (EAGER[activation](p) if what == "y" else p).to(dtype)


# ---------------------------------------------------------------- views; what lies between their elements is NaN


def strided(t: Tensor) -> Tensor:
    around = t.new_full([2 * size + 3 for size in t.shape], float("nan"))
    view = around[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    around = t.new_full([size + 2 for size in reversed(t.shape)], float("nan"))
    view = around.permute(*reversed(range(t.dim())))[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def expanded_rows(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def expanded_columns(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


def expanded(t: Tensor) -> Tensor:
    """One number for all, as sum().backward() hands it on."""
    return t.reshape(-1)[:1].view([1] * t.dim()).expand(t.shape)


VIEWS = (strided, transposed, expanded_rows, expanded_columns, expanded)
