"""Test inputs of the kernels: numbers that suit each activation, and views of them that are awkward to address."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from fastae_emulator import poison
from fastae_kernels.elementwise import ACTIVATIONS as TABLE
from torch import Tensor

# The activations as a user writes them in PyTorch; independent of fastae_kernels.
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda p: p,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda p: F.gelu(p, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    # ATen rounds 1 - eps to 1 in half precision, which gives inf
    "logit": lambda p: torch.logit(p.float() if p.dtype.itemsize == 2 else p, 1e-6).to(p.dtype),
}


class Draw:
    """Numbers from a seed. They are drawn in fp64 on the CPU, so that every dtype and device gets the same ones.

    Errors are measured against the largest of the results. Where there is only one (`lonely`) nothing may cancel and
    nothing saturate, or fp64 itself is no truth: normal numbers then lie in (0.3, 0.7).
    """

    def __init__(self, seed: int, device: str = "cpu", lonely: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.lonely = device, lonely

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        if self.lonely:
            return self.uniform(*shape, low=0.3, high=0.7, dtype=dtype)
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype)

    def uniform(self, *shape: int, low: float, high: float, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return values.to(self.device, dtype)

    def layer(self, activation: str, M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x, w, b with p of order one; for logit p lies in (0.05, 0.95), in every third column far outside."""
        if activation == "logit":
            w = self.uniform(N, K, low=0.2, high=0.9, dtype=torch.float64) / max(K, 1)
            b = torch.tensor([0.02, -2.0, 2.0] * N, dtype=dtype, device=self.device)[:N]
            return self.uniform(M, K, low=0.4, high=1, dtype=dtype), w.to(dtype), b
        w = self.normal(N, K, dtype=dtype, scale=2 / max(K, 1) ** 0.5)
        return self.normal(M, K, dtype=dtype), w, self.normal(N, dtype=dtype)

    def saved(self, activation: str, M: int, N: int, dtype: torch.dtype) -> Tensor | None:
        """Input of an activation's backward pass: its y, its p, or nothing."""
        what = TABLE[activation].saves
        if what is None:
            return None
        if activation == "logit":
            p = self.uniform(M, N, low=0.05, high=0.95, dtype=dtype)
            p.view(-1)[::5] = 1.5
            p.view(-1)[1::5] = -0.5
            return p
        p = self.normal(M, N, dtype=torch.float64, scale=3)
        p.view(-1)[:1] = 0.5  # the one that `expanded` repeats: not in a tail, where fp64 too has lost its digits
        return (EAGER[activation](p) if what == "y" else p).to(dtype)


# ---------------------------------------------------------------- views; what lies between and beside them is NaN


def _contiguous(t: Tensor, first: int = poison.FENCE) -> Tensor:
    around = t.new_full((t.numel() + 2 * poison.FENCE,), float("nan"))
    return around[first : first + t.numel()].view(t.shape).copy_(t)


def _strided(t: Tensor) -> Tensor:
    around = t.new_full([2 * size + 3 for size in t.shape], float("nan"))
    view = around[tuple(slice(1, 1 + 2 * size, 2) for size in t.shape)]
    return view.copy_(t)


def _transposed(t: Tensor) -> Tensor:
    around = t.new_full([size + 2 for size in reversed(t.shape)], float("nan"))
    view = around.permute(*reversed(range(t.dim())))[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


@cache
def _far_memory() -> Tensor:
    """8 GiB of addresses; only what is touched becomes memory."""
    return torch.empty(2**32 + 4096, dtype=torch.float16)


def _far(t: Tensor, dim: int) -> Tensor:
    """Offsets past 2^31 elements along `dim`; wrapped to int32 they would still land inside, on zeros."""
    memory, step = _far_memory(), 2**31 // max(t.shape[dim] - 1, 1) + 7
    return memory.as_strided(t.shape, (step, 1) if dim == 0 else (1, step), 2**31).copy_(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "unaligned": lambda t: _contiguous(t, poison.FENCE + 1),
    "strided": _strided,
    "transposed": _transposed,
    "expanded rows": lambda t: _contiguous(t[:1]).expand(t.shape),
    "expanded columns": lambda t: _contiguous(t[..., :1]).expand(t.shape),
    "expanded": lambda t: _contiguous(t.reshape(-1)[:1].view([1] * t.dim())).expand(t.shape),
}
FAR: dict[str, Callable[[Tensor], Tensor]] = {
    "rows far apart": lambda t: _far(t, 0),
    "columns far apart": lambda t: _far(t, 1),
}
