"""What numbers cannot show: that kernels read their arguments and nothing else, and that half precision rounds once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cases import TURNS, layer, normal, results_of, saved, short, strided, transposed
from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.jit import linear_act as kernels
from fastae_kernels.jit import linear_act_loss, losses, stack
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.jit.tile_ops import tile_of
from fastae_kernels.ops import Below, Criterion, Layer
from fastae_kernels.reference import TORCH
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

M, N, K = 35, 37, 33  # each just past a tile of 32
View = Callable[[Tensor], Tensor]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses that the interpreter reads: those whose mask is true."""
    seen: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def noting(self: object, ptrs: Any, mask: Any, *args: object) -> object:
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


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=short)
def test_kernels_read_their_arguments_and_nothing_else(view: View, loads: list[np.ndarray]) -> None:
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


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=short)
def test_fused_ops_read_their_arguments_and_nothing_else(
    view: View, loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows that do not count nothing is read, of columns that do not, the weights and the target are."""
    monkeypatch.setattr(linear_act_loss, "sum_partials", lambda pairs: None)
    x, w, b = map(view, layer("gelu", M, N, K, torch.float32))
    t, s_below, r = view(normal(M, N)), view(normal(M, K, seed=2)), view(normal(M, seed=3))
    gelu, below = Layer(w, b, "gelu"), Below(s_below, "tanh")
    criterion = Criterion(LossKind("huber", 0.7), row_weight=r)
    linear_act_loss.linear_act_loss(x, gelu, t, criterion, True)
    check(loads, x, w, b, t, r)
    linear_act_loss.decoder_loss(x, gelu, t, criterion, below)
    check(loads, x, w, b, t, r, s_below)
    few = torch.tensor([9, 33, 9])[1]
    criterion = Criterion(LossKind("mae"), "mean", r, N - 2, few)
    linear_act_loss.linear_act_loss(x, gelu, t, criterion, True)
    check(loads, x[:33], w, b, t[:33], r[:33], few)
    linear_act_loss.decoder_loss(x, gelu, t, criterion, below)
    check(loads, x[:33], w, b, t[:33], r[:33], s_below[:33], few)
    back, b_back = view(normal(K, N, seed=4)), view(normal(K, seed=5))
    stack.stack_score(x, [w, back], [b, b_back], ["gelu", "tanh"])
    check(loads, x, w, b, back, b_back)
    stack.stack_encode(x, [w, back], [b, b_back], ["gelu", "tanh"])
    check(loads, x, w, b, back, b_back)


def test_loss_reads_its_arguments_and_nothing_else(loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "sum_rows", lambda partials, out: out)
    for M, N in ((1, 5000), (70, 67), (129, 130)):
        for view in (torch.clone, strided, transposed):
            input, target = view(normal(M, N)), view(normal(M, N, seed=1))
            losses.loss(input, target, MSE, "mean", True)
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


@pytest.mark.parametrize("activation", [activation for activation, _ in TURNS])
def test_half_precision_is_fp32_rounded_once(activation: str) -> None:
    """The same inputs in fp32, the result rounded to nearest even: to the bit, since products of halves fit in fp32."""
    number = [activation for activation, _ in TURNS].index(activation)
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    M, N, K = (35, 37, 33) if number < 4 else (17, 19, 9)
    x, w, b = layer(activation, M, N, K, dtype)
    dy, s, s_below = normal(M, N, dtype=dtype), saved(activation, M, N, dtype), saved(activation, M, K, dtype)

    def both(op: Callable[..., Any], *args: object) -> None:
        mine, wide = op(*args), op(*[a.float() if isinstance(a, Tensor) else a for a in args])
        for half, full in zip(results_of(mine), results_of(wide), strict=True):
            assert torch.equal(half, full.to(dtype))

    both(kernels.linear_act_fwd, x, w, b, activation, True)
    both(kernels.act_bwd, dy, s, activation, True)
    if number < 4:  # two of each dtype: the products know no activation
        both(kernels.linear_dgrad_act, dy, w, s_below, activation)
        both(kernels.linear_wgrad, dy, x, True)
        kind = (MSE, LossKind("huber", 0.5))[number // 2]
        both(losses.loss, dy, normal(M, N, dtype=dtype, seed=5), kind, "sum", True)


# ---------------------------------------------------------------- offsets beyond int32


def test_offsets_beyond_int32() -> None:
    """Of one argument and of two, and of a step in the middle of a reduction; `fastae verify` has each argument alone.

    Offsets reach past 2^31 elements; wrapped to int32 they would still land inside the memory, on zeros.
    """
    memory = torch.empty(2**32 + 4096, dtype=torch.float16)  # 8 GiB of addresses; only what is touched becomes memory

    def far(rows: int, columns: int, by_row: bool) -> Tensor:
        step = 2**31 // ((rows if by_row else columns) - 1) + 7
        view = memory.as_strided((rows, columns), (step, 1) if by_row else (1, step), 2**31)
        return view.copy_(torch.arange(1, rows * columns + 1).view(rows, columns) / 8)

    def both(op: str, *args: Any) -> None:
        mine, theirs = (results_of(getattr(ops, op)(*args)) for ops in (TRITON, TORCH))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=0)

    long = torch.ones(33, 2, dtype=torch.float16)
    for by_row in (True, False):
        a = far(3, 3, by_row)
        both("linear_act_fwd", a, a, None, "gelu", True)
        both("act_bwd", a, a, "silu", True)
        both("linear_dgrad_act", a, a, a, "tanh")
        both("linear_wgrad", a, a, True)
        both("loss", a, torch.ones_like(a, memory_format=torch.contiguous_format), MSE, "mean", True)
        both("linear_act_loss", a, Layer(a, None, "relu"), a, Criterion(MSE, "none"), True)
        b = far(33, 2, True) if by_row else far(2, 33, False).t()  # 33 terms: the last step is what passes 2^31
        both("linear_wgrad", b, long, True)
        both("linear_act_fwd", b.t(), long.t(), None, "identity")
