"""The linear+activation kernels against their twins and fp64: accuracy, views, empty shapes, kinks, splits, `out`.

`fastae verify --numerics` tries every op in every dtype with every activation, shape, view and option. Here each of
these comes once or twice, and what it has not: PyTorch's own functions as truth, odd numbers, exact integers, `out`.
"""

from collections.abc import Callable

import pytest
import torch
from accuracy import check
from cases import DTYPES, EAGER, EMPTY_SHAPES, SHAPES, TURNS, VIEWS, flat, layer, normal, saved, short, three_ways, wide
from fastae_kernels.elementwise import ACTIVATIONS
from fastae_kernels.jit import launch
from fastae_kernels.jit import linear_act as kernels
from fastae_kernels.reference import TORCH
from fastae_kernels.splits import split_rows
from torch import Tensor
from torch.nn.functional import linear

pytestmark = pytest.mark.usefixtures("poisoned")


def bits(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in tensors]


def test_poison_shows_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    x, w, b = layer("gelu", 3, 5, 7, torch.float32)
    written = *kernels.linear_act_fwd(x, w, b, "gelu", True), *kernels.act_bwd(x, x, "gelu", True)
    written += *kernels.linear_wgrad(x, x, True), kernels.linear_dgrad_act(x, x[:, :3].mT, None, "relu")
    assert all(t.isnan().all() for t in written)


# ---------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("activation", "dtype"), TURNS, ids=short)
def test_linear_act_fwd(activation: str, dtype: torch.dtype) -> None:
    """As a user writes it, and y is the same whether p is kept or not."""
    number = list(ACTIVATIONS).index(activation)
    x, w, bias = layer(activation, *SHAPES[number % len(SHAPES)], dtype)
    for b in (bias, None):
        y, p = kernels.linear_act_fwd(x, w, b, activation, keep_p=True)
        same_p, true_p = linear(x, w, b), linear(*wide((x, w, b)))
        check(p, same_p, true_p)
        check(y, EAGER[activation](same_p), EAGER[activation](true_p))
        y_alone, nothing = kernels.linear_act_fwd(x, w, b, activation)
        assert nothing is None
        assert torch.equal(y_alone, y)


@pytest.mark.parametrize(("activation", "dtype"), TURNS, ids=short)
def test_act_bwd(activation: str, dtype: torch.dtype) -> None:
    number, shapes = list(ACTIVATIONS).index(activation), ((1, 300), (300, 1), (70, 67), (33, 130), (3, 5))
    for M, N in (shapes[number % 5], shapes[(number + 2) % 5]):
        dy = normal(M, N, dtype=dtype)
        three_ways("act_bwd", dy, saved(activation, M, N, dtype), activation, True)
    assert kernels.act_bwd(dy, saved(activation, M, N, dtype), activation)[1] is None


@pytest.mark.parametrize(("activation", "dtype"), TURNS[::3], ids=short)  # each dtype once
def test_linear_dgrad_act(activation: str, dtype: torch.dtype) -> None:
    """With nothing saved the activation's name says nothing."""
    M, N, K = SHAPES[list(ACTIVATIONS).index(activation) % len(SHAPES)]
    dp, w = normal(M, N, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
    three_ways("linear_dgrad_act", dp, w, saved(activation, M, K, dtype), activation)
    three_ways("linear_dgrad_act", dp, w, None, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_linear_wgrad(dtype: torch.dtype) -> None:
    for (M, N, K), need_db in zip(SHAPES, (True, False) * 3, strict=True):
        three_ways("linear_wgrad", normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1), need_db)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_wgrad_with_a_scale(dtype: torch.dtype) -> None:
    """A number on the device, here one between others; no in_features leave db alone."""
    shapes, dtypes = ((40, 37, 9), (3, 5, 7), (33, 1, 17), (5, 3, 0), (0, 3, 4)), (torch.bfloat16, torch.float32)
    for number, ((M, N, K), value) in enumerate(zip(shapes, (1 / 300, -3.0, 0.0, 1 / 300, -3.0), strict=True)):
        dp, x = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1)
        scale = torch.tensor([float("nan"), value, float("nan")], dtype=dtypes[number % 2])[1]
        three_ways("linear_wgrad", dp, x, True, scale=scale)
        three_ways("linear_wgrad", dp, x, False, scale=scale)
        plain, one = kernels.linear_wgrad(dp, x, True), kernels.linear_wgrad(dp, x, True, torch.ones(()))
        assert all(map(torch.equal, plain, one))


