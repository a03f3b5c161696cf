"""The last layer and its loss in one kernel, and the layer below with them: every loss against its closed form, rows
and columns that do not count, views, empty shapes, determinism."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accuracy import FLOOR, check
from cases import (
    ACTIVATIONS,
    ALL_KINDS,
    DTYPES,
    EAGER,
    EMPTY_SHAPES,
    KINDS,
    SHAPES,
    TURNS,
    VIEWS,
    eager_loss,
    flat,
    layer,
    loss_of,
    normal,
    saved,
    short,
    slope_of,
    strided,
    suited,
    three_ways,
    transposed,
    uniform,
    wide,
    width_of,
)
from fastae_kernels.elementwise import MSE, LossKind
from fastae_kernels.jit import launch, linear_act, losses
from fastae_kernels.jit import linear_act_loss as kernels
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Below, Criterion, Layer, Ops, Out
from fastae_kernels.reference import TORCH
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

REDUCTIONS = ("mean", "sum", "none")
NOTHING = Below(None, "identity")
IMPLEMENTATIONS = {"triton": kernels, "torch": TORCH, "onednn": ONEDNN}
NAN = float("nan")


def target_of(M: int, N: int, dtype: torch.dtype) -> Tensor:
    return normal(M, N, dtype=dtype, seed=4)


def case(activation: str, M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Layer, Tensor]:
    """x, the layer, the target."""
    x, w, b = layer(activation, M, N, K, dtype)
    return x, Layer(w, b, activation), target_of(M, N, dtype)


def by_the_book(
    x: Tensor, layer: Layer, target: Tensor, criterion: Criterion, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and dp in `dtype`, from closed forms and autograd: all that counts, taken out by masks."""
    (w, b, activation), (kind, reduction, row_weight, features, counted, *_) = layer, criterion
    M, N = target.shape
    rows, columns = M if counted is None else int(counted), N if features is None else features
    counts = torch.zeros(M, N, dtype=torch.bool)
    counts[:rows, :columns] = True
    there = counts[:, :1].to(dtype)
    p = torch.nn.functional.linear(x.to(dtype).nan_to_num(0) * there, w.to(dtype), None if b is None else b.to(dtype))
    y = EAGER[activation](p.requires_grad_())
    given = y.detach(), target.to(dtype)
    weight = there if row_weight is None else row_weight.to(dtype).nan_to_num(0)[:, None] * there
    value, slope = (torch.where(counts, f(kind, *given), 0.0) * weight for f in (loss_of, slope_of))
    (dp,) = torch.autograd.grad(y, p, slope / kind.row.factor)
    width = width_of(kind, columns)
    loss = {"mean": value.sum() / (rows * width), "sum": value.sum(), "none": value.sum(1) / width}[reduction]
    return loss, dp


