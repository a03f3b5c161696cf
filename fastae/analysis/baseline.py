"""Kernels that eager PyTorch and `torch.compile` launch for an op of the schedule; a model, for `fastae.explain`.

Eager is F.linear, the activation, mse_loss and their backward passes in one dtype: over the reconstruction 11 passes.
`torch.compile` joins what is elementwise around the loss, 9 passes, and leaves products to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastae_kernels.elementwise import ACTIVATIONS

from fastae.analysis.cost import Kernel


@dataclass(frozen=True)
class Shape:
    """A layer of M rows, K in_features and N out_features; `below`: the activation of the layer under it."""

    M: int
    K: int
    N: int
    activation: str
    below: str
    bias: bool
    dtype: torch.dtype


def replaced(op: str, layer: Shape) -> tuple[list[Kernel], list[Kernel]]:
    """(eager's kernels, torch.compile's) that do what the op does."""
    M, K, N = layer.M, layer.K, layer.N
    size = layer.dtype.itemsize

    def passes(name: str, *values: int) -> Kernel:
        return Kernel(name, 0, sum(values) * size, layer.dtype)

    def product(name: str, *values: int) -> Kernel:
        return Kernel(name, 2 * M * K * N, sum((M * K, K * N, M * N, *values)) * size, layer.dtype)

    forward = [product("addmm", N)] if layer.bias else [product("mm")]
    acts, acts_below = (ACTIVATIONS[name].saves is not None for name in (layer.activation, layer.below))
    dgrad = [product("dgrad"), *([passes("activation backward", 3 * M * K)] if acts_below else [])]
    if op == "linear_act_fwd":
        both = [*forward, *([passes("activation", 2 * M * N)] if acts else [])]
        return both, both
    if op == "linear_dgrad_act":
        return dgrad, dgrad
    if op == "linear_sample":  # of M x Z = N / 2 values: the sample in five ops, the divergence in six
        latents, each = M * N // 2, 2 * M * N // 2
        eager = [passes(f"sampling {n}", each) for n in range(11)]
        return [*forward, *eager], [*forward, passes("sample", 3 * latents), passes("divergence", 2 * latents)]
    if op == "linear_dgrad_sample":  # of the layer above, whose K are the latents
        eager = [passes(f"sampling backward {n}", 2 * M * K) for n in range(10)]
        return [product("dgrad"), *eager], [product("dgrad"), passes("sampling backward", 6 * M * K)]
    if op == "linear_wgrad":
        both = [product("wgrad"), *([passes("bias gradient", M * N, N)] if layer.bias else [])]
        return both, both
    if op == "act_bwd":  # of a layer whose weight is frozen and whose bias is not
        return [passes("bias gradient", M * N, N)], [passes("bias gradient", M * N, N)]
    assert op in ("linear_act_loss", "decoder_loss"), op
    more = dgrad if op == "decoder_loss" else []
    activation = [passes("activation", 2 * M * N)] if acts else []
    activation_backward = [passes("activation backward", 3 * M * N)] if acts else []
    loss = [passes("squares", 3 * M * N), passes("mean", M * N)], [passes("loss backward", 3 * M * N)]
    eager = [*forward, *activation, *loss[0], *loss[1], *activation_backward, *more]
    compiled = [*forward, passes("activation, squares, sum", 2 * M * N), passes("sum"), *loss[1], *more]
    return eager, compiled