def test_the_scale_multiplies_before_the_rounding() -> None:
    """The sums overflow fp16, scaled they do not; unscaled gradients of 1 / n would be below its smallest number."""
    dp, x = torch.full((1100, 3), 100.0, dtype=torch.float16), torch.full((1100, 2), 10.0, dtype=torch.float16)
    for M, scale in ((1100, 2.0**-10), (40, 2.0**-26), (1100, 2.0**-26)):  # in splits and in one piece
        dw, db = kernels.linear_wgrad(dp[:M], x[:M], True, torch.tensor(scale))
        assert (dw == torch.tensor(M * 1000.0 * scale).half()).all()
        assert (db == torch.tensor(M * 100.0 * scale).half()).all()
    assert split_rows(1100, 3, 2)[0] == 2


# ---------------------------------------------------------------- results written where the caller says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_out(dtype: torch.dtype) -> None:
    """The same bits as in a fresh tensor, in the caller's own one and nowhere beside it."""
    for M, N, K in ((35, 37, 33), (3, 4, 0), (0, 3, 4)):
        x, w, b = layer("gelu", M, N, K, dtype)
        y, p, dx = x.new_empty(M, N), x.new_empty(M, N), x.new_empty(M, K)
        fresh = kernels.linear_act_fwd(x, w, b, "gelu")[0]
        for keep_p, p_out in ((False, None), (True, None), (True, p)):
            again, p_again = kernels.linear_act_fwd(x, w, b, "gelu", keep_p, (y, p_out))
            assert again is y
            assert (p_again is not None) == keep_p
            assert p_out is None or p_again is p
            assert torch.equal(y, fresh)
        dp, below = normal(M, N, dtype=dtype), saved("gelu", M, K, dtype)
        assert kernels.linear_dgrad_act(dp, w, below, "gelu", dx) is dx
        assert torch.equal(dx, kernels.linear_dgrad_act(dp, w, below, "gelu"))
    for M, N, K in ((35, 37, 33), (1100, 5, 3), (3, 4, 0), (0, 3, 4)):
        dp, x, scale = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1), torch.tensor(0.3)
        dw, db = dp.new_empty(N, K), dp.new_empty(N)
        again = kernels.linear_wgrad(dp, x, True, scale, (dw, db))
        assert again[0] is dw
        assert again[1] is db
        assert all(map(torch.equal, again, kernels.linear_wgrad(dp, x, True, scale)))
    assert kernels.linear_wgrad(dp, x, False, None, (dw.fill_(7), None))[1] is None
    assert torch.equal(dw, kernels.linear_wgrad(dp, x)[0])


# ---------------------------------------------------------------- awkward views, of all arguments at once


@pytest.mark.parametrize("view", VIEWS, ids=short)
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    (M, N, K), dtype = (35, 37, 33), (torch.float32, torch.bfloat16)[VIEWS.index(view) % 2]
    x, w, b = layer("gelu", M, N, K, dtype)
    dy, s, s_below = normal(M, N, dtype=dtype), saved("gelu", M, N, dtype), saved("gelu", M, K, dtype)
    three_ways("linear_act_fwd", view(x), view(w), flat(view)(b), "gelu", True)
    three_ways("act_bwd", view(dy), view(s), "gelu", True)
    three_ways("act_bwd", view(dy), None, "identity", True)
    three_ways("linear_dgrad_act", view(dy), view(w), view(s_below), "gelu")
    three_ways("linear_wgrad", view(dy), view(x), True)


# ---------------------------------------------------------------- empty


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=short)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_empty(activation: str, shape: tuple[int, int, int]) -> None:
    """No rows: zero gradients. No in_features: y = f(b). No out_features: dx = 0."""
    M, N, K = shape
    x, w, b = layer(activation, M, N, K, torch.float32)
    dy, s, s_below = normal(M, N), saved(activation, M, N, torch.float32), saved(activation, M, K, torch.float32)
    three_ways("linear_act_fwd", x, w, b, activation, True)
    three_ways("linear_act_fwd", x, w, None, activation)
    three_ways("act_bwd", dy, s, activation, True)
    three_ways("linear_dgrad_act", dy, w, s_below, activation)
    three_ways("linear_wgrad", dy, x, False)
    three_ways("linear_wgrad", dy, x, True)