def check_by_the_book(
    ops: Ops, x: Tensor, layer: Layer, target: Tensor, criterion: Criterion, below: Below = NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_act_loss` and `decoder_loss`, whose dx is made of the dp that it has rounded; returned is the latter."""
    loss_dtype = torch.promote_types(x.dtype, torch.float32)
    given = x, layer, target, criterion
    truth, same = by_the_book(*given, torch.float64), by_the_book(*given, loss_dtype)
    lean = ops is ONEDNN and x.dtype == torch.bfloat16 and layer.activation == "identity" and criterion.kind == MSE
    floor = FLOOR[x.dtype] if lean else None  # oneDNN hands out the difference in bf16
    both = ops.decoder_loss(*given, below)
    for loss, dp in (ops.linear_act_loss(*given, True), both[:2]):
        check(loss, same[0], truth[0], floor)
        check(dp, same[1].to(x.dtype), truth[1])
    if below is NOTHING:
        product = both[1].double() @ layer.w.double()
        check(both[2], product.to(x.dtype), product)
    return both


def test_poison_shows_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    x, f, t = case("gelu", 3, 5, 7, torch.float32)
    written = (*kernels.linear_act_loss(x, f, t, Criterion(MSE, "none"), True),)
    written += kernels.decoder_loss(x, f, t, Criterion(), Below(x, "relu"))
    assert all(t.isnan().all() for t in written)


# ---------------------------------------------------------------- accuracy: every activation, every loss


@pytest.mark.parametrize(("activation", "dtype"), TURNS[::3], ids=short)  # each dtype once
def test_activations(activation: str, dtype: torch.dtype) -> None:
    """With fp32 weights of the rows in every dtype."""
    number = ACTIVATIONS.index(activation)
    M, N, K = SHAPES[number % len(SHAPES)]
    K = 20 if K == 2 else K  # or dx would be two sums of 33 terms; if both cancel, nothing is left to measure against
    x, f, t = case(activation, M, N, K, dtype)
    row_weight = None if K == 17 else uniform(M, low=0, high=3, seed=5)
    criterion = Criterion(MSE, REDUCTIONS[number % len(REDUCTIONS)], row_weight)
    three_ways("linear_act_loss", x, f, t, criterion, True)
    three_ways("decoder_loss", x, f, t, criterion, Below(saved(activation, M, K, dtype), activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=short)
def test_each_loss_by_the_book(kind: LossKind, dtype: torch.dtype) -> None:
    """Closed forms in fp64; in the dtype of the loss they are PyTorch's error. The kernels take turns."""
    M, N, K = 35, 20, 9
    row_weight = uniform(M, low=0, high=3, seed=5)
    turns = (("identity", "mean", None), ("sigmoid", "none", row_weight), ("gelu", "sum", row_weight.to(dtype)))
    for number, (activation, reduction, weight) in enumerate(turns):
        x, f, t = case(activation, M, N, K, dtype)
        t = suited(kind, t)
        for name, ops in IMPLEMENTATIONS.items():
            if name != "triton" or (ALL_KINDS.index(kind) + DTYPES.index(dtype)) % 3 == number:
                check_by_the_book(ops, x, f, t, Criterion(kind, reduction, weight))


@pytest.mark.parametrize("kind", KINDS, ids=short)
def test_each_loss_as_pytorch_has_it(kind: LossKind) -> None:
    """F.mse_loss, F.l1_loss and F.huber_loss and their gradients, at kinks too: errors of 0 and of delta exactly."""
    delta = kind.setting or 0.5
    for dtype, ops in itertools.product(DTYPES, IMPLEMENTATIONS.values()):
        edge = torch.tensor(delta).to(dtype).double().item()  # exactly delta where delta is a number of this dtype
        e = torch.tensor([0.0, edge, -edge, 2 * edge, -3.0, edge / 2, -edge / 4, 1e-3, -0.0], dtype=dtype)[:, None]
        one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros_like(e)
        y = e.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
        total = eager_loss(kind)(y, torch.zeros_like(y), reduction="sum")
        (gradient,) = torch.autograd.grad(total, y)
        criterion = Criterion(kind, "sum")
        for loss, dp, *_ in (
            ops.linear_act_loss(e, Layer(one, None, "identity"), zero, criterion, True),
            ops.decoder_loss(e, Layer(one, None, "identity"), zero, criterion, NOTHING),
        ):
            torch.testing.assert_close(loss, total.detach(), rtol=1e-6, atol=0)
            assert torch.equal(dp * kind.row.factor, gradient.to(dtype))
            if kind.name == "mae":
                assert dp.flatten().tolist() == [0, 1, -1, 1, -1, 1, -1, 1, 0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_not_asked_for(reduction: str) -> None:
    """No bias, no weights, no dp; and the loss does not depend on whether dp is asked for."""
    x, (w, b, _), t = case("tanh", 35, 37, 9, torch.float32)
    criterion = Criterion(MSE, reduction)
    for bias in (b, None):
        f = Layer(w, bias, "tanh")
        loss, dp = three_ways("linear_act_loss", x, f, t, criterion, True)
        alone, nothing = three_ways("linear_act_loss", x, f, t, criterion, False)
        assert dp is not None
        assert nothing is None
        assert torch.equal(loss, alone)
        three_ways("decoder_loss", x, f, t, criterion, NOTHING)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=short)
def test_out(dtype: torch.dtype, ops: Ops) -> None:
    """The same bits as in fresh memory; oneDNN may make memory of its own, and then leaves what was given alone."""
    turns = (("gelu", "mean", None), ("identity", "sum", None), ("relu", "mean", normal(35, seed=5)))
    for activation, reduction, row_weight in turns:
        x, f, t = case(activation, 35, 37, 9, dtype)
        criterion = Criterion(MSE, reduction, row_weight)
        out = Out(x.new_empty(35, 37), torch.empty(()), torch.empty(35, 37) if dtype != torch.float32 else None)
        loss, dp = ops.linear_act_loss(x, f, t, criterion, True, out)
        fresh_loss, fresh_dp = ops.linear_act_loss(x, f, t, criterion, True)
        assert loss is out.loss
        assert dp is out.dp or (ops is ONEDNN and activation == "identity")
        assert torch.equal(loss, fresh_loss)
        assert torch.equal(dp, fresh_dp)
    assert not dp.isnan().any()


# ---------------------------------------------------------------- rows and columns that do not count


@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "kind"), [*zip(DTYPES, KINDS[1:], strict=True)], ids=short)
def test_rows_and_columns_that_do_not_count(dtype: torch.dtype, kind: LossKind, ops: Ops) -> None:
    """Where all is NaN that does not count, of x, of the target, of the weights of the rows and of what is saved: no
    loss, dp = dx = 0, and a mean is one of what counts."""
    M, N, K = 40, 37, 9
    turns = zip(
        (1, 31, 32, 33, M, 39),
        ("sigmoid", "identity", "gelu") * 2,
        REDUCTIONS * 2,
        (N - 5, None, N, 1, N - 5, None),
        (True, False) * 3,
        strict=True,
    )
    for place, (counted, activation, reduction, features, weighted) in enumerate(turns):
        if ops is kernels and (place + DTYPES.index(dtype)) % 2:
            continue  # each turn of theirs in two dtypes
        x, f, t = case(activation, M, N, K, dtype)
        row_weight = uniform(M, low=0.5, high=3, dtype=dtype, seed=5) if weighted else None
        below = saved("tanh", M, K, dtype)
        for held in (x, t, below, row_weight):
            if held is not None:
                held[counted:] = NAN
        t[:, N if features is None else features :] = NAN
        number = torch.tensor([-1, counted, -1])[1]
        criterion = Criterion(kind, reduction, row_weight, features, number)
        loss, dp, dx = check_by_the_book(ops, x, f, t, criterion, Below(below, "tanh"))
        assert not dp[counted:].any()
        assert not dx[counted:].any()
        assert dx[:counted].any()
        assert reduction != "none" or not loss[counted:].any()
        assert features is None or not dp[:, features:].any()
        # As if there were no other rows
        part = criterion._replace(counted=None, row_weight=None if row_weight is None else row_weight[:counted])
        fewer = ops.decoder_loss(x[:counted], f, t[:counted], part, Below(below[:counted], "tanh"))
        torch.testing.assert_close((loss[:counted] if loss.dim() else loss, dp[:counted], dx[:counted]), fewer)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_columns_that_do_not_count(dtype: torch.dtype) -> None:
    """Without a number of rows in memory: on oneDNN squared error has a path of its own."""
    for kind, (name, ops) in itertools.product(KINDS[:3], IMPLEMENTATIONS.items()):
        x, f, t = case("identity", 35, 20, 9, dtype)
        t[:, 17:] = NAN
        weights = (None, uniform(35, low=0, high=3, seed=5))
        for reduction, row_weight in itertools.product(REDUCTIONS, weights) if name != "triton" else (("mean", None),):
            check_by_the_book(ops, x, f, t, Criterion(kind, reduction, row_weight, 17))


def test_columns_that_do_not_count_are_no_part_of_the_weights() -> None:
    """Rows filled up with weights of 0 and any target: loss and gradients are those of the layer that is not."""
    x, f, t = (wide(a) for a in case("sigmoid", 9, 7, 12, torch.float32))
    more = Layer(f.w.new_zeros(16, 12), f.b.new_zeros(16), "sigmoid")
    more.w[:7], more.b[:7] = f.w, f.b
    for reduction, kind, ops in itertools.product(REDUCTIONS, (*KINDS[:3], *ALL_KINDS[5:]), IMPLEMENTATIONS.values()):
        target = t.new_full((9, 16), 5.0)
        target[:, :7] = suited(kind, t)
        criterion = Criterion(kind, reduction)
        loss, dp, dx = TORCH.decoder_loss(x, f, suited(kind, t), criterion, Below(x, "relu"))
        for found, wide_dp, *wide_dx in (
            ops.linear_act_loss(x, more, target, criterion._replace(features=7), True),
            ops.decoder_loss(x, more, target, criterion._replace(features=7), Below(x, "relu")),
        ):
            torch.testing.assert_close(found, loss)
            torch.testing.assert_close(wide_dp[:, :7], dp)
            assert not wide_dp[:, 7:].any()
            torch.testing.assert_close([*wide_dx], [dx][: len(wide_dx)])


def test_the_number_of_rows_is_read_at_each_launch() -> None:
    """Not when the launcher is called: a captured graph is replayed with another number."""
    x, f, t = case("relu", 40, 5, 7, torch.float32)
    number = torch.tensor(40)
    criterion = Criterion(MSE, "mean", counted=number)
    whole, _ = kernels.linear_act_loss(x, f, t, criterion)
    number.fill_(7)
    part, _ = kernels.linear_act_loss(x, f, t, criterion)
    torch.testing.assert_close(whole, TORCH.linear_act_loss(x, f, t, Criterion())[0])
    torch.testing.assert_close(part, TORCH.linear_act_loss(x[:7], f, t[:7], Criterion())[0])


# ---------------------------------------------------------------- what the fusion is for


@pytest.mark.parametrize("op", ["linear_act_loss", "decoder_loss"])
def test_near_convergence_the_error_is_not_rounded_away(op: str) -> None:
    """bf16, residuals of 0.01: y rounded to bf16 before the subtraction leaves a gradient more than 10 % wrong."""
    M, N, K = 64, 90, 48
    x, f, _ = case("identity", M, N, K, torch.bfloat16)
    p = x.double() @ f.w.double().T + f.b.double()
    t = (p + 0.01 * normal(M, N, dtype=torch.float64, seed=6)).float()
    truth = p - t.double()

    def error(dp: Tensor) -> float:
        return ((dp.double() - truth).norm() / truth.norm()).item()

    total = Criterion(MSE, "sum")
    fused: Sequence[Any] = (
        kernels.linear_act_loss(x, f, t, total, need_dp=True)
        if op == "linear_act_loss"
        else kernels.decoder_loss(x, f, t, total, NOTHING)
    )
    assert error(fused[1]) < 0.005
    y, _ = linear_act.linear_act_fwd(x, f.w, f.b, "identity")
    _, dinput = losses.loss(y, t.bfloat16(), MSE, "sum", True)
    assert error(dinput / 2) > 0.1
    loss = truth.square().sum()
    assert abs(fused[0].double() - loss) < 1e-5 * loss


def test_dp_does_not_vanish_in_fp16() -> None:
    """Near convergence dp / n would be below the smallest fp16; the loss's 2 / n is left to `linear_wgrad`."""
    x, f, _ = case("identity", 64, 90, 48, torch.float16)
    t = (x.double() @ f.w.double().T + f.b.double() + 1e-3).float()
    _, dp = kernels.linear_act_loss(x, f, t, Criterion(), True)
    assert dp.all()
    scale = MSE.scale(64, 90)
    assert scale == 2 / dp.numel()
    dw, _ = linear_act.linear_wgrad(dp, x, True, torch.tensor(scale))
    truth = scale * (x.double() @ f.w.double().T + f.b.double() - t.double()).T @ x.double()
    check(dw, truth.half(), truth)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*zip(KINDS[:3], (torch.float16, torch.float32, torch.bfloat16), strict=True)], ids=short
)
def test_against_autograd(kind: LossKind, dtype: torch.dtype) -> None:
    """Loss and gradients as a user writes them, in fp64: dp, dx and the scale that is left out of them."""
    M, N, K = 35, 37, 9
    x, f, t = case("sigmoid", M, N, K, dtype)
    row_weight = uniform(M, low=0, high=3, seed=5)
    hidden = x.double().requires_grad_()
    y = torch.sigmoid(hidden @ f.w.double().T + f.b.double())
    for reduction in REDUCTIONS:
        per_row = eager_loss(kind)(y, t.double(), reduction="none").mean(1) * row_weight.double()
        loss = {"none": per_row, "mean": per_row.mean(), "sum": per_row.sum() * N}[reduction]
        (dx,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
        truth = dx / kind.scale(*{"none": (1, N), "mean": (M, N), "sum": (1, 1)}[reduction])
        criterion = Criterion(kind, reduction, row_weight)
        both, _, mine_dx = kernels.decoder_loss(x, f, t, criterion, NOTHING)
        check(mine_dx, truth.to(dtype), truth)
        mine, dp = kernels.linear_act_loss(x, f, t, criterion, True)
        check(dp.double() @ f.w.double(), truth, truth, FLOOR[dtype])
        for found in (mine, both):
            assert found.dtype == torch.float32
            check(found, loss.detach().float(), loss.detach())


# ---------------------------------------------------------------- awkward views


@pytest.mark.parametrize("view", VIEWS, ids=short)
def test_views(view: Callable[[Tensor], Tensor]) -> None:
    """All arguments at once."""
    (M, N, K), dtype = (35, 37, 33), (torch.float32, torch.bfloat16)[VIEWS.index(view) % 2]
    x, w, b = layer("gelu", M, N, K, dtype)
    r, below = uniform(M, low=0, high=3, dtype=dtype, seed=5), Below(view(saved("tanh", M, K, dtype)), "tanh")
    f, t, row_weight = Layer(view(w), flat(view)(b), "gelu"), view(target_of(M, N, dtype)), flat(view)(r)
    three_ways("linear_act_loss", view(x), f, t, Criterion(KINDS[2], "mean", row_weight), True)
    three_ways("decoder_loss", view(x), f, t, Criterion(MSE, "none", row_weight), below)


def test_tied_weights_and_saved_is_x() -> None:
    """The decoder of a tied autoencoder has the encoder's weights transposed; what relu saved is the decoder's x."""
    h, w, b = layer("relu", 35, 37, 33, torch.bfloat16)
    h = h.relu()
    tied, t = w.t().contiguous().t(), target_of(35, 37, torch.bfloat16)
    results = [
        kernels.decoder_loss(h, Layer(v, b, "sigmoid"), t, Criterion(), Below(s, "relu"))
        for v, s in ((w, h), (tied, h.clone()))
    ]
    assert all(map(torch.equal, *results))
    three_ways("decoder_loss", h, Layer(tied, b, "sigmoid"), t, Criterion(), Below(h, "relu"))


def test_x_is_its_own_target() -> None:
    x, w, b = layer("sigmoid", 35, 33, 33, torch.float32)
    for reduction in REDUCTIONS:
        three_ways("linear_act_loss", x, Layer(w, b, "sigmoid"), x, Criterion(MSE, reduction), True)
        three_ways("decoder_loss", x, Layer(w, b, "sigmoid"), x, Criterion(MSE, reduction), Below(x, "identity"))


def test_a_wide_hidden_layer() -> None:
    """256 columns stay on chip and 257 do not."""
    for M, N, K in ((33, 3, 256), (2, 40, 255)):
        x, f, t = case("relu", M, N, K, torch.float32)
        three_ways("decoder_loss", x, f, t, Criterion(), Below(x, "relu"))
    x, f, t = case("relu", 2, 3, 257, torch.float32)
    with pytest.raises(ValueError, match=r"^decoder_loss: x must have at most 256 columns; got \[2, 257\]$"):
        kernels.decoder_loss(x, f, t, Criterion(), NOTHING)


def test_fits_decoder() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert [kernels.fits_decoder(K, dtype) for K in (1, 128, 256, 257)] == [True, True, True, False]
    assert [kernels.fits_decoder(K, torch.float64) for K in (1, 128, 129)] == [True, True, False]
    assert not TORCH.fits_decoder(16, torch.float32), "two products either way"


# ---------------------------------------------------------------- empty, inf, NaN


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=short)
def test_empty(shape: tuple[int, int, int]) -> None:
    """No rows or no targets: a sum of 0, a mean of NaN. No in_features: y = f(b)."""
    M, N, K = shape
    x, f, t = case("sigmoid", M, N, K, torch.float32)
    for reduction, row_weight in itertools.product(REDUCTIONS, (None, torch.ones(M))):
        criterion = Criterion(KINDS[2] if row_weight is None else MSE, reduction, row_weight)
        three_ways("linear_act_loss", x, f, t, criterion, True)
        three_ways("decoder_loss", x, f, t, criterion, Below(x, "tanh"))


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS[:3], ids=short)
def test_inf_and_nan_stay_in_their_row(kind: LossKind, value: float) -> None:
    """As PyTorch has them: mae's gradient of NaN is 0, huber's of inf is delta."""
    x, f, t = case("relu", 35, 20, 9, torch.float32)
    criterion, others = Criterion(kind, "none"), torch.arange(35) != 3
    for where in (x, t) if value != value else (x,) if value > 0 else (t,):
        kept = where[3, 5].clone()
        where[3, 5] = value
        p = torch.nn.functional.linear(x, f.w, f.b).requires_grad_()
        errors = eager_loss(kind)(p.relu(), t, reduction="none")
        (wanted,) = torch.autograd.grad(errors.sum(), p)
        wanted = wanted / kind.row.factor
        loss, dp = three_ways("linear_act_loss", x, f, t, criterion, True)
        both, both_dp, dx = three_ways("decoder_loss", x, f, t, criterion, Below(x, "relu"))
        for found, gradient in ((loss, dp), (both, both_dp)):
            torch.testing.assert_close(found, errors.mean(1).detach(), equal_nan=True)
            torch.testing.assert_close(gradient, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert all(r[others].isfinite().all() for r in (loss, dp, dx))
        where[3, 5] = kept


# ---------------------------------------------------------------- each value once, the same bits every time


@pytest.mark.parametrize("kind", KINDS[:2], ids=short)
def test_every_value_counts_once(kind: LossKind) -> None:
    """Whole numbers: the sums are exact, so a value lost or taken twice shows as a wrong integer."""
    for M, N in ((1, 1), (33, 65), (70, 1), (1, 130)):
        t = -torch.arange(M * N, dtype=torch.float64).view(M, N).remainder(7)
        x, f = torch.zeros(M, 1), Layer(torch.zeros(N, 1), None, "identity")
        rows, gradient = loss_of(kind, -t).sum(1), (slope_of(kind, -t) / kind.row.factor).float()
        reduced = (("sum", rows.sum()), ("none", rows / N), ("mean", rows.sum() / (M * N)))
        for reduction, truth in reduced if kind == MSE else reduced[:1]:
            loss, dp = kernels.linear_act_loss(x, f, t.float(), Criterion(kind, reduction), True)
            torch.testing.assert_close(loss, truth.float(), rtol=1e-6, atol=0)
            assert torch.equal(dp, gradient)
            loss, dp, dx = kernels.decoder_loss(x, f, t.float(), Criterion(kind, reduction), NOTHING)
            torch.testing.assert_close(loss, truth.float(), rtol=1e-6, atol=0)
            assert torch.equal(dp, gradient)
            assert not dx.any()


def test_the_same_bits_every_time() -> None:
    x, f, t = case("gelu", 40, 67, 9, torch.float32)
    for reduction in ("mean", "none"):
        criterion = Criterion(MSE, reduction)
        runs = [
            (*kernels.linear_act_loss(x, f, t, criterion, True), *kernels.decoder_loss(x, f, t, criterion, NOTHING))
            for _ in range(2)
        ]
        assert all(map(torch.equal, *runs))


def test_a_loss_that_waits() -> None:
    """Where it comes in parts, nothing is there before they are summed; where it comes whole, nothing waits."""
    for M, reduction, parts in ((70, "mean", 1), (70, "none", 1), (5, "sum", 0)):
        x, f, t = case("relu", M, 40 if parts else 5, 7, torch.float32)
        criterion, pending = Criterion(MSE, reduction), []
        loss, _ = kernels.linear_act_loss(x, f, t, criterion, True, None, pending)
        assert len(pending) == parts
        assert bool(loss.isnan().any()) == bool(parts)
        TORCH.sum_partials(pending)
        torch.testing.assert_close(loss, TORCH.linear_act_loss(x, f, t, criterion)[0])


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are their own partial sums where one tile of columns covers them; else one more launch adds them up."""
    counted: list[int] = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **o: (counted.append(1), run(*a, **o))[1])

    def launches(op: Callable[..., object], *args: object) -> int:
        counted.clear()
        op(*args)
        return len(counted)

    for M, N, reduction, one, both in (
        (70, 20, "none", 1, 1),
        (70, 40, "none", 2, 1),
        (70, 20, "mean", 2, 2),
        (5, 5, "sum", 1, 1),
    ):
        x, f, t = case("relu", M, N, 7, torch.float32)
        criterion = Criterion(MSE, reduction)
        assert launches(kernels.linear_act_loss, x, f, t, criterion, True) == one
        assert launches(kernels.decoder_loss, x, f, t, criterion, Below(x, "relu")) == both


@pytest.mark.parametrize("view", [torch.clone, strided, transposed], ids=short)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_arguments_are_left_alone(ops: Ops, view: Callable[[Tensor], Tensor]) -> None:
    """Also what does not count of them."""
    x, w, b = (view(a) for a in layer("gelu", 35, 37, 33, torch.float32))
    t, r, number = view(target_of(35, 37, torch.float32)), view(normal(35, seed=5)), torch.tensor(20)
    before = [a.clone() for a in (x, w, b, t, r, number)]
    turns = (KINDS[0], "gelu", (30, number)), (KINDS[1], "identity", (None, None)), (KINDS[2], "identity", (30, number))
    for kind, activation, part in turns if view is torch.clone else turns[:1]:
        criterion = Criterion(kind, "mean", r, *part)
        ops.linear_act_loss(x, Layer(w, b, activation), t, criterion, True)
        ops.decoder_loss(x, Layer(w, b, activation), t, criterion, Below(x, "relu"))
    assert all(map(torch.equal, (x, w, b, t, r, number), before))
