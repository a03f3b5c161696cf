"""Decoder layer and loss in one kernel, and the layer below with them: accuracy, views, empty shapes, determinism."""

import pytest
import torch
from accuracy import FLOOR, check, check_all
from cases import ACTIVATIONS, DTYPES, EMPTY_SHAPES, SHAPES, VIEWS, layer, normal, saved, strided, transposed, uniform
from fastae_kernels import reference
from fastae_kernels.jit import linear_act, tiles
from fastae_kernels.jit import linear_act_loss as kernels
from fastae_kernels.jit import losses as mse_loss
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

REDUCTIONS = ("mean", "sum", "none")


def wide(a: object) -> object:
    return a.double() if isinstance(a, Tensor) else a


def three_ways(name: str, *args: object, **options: object) -> tuple[Tensor | None, ...]:
    """The kernel, the twin, and the twin in fp64 on the same numbers.

    Loss and gradient come from one rounding of the inputs, but the loss is fp32 where they are half precision.
    """
    truth = getattr(reference, name)(*map(wide, args), **{key: wide(value) for key, value in options.items()})
    same = getattr(reference, name)(*args, **options)
    result = getattr(kernels, name)(*args, **options)
    check_all(result, same, truth)
    assert all(t is None or t.is_contiguous() for t in result)
    return result


def target_of(M: int, N: int, dtype: torch.dtype, activation: str = "") -> Tensor:
    return normal(M, N, dtype=dtype, seed=4)


def test_poison_shows_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "launch", lambda *_, **__: None)
    x, w, b = layer("gelu", 3, 5, 7, torch.float32)
    written = (*kernels.linear_act_mse(x, w, b, x[:, :5], "gelu", "none", None, True, True),)
    written += kernels.decoder_mse(x, w, b, x[:, :5], "gelu", "mean", x, "relu")
    assert all(t.isnan().all() for t in written)