# ---------------------------------------------------------------- kinks, inf, NaN

ODD = [0.0, -0.0, 1e-30, -1e-30, 1e-6, 0.5, 1 - 1e-6, 1.0, 2.0, -3.0, 19.5, 20.0, 20.5, 80.0, -80.0, 200.0, -200.0]
ODD += [1e18, -1e18, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinks_inf_and_nan_as_eager_autograd_has_them(activation: str) -> None:
    """With weight [[1]] p is x to the last bit; each row stands alone, so nothing hides behind a larger number."""
    for dtype in (torch.float32, torch.float64):
        x, one = torch.tensor(ODD, dtype=dtype)[:, None], torch.ones(1, 1, dtype=dtype)
        if activation == "gelu":
            x = x[x != float("inf"), None]  # PyTorch's vectorised fp32 gelu(inf) is NaN; the kernel's inf is right
        p = x.clone().requires_grad_()
        wanted = EAGER[activation](p)
        (wanted_grad,) = torch.autograd.grad(wanted, p, torch.full_like(x, 3.0))
        tolerance = dict.fromkeys(("rtol", "atol"), 8 * torch.finfo(dtype).eps)
        for implementation in (kernels, TORCH):
            y, kept = implementation.linear_act_fwd(x, one, None, activation, True)
            dy, s = torch.full_like(x, 3.0), {"y": y, "p": kept, None: None}[ACTIVATIONS[activation].saves]
            dp, _ = implementation.act_bwd(dy, s, activation)
            torch.testing.assert_close(y, wanted.detach(), **tolerance, equal_nan=True)
            torch.testing.assert_close(dp, wanted_grad, **tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_half_precision_stores_nan_inf_and_overflow_as_pytorch_does(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        x = torch.tensor([[value, 1.0], [1.0, 2.0]]).to(dtype)
        w = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).to(dtype)
        for activation in ("identity", "relu", "leaky_relu"):
            y, _ = kernels.linear_act_fwd(x, w, None, activation)
            torch.testing.assert_close(y, EAGER[activation](linear(x, w)), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- splits along M


@pytest.mark.parametrize("M", [1025, 1536, 2049])
def test_wgrad_in_splits(M: int) -> None:
    (N, K), dtype = (5, 3), {1025: torch.float32, 1536: torch.float64, 2049: torch.bfloat16}[M]
    assert split_rows(M, N, K)[0] >= 2
    dp, x = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1)
    first = three_ways("linear_wgrad", dp, x, True)
    assert all(map(torch.equal, bits(*first), bits(*kernels.linear_wgrad(dp, x, True))))
    three_ways("linear_wgrad", dp.t().contiguous().t(), x[:, :1].expand(M, K), False, torch.tensor(0.25))


def test_wgrad_counts_every_row_once() -> None:
    """Whole numbers below 2^24: the sums are exact, so a row lost or taken twice shows as a wrong integer."""
    for M in (511, 512, 513, 1024, 1025, 1300, 3000):
        dp = torch.arange(1, M + 1, dtype=torch.float32)[:, None]
        dw, db = kernels.linear_wgrad(dp, torch.ones(M, 2), True)
        assert dw.tolist() == [[M * (M + 1) / 2] * 2]
        assert db.tolist() == [M * (M + 1) / 2]


def test_act_bwd_sums_every_row_block_once() -> None:
    for M, N in ((4097, 1), (5000, 3), (129, 70)):
        dy = torch.arange(1, M + 1, dtype=torch.float32)[:, None].expand(M, N)
        _, db = kernels.act_bwd(dy, None, "identity", True)
        assert db.tolist() == [M * (M + 1) / 2] * N


# ---------------------------------------------------------------- a number as the scale, for every implementation


def test_a_scale_that_is_a_number() -> None:
    """It is multiplied in before half precision rounds, as one on the device is."""
    dp, x = normal(40, 5, dtype=torch.float16), normal(40, 3, dtype=torch.float16, seed=1)
    for scale in (2.0**-20, 3.0):
        results = three_ways("linear_wgrad", dp, x, True, scale)
        assert all(map(torch.equal, results, kernels.linear_wgrad(dp, x, True, torch.tensor(scale))))
        assert all(t.any() for t in results)
