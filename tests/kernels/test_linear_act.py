"""The linear+activation kernels against their twins and fp64: accuracy, views, empty and huge shapes, splits."""

import subprocess
import sys

import pytest
import torch
from accuracy import check, check_all
from cases import ACTIVATIONS, DTYPES, EAGER, EMPTY_SHAPES, SHAPES, VIEWS, layer, normal, saved
from fastae_kernels import reference
from fastae_kernels.jit import linear_act as kernels
from torch import Tensor
from torch.nn.functional import linear

pytestmark = pytest.mark.usefixtures("poisoned")


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def three_ways(name: str, *args: object, **options: object) -> None:
    """The kernel, the twin, and the twin in fp64 on the same numbers."""
    truth = getattr(reference, name)(*[a.double() if isinstance(a, Tensor) else a for a in args], **options)
    same = getattr(reference, name)(*args, **options)
    result = getattr(kernels, name)(*args, **options)
    if isinstance(result, Tensor):
        result, same, truth = [result], [same], [truth]
    check_all(result, same, truth)
    assert all(t is None or t.is_contiguous() for t in result)


def test_poison_shows_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.tiles, "launch", lambda *_, **__: None)
    x, w, b = layer("gelu", 3, 5, 7, torch.float32)
    written = *kernels.linear_act_fwd(x, w, b, "gelu", True), *kernels.act_bwd(x, x, "gelu", True)
    written += *kernels.linear_wgrad(x, x, True), kernels.linear_dgrad_act(x, x[:, :3].mT, None, "relu")
    assert all(t.isnan().all() for t in written)


# ---------------------------------------------------------------- accuracy: op x dtype x activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_fwd(activation: str, dtype: torch.dtype) -> None:
    for (M, N, K), bias in zip(SHAPES, (True, True, False, True, False, True), strict=True):
        x, w, b = layer(activation, M, N, K, dtype)
        if not bias:
            b = None
        y, p = kernels.linear_act_fwd(x, w, b, activation, keep_p=True)
        same_p, true_p = linear(x, w, b), linear(*wide(x, w, b))
        check(p, same_p, true_p)
        check(y, EAGER[activation](same_p), EAGER[activation](true_p))
        y_alone, nothing = kernels.linear_act_fwd(x, w, b, activation)
        assert nothing is None
        assert torch.equal(y_alone, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_bwd(activation: str, dtype: torch.dtype) -> None:
    for M, N in ((1, 1), (3, 5), (1, 300), (300, 1), (70, 67), (33, 130)):
        dy = normal(M, N, dtype=dtype)
        three_ways("act_bwd", dy, saved(activation, M, N, dtype), activation, True)
    assert kernels.act_bwd(dy, saved(activation, M, N, dtype), activation)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_dgrad_act(activation: str, dtype: torch.dtype) -> None:
    for M, N, K in SHAPES:
        dp, w = normal(M, N, dtype=dtype), normal(N, K, dtype=dtype, seed=1)
        three_ways("linear_dgrad_act", dp, w, saved(activation, M, K, dtype), activation)
        three_ways("linear_dgrad_act", dp, w, None, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("need_db", [True, False])
def test_linear_wgrad(need_db: bool, dtype: torch.dtype) -> None:
    for M, N, K in SHAPES:
        three_ways("linear_wgrad", normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1), need_db)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wgrad_with_a_scale(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """A number on the device, here one between others; 1100 rows are split in two, no in_features leave db alone."""
    for M, N, K in (*SHAPES[:2], (70, 37, 96), (1100, 5, 3), (5, 3, 0), (0, 3, 4)):
        dp, x = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1)
        for value in (1 / 300, -3.0, 0.0):
            scale = torch.tensor([float("nan"), value, float("nan")], dtype=scale_dtype)[1]
            three_ways("linear_wgrad", dp, x, True, scale=scale)
            three_ways("linear_wgrad", dp, x, False, scale=scale)
        plain, one = kernels.linear_wgrad(dp, x, True), kernels.linear_wgrad(dp, x, True, torch.ones(()))
        assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))


def test_the_scale_multiplies_before_the_rounding() -> None:
    """The sums overflow fp16, scaled they do not; unscaled gradients of 1 / n would be below its smallest number."""
    dp, x = torch.full((600, 3), 200.0, dtype=torch.float16), torch.full((600, 2), 10.0, dtype=torch.float16)
    for M in (600, 40):  # in splits and in one piece
        for scale in (2.0**-10, 2.0**-26):
            dw, db = kernels.linear_wgrad(dp[:M], x[:M], True, torch.tensor(scale))
            assert (dw == torch.tensor(M * 2000.0 * scale).half()).all()
            assert (db == torch.tensor(M * 200.0 * scale).half()).all()