# ---------------------------------------------------------------- accuracy: dtype x activation, every reduction


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_mse(activation: str, dtype: torch.dtype) -> None:
    for (M, N, K), reduction in zip(SHAPES, REDUCTIONS * 2, strict=True):
        x, w, b = layer(activation, M, N, K, dtype)
        t = target_of(M, N, dtype)
        row_weight = None if K == 17 else uniform(M, low=0, high=3, dtype=torch.float32, seed=5)
        three_ways("linear_act_mse", x, w, b, t, activation, reduction, row_weight, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoder_mse(activation: str, dtype: torch.dtype) -> None:
    """The activation is that of the decoder in one half of the cases, that of the layer below in the other."""
    # Not 2 columns: dx of one row would be two sums of 33 terms; if both cancel, nothing is left to measure against.
    shapes = [(M, N, 20 if K == 2 else K) for M, N, K in SHAPES]
    for (M, N, K), reduction in zip(shapes, REDUCTIONS * 2, strict=True):
        x, w, b = layer(activation, M, N, K, dtype)
        t, below = target_of(M, N, dtype), saved(activation, M, K, dtype)
        row_weight = None if K == 17 else uniform(M, low=0, high=3, dtype=torch.float32, seed=5)
        three_ways("decoder_mse", x, w, b, t, activation, reduction, below, activation, row_weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_not_asked_for(reduction: str) -> None:
    """No bias, no weights, no dp, no y; and the loss does not depend on what is asked for."""
    M, N, K = 70, 37, 33
    x, w, b = layer("tanh", M, N, K, torch.float32)
    t = target_of(M, N, torch.float32)
    for bias in (b, None):
        for need_dp, need_y in ((False, False), (True, False), (False, True), (True, True)):
            result = three_ways("linear_act_mse", x, w, bias, t, "tanh", reduction, None, need_dp, need_y)
            assert [r is not None for r in result[1:]] == [need_dp, need_y]
            assert torch.equal(result[0], kernels.linear_act_mse(x, w, bias, t, "tanh", reduction)[0])
        three_ways("decoder_mse", x, w, bias, t, "tanh", reduction, None, "identity")


def test_out() -> None:
    x, w, b = layer("gelu", 35, 37, 33, torch.bfloat16)
    t = target_of(35, 37, torch.bfloat16)
    out = x.new_empty(35, 37)
    loss, dp, y = kernels.linear_act_mse(x, w, b, t, "gelu", "mean", None, True, True, (out, None, None))
    assert dp is out
    assert y is not out
    fresh = kernels.linear_act_mse(x, w, b, t, "gelu", "mean", None, True, True)
    assert torch.equal(loss, fresh[0])
    assert torch.equal(out, fresh[1])


# ---------------------------------------------------------------- what the fusion is for


@pytest.mark.parametrize("op", ["linear_act_mse", "decoder_mse"])
def test_near_convergence_the_error_is_not_rounded_away(op: str) -> None:
    """bf16, residuals of 0.01: y rounded to bf16 before the subtraction leaves a gradient more than 10 % wrong."""
    M, N, K = 64, 90, 48
    x, w, b = layer("identity", M, N, K, torch.bfloat16)
    p = x.double() @ w.double().T + b.double()
    t = (p + 0.01 * normal(M, N, dtype=torch.float64, seed=6)).float()
    truth = p - t.double()

    def error(dp: Tensor) -> float:
        return ((dp.double() - truth).norm() / truth.norm()).item()

    args = (x, w, b, t, "identity", "sum")
    fused = (
        kernels.linear_act_mse(*args, need_dp=True)
        if op == "linear_act_mse"
        else kernels.decoder_mse(*args, None, "identity")
    )
    assert error(fused[1]) < 0.005
    y, _ = linear_act.linear_act_fwd(x, w, b, "identity")
    _, dinput = mse_loss.mse(y, t.bfloat16(), "sum", True)
    assert error(dinput / 2) > 0.1
    loss = truth.square().sum()
    assert abs(fused[0].double() - loss) < 1e-5 * loss


def test_dp_does_not_vanish_in_fp16() -> None:
    """Near convergence dp / n would be below the smallest fp16; the loss's 2 / n is left to `linear_wgrad`."""
    x, w, b = layer("identity", 64, 90, 48, torch.float16)
    t = (x.double() @ w.double().T + b.double() + 1e-3).float()
    _, dp, _ = kernels.linear_act_mse(x, w, b, t, "identity", "mean", None, True)
    assert dp.all()
    n = dp.numel()
    dw, _ = linear_act.linear_wgrad(dp, x, True, torch.tensor(2 / n))
    truth = (2 / n) * (x.double() @ w.double().T + b.double() - t.double()).T @ x.double()
    check(dw, truth.half(), truth)


@pytest.mark.parametrize("op", ["linear_act_mse", "decoder_mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_against_autograd(op: str, dtype: torch.dtype) -> None:
    """Loss and gradients as a user writes them, in fp64: dp, dx and the factor 2 / n that is left out of them."""
    M, N, K = 35, 37, 33
    x, w, b = layer("sigmoid", M, N, K, dtype)
    t = target_of(M, N, dtype)
    row_weight = uniform(M, low=0, high=3, seed=5)
    hidden = x.double().requires_grad_()
    y = torch.sigmoid(hidden @ w.double().T + b.double())
    for reduction in REDUCTIONS:
        per_row = (y - t.double()).square().mean(1) * row_weight.double()
        loss = {"none": per_row, "mean": per_row.mean(), "sum": per_row.sum() * N}[reduction]
        (dx,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
        n = {"none": N, "mean": M * N, "sum": 1}[reduction]
        if op == "decoder_mse":
            mine, _, mine_dx = kernels.decoder_mse(x, w, b, t, "sigmoid", reduction, None, "identity", row_weight)
            check(mine_dx, (dx * n / 2).to(dtype), dx * n / 2)
        else:
            mine, dp, _ = kernels.linear_act_mse(x, w, b, t, "sigmoid", reduction, row_weight, True)
            check(dp.double() @ w.double(), dx * n / 2, dx * n / 2, FLOOR[dtype])
        assert mine.dtype == torch.float32
        check(mine, loss.detach().float(), loss.detach())


# ---------------------------------------------------------------- awkward views


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_argument_as_a_view(dtype: torch.dtype, view: object) -> None:
    M, N, K = 35, 37, 33
    x, w, b = layer("gelu", M, N, K, dtype)
    t, below, r = target_of(M, N, dtype), saved("tanh", M, K, dtype), uniform(M, low=0, high=3, dtype=dtype, seed=5)
    flat = view if view.__name__ in ("strided", "expanded") else torch.clone
    for i in range(6):
        args = [x, w, b, t, r, below]
        args[i] = (flat if i in (2, 4) else view)(args[i])
        x_, w_, b_, t_, r_, below_ = args
        three_ways("linear_act_mse", x_, w_, b_, t_, "gelu", "mean", r_, True, True)
        three_ways("decoder_mse", x_, w_, b_, t_, "gelu", "none", below_, "tanh", r_)


def test_tied_weights_and_saved_is_x() -> None:
    """The decoder of a tied autoencoder has the encoder's weights transposed; what relu saved is the decoder's x."""
    h, w, b = layer("relu", 35, 37, 33, torch.bfloat16)
    h = h.relu()
    tied = w.t().contiguous().t()
    t = target_of(35, 37, torch.bfloat16)
    results = [kernels.decoder_mse(h, v, b, t, "sigmoid", "mean", s, "relu") for v, s in ((w, h), (tied, h.clone()))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    three_ways("decoder_mse", h, tied, b, t, "sigmoid", "mean", h, "relu")


def test_x_is_its_own_target() -> None:
    x, w, b = layer("sigmoid", 35, 33, 33, torch.float32)
    for reduction in REDUCTIONS:
        three_ways("linear_act_mse", x, w, b, x, "sigmoid", reduction, None, True)
        three_ways("decoder_mse", x, w, b, x, "sigmoid", reduction, x, "identity")


def test_a_wide_hidden_layer() -> None:
    """256 columns stay on chip and 257 do not."""
    for M, N, K in ((33, 3, 256), (2, 40, 255)):
        x, w, b = layer("relu", M, N, K, torch.float32)
        three_ways("decoder_mse", x, w, b, target_of(M, N, torch.float32), "relu", "mean", x, "relu")
    with pytest.raises(ValueError, match=r"^decoder_mse: x must have at most 256 columns; got \[2, 257\]$"):
        kernels.decoder_mse(normal(2, 257), normal(3, 257), None, normal(2, 3), "relu", "mean", None, "identity")


def test_fits_decoder_mse() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert [kernels.fits_decoder_mse(K, dtype) for K in (1, 128, 256, 257)] == [True, True, True, False]
    assert [kernels.fits_decoder_mse(K, torch.float64) for K in (1, 128, 129)] == [True, True, False]


# ---------------------------------------------------------------- empty, inf, NaN


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    """No rows or no targets: a sum of 0, a mean of NaN. No in_features: y = f(b)."""
    M, N, K = shape
    x, w, b = layer("sigmoid", M, N, K, torch.float32)
    t = target_of(M, N, torch.float32)
    for reduction in REDUCTIONS:
        for row_weight in (None, torch.ones(M)):
            three_ways("linear_act_mse", x, w, b, t, "sigmoid", reduction, row_weight, True, True)
            three_ways("decoder_mse", x, w, b, t, "sigmoid", reduction, x, "tanh", row_weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inf_and_nan_stay_in_their_row(value: float) -> None:
    x, w, b = layer("relu", 35, 37, 33, torch.float32)
    t = target_of(35, 37, torch.float32)
    for where in (x, t):
        kept = where[3, 5].clone()
        where[3, 5] = value
        three_ways("linear_act_mse", x, w, b, t, "relu", "none", None, True)
        three_ways("decoder_mse", x, w, b, t, "relu", "none", x, "relu")
        where[3, 5] = kept


# ---------------------------------------------------------------- each value once, the same bits every time


def test_every_value_counts_once() -> None:
    """Whole numbers: the sums are exact, so a value lost or taken twice shows as a wrong integer."""
    for M, N in ((1, 1), (31, 33), (32, 32), (70, 65), (129, 1), (1, 130)):
        t = -torch.arange(M * N, dtype=torch.float64).view(M, N).remainder(7)
        x, w = torch.zeros(M, 1), torch.zeros(N, 1)
        rows = t.square().sum(1)
        for reduction, truth in (("sum", rows.sum()), ("none", rows / N), ("mean", rows.sum() / (M * N))):
            loss, dp, _ = kernels.linear_act_mse(x, w, None, t.float(), "identity", reduction, None, True)
            torch.testing.assert_close(loss, truth.float(), rtol=1e-6, atol=0)
            assert torch.equal(dp, -t.float())
            loss, dp, dx = kernels.decoder_mse(x, w, None, t.float(), "identity", reduction, None, "identity")
            torch.testing.assert_close(loss, truth.float(), rtol=1e-6, atol=0)
            assert torch.equal(dp, -t.float())
            assert not dx.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_same_bits_every_time(reduction: str) -> None:
    x, w, b = layer("gelu", 129, 67, 33, torch.float32)
    t = target_of(129, 67, torch.float32)
    runs = [
        (*kernels.linear_act_mse(x, w, b, t, "gelu", reduction, None, True, True),
         *kernels.decoder_mse(x, w, b, t, "gelu", reduction, x, "tanh"))
        for _ in range(2)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are their own partial sums where one tile of columns covers them; else one more launch adds them up."""
    counted: list[int] = []
    launch = tiles.launch
    monkeypatch.setattr(tiles, "launch", lambda *a, **o: (counted.append(1), launch(*a, **o))[1])

    def launches(op: object, *args: object) -> int:
        counted.clear()
        op(*args)
        return len(counted)

    for M, N, reduction, one, both in (
        (70, 20, "none", 1, 1),
        (70, 40, "none", 2, 1),
        (70, 20, "mean", 2, 2),
        (5, 5, "sum", 1, 1),
    ):
        x, w, b = layer("relu", M, N, 7, torch.float32)
        t = target_of(M, N, torch.float32)
        assert launches(kernels.linear_act_mse, x, w, b, t, "relu", reduction, None, True) == one
        assert launches(kernels.decoder_mse, x, w, b, t, "relu", reduction, x, "relu") == both


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=lambda v: v.__name__)
def test_arguments_are_left_alone(view: object) -> None:
    args = [view(a) for a in (*layer("gelu", 35, 37, 33, torch.float32)[:2], target_of(35, 37, torch.float32))]
    before = [a.clone() for a in args]
    x, w, t = args
    kernels.linear_act_mse(x, w, None, t, "gelu", "mean", None, True, True)
    kernels.decoder_mse(x, w, None, t, "gelu", "mean", x, "relu")
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
