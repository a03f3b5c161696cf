"""The matrix products of a step or a pass alone: what no way of writing the rest can save."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from fastae_kernels import onednn
from torch import Tensor


def products(
    layers: list[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device, backward: bool
) -> Callable[[], object]:
    """A function that multiplies as layers (in_features, out_features) do: 3 L - 1 products of a step, L of a pass.

    Each by the faster of the libraries at hand, ATen's own and on a CPU oneDNN, as found by a first trial.
    """
    calls = []
    for layer, (k, n) in enumerate(layers):
        x = torch.rand(rows, k, dtype=dtype, device=device)  # [M, K]
        w = torch.rand(n, k, dtype=dtype, device=device)  # [N, K]
        calls.append(fastest(x, w.t()))
        if backward:
            dp = torch.rand(rows, n, dtype=dtype, device=device)  # [M, N]
            calls.append(fastest(dp.t(), x))
            if layer:
                calls.append(fastest(dp, w))

    def run() -> None:
        for call in calls:
            call()

    return run


def fastest(a: Tensor, b: Tensor) -> Callable[[], object]:
    """a @ b by the library that takes the least time here."""
    libraries = multiplications(a, b)
    return libraries[0] if len(libraries) == 1 else min(libraries, key=_seconds)


def multiplications(a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
    """The ways of computing a @ b, [I, R] @ [R, J]."""
    out = a.new_empty(a.shape[0], b.shape[1])
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(a, b, out=out)]
    if a.device.type == "cpu" and onednn.multiplies(a.dtype):
        transposed = b.t()
        linear = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: linear(a, transposed, None, "none", [], ""))
    return ways


def _seconds(call: Callable[[], object], calls: int = 3, long_s: float = 0.05) -> float:
    """The least of a few calls after one to warm up, of one where it is long: noise only adds, and less to that."""
    call()
    took = list[float]()
    while len(took) < calls and sum(took) < long_s:
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return min(took)
