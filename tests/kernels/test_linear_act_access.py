"""What numbers cannot show: that kernels read their arguments and nothing else, and that half precision rounds once."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import ACTIVATIONS, layer, normal, saved, strided, transposed
from fastae_kernels.jit import linear_act as kernels
from fastae_kernels.jit import linear_act_loss as linear_act_mse
from fastae_kernels.jit import losses as mse_loss
from fastae_kernels.jit import stack as stack_score
from fastae_kernels.jit.tile_ops import tile_of
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

M, N, K = 35, 37, 33  # each just past a tile of 32


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses that the interpreter reads: those whose mask is true."""
    seen: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def noting(self: object, ptrs: object, mask: object, *args: object) -> object:
        seen.append(ptrs.data[mask.data])
        return load(self, ptrs, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting)
    return seen


def addresses(t: Tensor) -> np.ndarray:
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (t.data_ptr() + offsets.reshape(-1) * t.element_size()).numpy()


def check(loads: list[np.ndarray], *arguments: Tensor) -> None:
    """Each element of each argument is read, and no other address."""
    read = np.unique(np.concatenate([a.astype(np.int64).reshape(-1) for a in loads]))
    own = np.unique(np.concatenate([addresses(t) for t in arguments]))
    assert not np.setdiff1d(read, own).size, "read outside its arguments"
    assert not np.setdiff1d(own, read).size, "part of an argument was never read"
    loads.clear()


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=lambda v: v.__name__)
def test_kernels_read_their_arguments_and_nothing_else(view: object, loads: list[np.ndarray]) -> None:
    x, w, b = map(view, layer("gelu", M, N, K, torch.float32))
    dy, s, s_below = view(normal(M, N)), view(normal(M, N, seed=1)), view(normal(M, K, seed=2))
    kernels.linear_act_fwd(x, w, b, "gelu", True)
    check(loads, x, w, b)
    kernels.act_bwd(dy, s, "gelu")
    check(loads, dy, s)
    kernels.linear_dgrad_act(dy, w, s_below, "gelu")
    check(loads, dy, w, s_below)
    kernels.linear_wgrad(dy, x)
    check(loads, dy, x)
    kernels.linear_wgrad(dy, x, True)
    check(loads, dy, x)
    scale = torch.tensor([1.0, 2.0, 3.0])[1]
    kernels.linear_wgrad(dy, x, True, scale)
    check(loads, dy, x, scale)


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=lambda v: v.__name__)
def test_fused_ops_read_their_arguments_and_nothing_else(
    view: object, loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_act_mse, "sum_rows", lambda partials, out: out)
    x, w, b = map(view, layer("gelu", M, N, K, torch.float32))
    t, s_below, r = view(normal(M, N)), view(normal(M, K, seed=2)), view(normal(M, seed=3))
    linear_act_mse.linear_act_mse(x, w, b, t, "gelu", "mean", r, True, True)
    check(loads, x, w, b, t, r)
    linear_act_mse.decoder_mse(x, w, b, t, "gelu", "mean", s_below, "tanh", r)
    check(loads, x, w, b, t, r, s_below)
    back, b_back = view(normal(K, N, seed=4)), view(normal(K, seed=5))
    stack_score.stack_score(x, [w, back], [b, b_back], ["gelu", "tanh"])
    check(loads, x, w, b, back, b_back)
    stack_score.stack_encode(x, [w, back], [b, b_back], ["gelu", "tanh"])
    check(loads, x, w, b, back, b_back)


def test_mse_reads_its_arguments_and_nothing_else(loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mse_loss, "sum_rows", lambda partials, out: out)
    for M, N in ((1, 5000), (70, 67), (129, 130)):
        for view in (torch.clone, strided, transposed):
            input, target = view(normal(M, N)), view(normal(M, N, seed=1))
            mse_loss.mse(input, target, "mean", True)
            check(loads, input, target)


@triton.jit
def _visit_kernel(visits_ptr, rows, columns, GROUP: tl.constexpr):
    i, j = tile_of(tl.program_id(0), rows, columns, 1, 1, GROUP)
    visits_ptr += i * columns + j
    tl.store(visits_ptr, tl.load(visits_ptr) + 1)


def test_tiles_are_visited_once_each() -> None:
    """Also where the last group of row tiles is short."""
    for rows, columns in ((1, 1), (1, 9), (9, 1), (8, 3), (11, 3), (11, 5), (23, 2)):
        visits = torch.zeros(rows + 1, columns, dtype=torch.int32)
        _visit_kernel[rows * columns,](visits, rows, columns, GROUP=8)
        assert (visits[:rows] == 1).all()
        assert not visits[rows].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_is_fp32_rounded_once(activation: str, dtype: torch.dtype) -> None:
    """The same inputs in fp32, the result rounded to nearest even: to the bit, since products of halves fit in fp32."""
    x, w, b = layer(activation, M, N, K, dtype)
    dy, s, s_below = normal(M, N, dtype=dtype), saved(activation, M, N, dtype), saved(activation, M, K, dtype)

    def both(op: object, *args: object) -> None:
        mine, wide = op(*args), op(*[a.float() if isinstance(a, Tensor) else a for a in args])
        for half, full in zip(*((r,) if isinstance(r, Tensor) else r for r in (mine, wide)), strict=True):
            assert torch.equal(half, full.to(dtype))

    both(kernels.linear_act_fwd, x, w, b, activation, True)
    both(kernels.act_bwd, dy, s, activation, True)
    both(kernels.linear_dgrad_act, dy, w, s_below, activation)
    both(kernels.linear_wgrad, dy, x, True)
    both(mse_loss.mse, dy, normal(M, N, dtype=dtype, seed=5), "sum", True)