# ---------------------------------------------------------------- results written where the caller says


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out(dtype: torch.dtype) -> None:
    """The same bits as in a fresh tensor, in the caller's own one and nowhere beside it."""
    for M, N, K in ((3, 5, 7), (70, 37, 96), (1100, 5, 3), (3, 4, 0), (0, 3, 4)):
        x, w, b = layer("gelu", M, N, K, dtype)
        dp, below = normal(M, N, dtype=dtype), saved("gelu", M, K, dtype)
        y, p, dx, dw, db = (x.new_empty(shape) for shape in ((M, N), (M, N), (M, K), (N, K), (N,)))
        for keep_p, p_out in ((False, None), (True, None), (True, p)):
            again, p_again = kernels.linear_act_fwd(x, w, b, "gelu", keep_p, (y, p_out))
            assert again is y
            assert (p_again is not None) == keep_p
            assert p_out is None or p_again is p
            assert torch.equal(y, kernels.linear_act_fwd(x, w, b, "gelu")[0])
        assert kernels.linear_dgrad_act(dp, w, below, "gelu", dx) is dx
        assert torch.equal(dx, kernels.linear_dgrad_act(dp, w, below, "gelu"))
        scale = torch.tensor(0.3)
        dw_again, db_again = kernels.linear_wgrad(dp, x, True, scale, (dw, db))
        assert dw_again is dw
        assert db_again is db
        fresh_dw, fresh_db = kernels.linear_wgrad(dp, x, True, scale)
        assert torch.equal(dw, fresh_dw)
        assert torch.equal(db, fresh_db)
        assert kernels.linear_wgrad(dp, x, False, None, (dw.fill_(7), None))[1] is None
        assert torch.equal(dw, kernels.linear_wgrad(dp, x)[0])


# ---------------------------------------------------------------- awkward views


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_each_argument_as_a_view(activation: str, dtype: torch.dtype, view: object) -> None:
    M, N, K = 35, 37, 33
    x, w, b = layer(activation, M, N, K, dtype)
    dy, s, s_below = normal(M, N, dtype=dtype), saved(activation, M, N, dtype), saved(activation, M, K, dtype)
    bias_view = view(b) if view.__name__ in ("strided", "expanded") else b
    for args in ((view(x), w, b), (x, view(w), b), (x, w, bias_view), (view(x), view(w), bias_view)):
        three_ways("linear_act_fwd", *args, activation, True)
    for args in ((view(dy), s), (dy, view(s)), (view(dy), view(s)), (view(dy), None)):
        three_ways("act_bwd", *args, activation if args[1] is not None else "identity", True)
    for args in ((view(dy), w, s_below), (dy, view(w), s_below), (dy, w, view(s_below)), (view(dy), view(w), None)):
        three_ways("linear_dgrad_act", *args, activation)
    for args in ((view(dy), x), (dy, view(x)), (view(dy), view(x))):
        three_ways("linear_wgrad", *args, True)


# ---------------------------------------------------------------- empty


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "gelu", "sigmoid"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinks_inf_and_nan_as_eager_autograd_has_them(activation: str, dtype: torch.dtype) -> None:
    """With weight [[1]] p is x to the last bit; each row stands alone, so nothing hides behind a larger number."""
    x, one = torch.tensor(ODD, dtype=dtype)[:, None], torch.ones(1, 1, dtype=dtype)
    if activation == "gelu":
        x = x[x != float("inf"), None]  # PyTorch's vectorised fp32 gelu(inf) is NaN; the kernel's inf is right
    p = x.clone().requires_grad_()
    wanted = EAGER[activation](p)
    (wanted_grad,) = torch.autograd.grad(wanted, p, torch.full_like(x, 3.0))
    if activation == "softplus":
        # Above 20 PyTorch's derivative jumps from 1 - 2e-9 to 1; one written from y alone goes on smoothly.
        wanted_grad = 3.0 * torch.sigmoid(x)
    for implementation in (kernels, reference):
        y, kept = implementation.linear_act_fwd(x, one, None, activation, True)
        dy = torch.full_like(x, 3.0)
        dp, _ = implementation.act_bwd(
            dy, {"y": y, "p": kept, None: None}[reference.ACTIVATIONS[activation].saves], activation
        )
        tiny = torch.finfo(dtype).eps
        torch.testing.assert_close(y, wanted.detach(), rtol=8 * tiny, atol=8 * tiny, equal_nan=True)
        torch.testing.assert_close(dp, wanted_grad, rtol=8 * tiny, atol=8 * tiny, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_half_precision_stores_nan_inf_and_overflow_as_pytorch_does(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[value, 1.0], [1.0, 2.0]]).to(dtype)
    w = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).to(dtype)
    for activation in ("identity", "relu", "leaky_relu"):
        y, _ = kernels.linear_act_fwd(x, w, None, activation)
        torch.testing.assert_close(y, EAGER[activation](linear(x, w)), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- splits along M


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1025, 1536, 2049])
def test_wgrad_in_splits(M: int, dtype: torch.dtype) -> None:
    N, K = 5, 3
    assert kernels.split_rows_of(M, N, K)[0] >= 2
    dp, x = normal(M, N, dtype=dtype), normal(M, K, dtype=dtype, seed=1)
    three_ways("linear_wgrad", dp, x, True)
    three_ways("linear_wgrad", dp.t().contiguous().t(), x[:, :1].expand(M, K), False)
    first, again = kernels.linear_wgrad(dp, x, True), kernels.linear_wgrad(dp, x, True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True))


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


@pytest.mark.parametrize("M", [0, 1, 127, 128, 511, 512, 513, 1024, 1025, 5000, 65536, 10**6 + 1, 2**31 + 5])
def test_split_rows_cover_each_row_once(M: int) -> None:
    for N, K in ((1, 1), (30, 64), (784, 256), (256, 784), (20000, 512), (3, 0), (0, 3)):
        splits, rows = kernels.split_rows_of(M, N, K)
        assert splits >= 1
        assert rows % 128 == 0, "a split is whole reduction steps"
        assert splits * rows >= M, "rows left over"
        assert splits == 1 or (splits - 1) * rows < M, "a split with no rows"
        assert splits <= kernels.SPLIT_PROGRAMS


def test_a_split_has_at_least_split_rows() -> None:
    for M in (513, 1025, 1300, 5000):
        splits, rows = kernels.split_rows_of(M, 30, 64)
        assert splits == 1 or rows >= kernels.SPLIT_ROWS, f"{M} rows: {splits} splits of {rows}"


def test_splits_do_not_depend_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a split must follow from the shape alone")

    before = kernels.split_rows_of(5000, 30, 64)
    for name in ("choose", "family", "interpreted"):
        monkeypatch.setattr(kernels.tiles, name, fail)
    assert kernels.split_rows_of(5000, 30, 64) == before


# ---------------------------------------------------------------- offsets beyond int32

FAR = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from fastae_kernels import reference
from fastae_kernels.jit import linear_act as kernels
from fastae_kernels.jit import losses as mse_loss
memory = torch.empty(2**32 + 4096, dtype=torch.float16)  # 8 GiB of addresses; only what is touched becomes memory
def far(rows, cols, step):
    # Offsets reach past 2^31; wrapped to int32 they would still land inside `memory`, on the zeros before the view.
    view = memory.as_strided((rows, cols), step, 2**31)
    assert max((rows - 1) * step[0], (cols - 1) * step[1]) >= 2**31 > max(step)
    return view.copy_(torch.arange(1, rows * cols + 1).view(rows, cols) / 8)
def same(result, wanted):
    for mine, theirs in zip(result, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=0)
def both(name, *args):
    mine, theirs = getattr(kernels, name)(*args), getattr(reference, name)(*args)
    same(*(((mine,), (theirs,)) if torch.is_tensor(mine) else (mine, theirs)))
near = torch.ones(3, 3, dtype=torch.float16)
for step in ((2**30 + 7, 1), (1, 2**30 + 7)):
    a = far(3, 3, step)
    both("linear_act_fwd", a, near, None, "gelu", True)
    both("linear_act_fwd", near, a, near[0], "relu", False)
    both("act_bwd", a, near, "sigmoid", True)
    both("act_bwd", near, a, "silu", True)
    both("linear_dgrad_act", a, near, None, "identity")
    both("linear_dgrad_act", near, a, None, "identity")
    both("linear_dgrad_act", near, near, a, "tanh")
    both("linear_wgrad", a, near, True)
    both("linear_wgrad", near, a, True)
    same(mse_loss.mse(a, near, "mean", True), reference.mse(a, near, "mean", True))
    same(mse_loss.mse(near, a, "mean", True), reference.mse(near, a, "mean", True))
# 33 terms: the step from the first 32 to the last one is what passes 2^31
long = torch.ones(33, 2, dtype=torch.float16)
b = far(33, 2, (2**26 + 1, 1))
both("linear_wgrad", b, long, True)
both("linear_wgrad", long, b, True)
both("linear_dgrad_act", near[:, :1].expand(3, 33), b, None, "identity")
b = far(2, 33, (1, 2**26 + 1))
both("linear_act_fwd", b, long.t(), None, "identity", False)
both("linear_act_fwd", long.t(), b, None, "identity", False)
both("linear_dgrad_act", b, long, None, "identity")
print("reached the end")
"""


def test_offsets_beyond_int32() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", FAR], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reached the end\n"
