"""Losses with a parameter: value and derivatives by the book in every implementation and dtype; the negative binomial
against SciPy and 50 digits, from the smallest dispersion to Poisson's limit."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import torch
from accuracy import FLOOR, check
from cases import DTYPES, layer, loss_of, normal, parameter_slope_of, short, slope_of, suited, uniform
from fastae_kernels import negative_binomial as nb
from fastae_kernels.elementwise import LossKind
from fastae_kernels.jit import launch
from fastae_kernels.jit import losses as losses_kernels
from fastae_kernels.jit.backend import TRITON
from fastae_kernels.jit.losses import LOSS_PARAMETERS
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Below, Criterion, Layer, Out, Pending
from fastae_kernels.reference import TORCH
from scipy.stats import nbinom
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned")

IMPLEMENTATIONS = {"triton": TRITON, "torch": TORCH, "onednn": ONEDNN}
GAUSSIAN, NB, WHOLE = LossKind("gaussian"), LossKind("nb"), LossKind("nb", 1.0)
TURNS = ((GAUSSIAN, "one"), (GAUSSIAN, "each"), (NB, "each"), (NB, "one"))
M, N, K = 40, 37, 9


def parameter(which: str, columns: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return normal(1 if which == "one" else columns, dtype=wide, seed=8)


def by_the_book(p: Tensor, t: Tensor, criterion: Criterion, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, float]:
    """Loss, dp and the gradient by the parameter, of all that counts; and what the sums of the last lose, in units of
    the loss of a sum whose terms have one sign."""
    kind, reduction, row_weight, features, counted, *_, a = criterion
    rows, columns = M if counted is None else int(counted), N if features is None else features
    assert a is not None
    p, t, a = p[:rows, :columns].to(dtype), t[:rows, :columns].to(dtype), a.to(dtype)
    weight = torch.ones(rows, 1, dtype=dtype) if row_weight is None else row_weight[:rows, None].to(dtype)
    value = (loss_of(kind, p, t, a) * weight).sum(1)
    dp = torch.zeros(M, N, dtype=dtype)
    dp[:rows, :columns] = slope_of(kind, p, t, a) * weight
    da = parameter_slope_of(kind, p, t, a).expand(rows, columns) * weight
    per_row = torch.zeros(M, dtype=dtype)
    per_row[:rows] = value
    loss = {"mean": value.sum() / rows, "sum": value.sum(), "none": per_row}[reduction]
    sums = da.sum(0) if a.numel() == columns else da.sum().view(1)
    return loss, dp, sums, (da.abs().sum() / sums.abs().sum()).item()


# ---------------------------------------------------------------- the ops


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("kind", "which"), TURNS, ids=short)
def test_by_the_book(kind: LossKind, which: str, dtype: torch.dtype) -> None:
    """With weights of the rows, with rows and columns that do not count; `linear_act_loss` and `decoder_loss`."""
    x, w, b = layer("identity", M, N, K, dtype)
    t, wide = suited(kind, normal(M, N, dtype=dtype, seed=4)), torch.promote_types(dtype, torch.float32)
    parts = ((None, None, None), (uniform(M, low=0, high=3, seed=5), N - 5, torch.tensor(35)))
    reductions = ("mean", "none", "sum", "mean")
    for number, ((row_weight, features, counted), reduction) in enumerate(zip(parts * 2, reductions, strict=True)):
        criterion = Criterion(
            kind, reduction, row_weight, features, counted, parameter=parameter(which, features or N, dtype)
        )
        p = [x.to(d) @ w.to(d).T + b.to(d) for d in (wide, torch.float64)]
        same, truth = by_the_book(p[0], t, criterion, wide), by_the_book(p[1], t, criterion, torch.float64)
        for name, ops in IMPLEMENTATIONS.items():
            if name == "triton" and (number + DTYPES.index(dtype) + TURNS.index((kind, which))) % 2:
                continue  # they take turns
            given = x, Layer(w, b, "identity"), t, criterion
            places = [torch.full_like(criterion.parameter, float("nan")) for _ in range(2)]
            found = [*ops.linear_act_loss(*given, True, Out(dparameter=places[0]))]
            both = ops.decoder_loss(*given, Below(None, "identity"), places[1])
            for loss, dp, da in ((*found, places[0]), (*both[:2], places[1])):
                check(loss, same[0], truth[0])
                check(dp, same[1].to(dtype), truth[1])
                check(da, same[2], truth[2], FLOOR[wide] * max(1.0, truth[3]))
            alone, _ = ops.linear_act_loss(*given, True)
            assert torch.equal(alone, found[0]), "the loss does not depend on what is asked for"


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("kind", "which"), TURNS, ids=short)
def test_the_loss_of_an_array(kind: LossKind, which: str, dtype: torch.dtype) -> None:
    """Contiguous and not; its gradient by the parameter is in full, as that by the input."""
    p, t = normal(M, N, dtype=dtype), suited(kind, normal(M, N, dtype=dtype, seed=1))
    a, wide = parameter(which, N, dtype), torch.promote_types(dtype, torch.float32)
    for reduction, view in itertools.product(("mean", "sum"), (torch.clone, lambda t: t.t().contiguous().t())):
        criterion, n = Criterion(kind, reduction, parameter=a), M if reduction == "mean" else 1
        same, truth = by_the_book(p, t, criterion, wide), by_the_book(p, t, criterion, torch.float64)
        for ops in IMPLEMENTATIONS.values():
            place = torch.empty_like(a)
            loss, dp = ops.loss(view(p), t, kind, reduction, True, Out(dparameter=place), a)
            check(loss, same[0].to(dtype), truth[0])
            check(dp, (same[1] / n).to(dtype), truth[1] / n)
            check(place, same[2] / n, truth[2] / n, FLOOR[wide] * max(1.0, truth[3]))


@pytest.mark.parametrize(("kind", "which"), [*TURNS, (WHOLE, "each")], ids=short)
def test_scores(kind: LossKind, which: str) -> None:
    """Of a stack of one layer, and of two; with t log t - t left in for the score of counts."""
    t, a = suited(kind, normal(M, N, seed=1)), parameter(which, N, torch.float32)
    for dims in ((N, N), (N, 5, N)):
        weights = [normal(o, i, seed=o) / i for i, o in itertools.pairwise(dims)]
        p = t.double()
        for w in weights:
            p = p @ w.double().T
        truth = loss_of(kind, p, t.double(), a.double()).sum(1)
        if kind == WHOLE:
            truth = truth + (torch.xlogy(t, t) - t).double().sum(1)
        for ops in IMPLEMENTATIONS.values():
            found = ops.stack_score(t, weights, [None] * len(weights), ["identity"] * len(weights), kind, a)
            check(found, truth.float(), truth)


def test_no_values() -> None:
    for ops, (rows, columns) in itertools.product(IMPLEMENTATIONS.values(), ((0, 3), (3, 0), (0, 0))):
        a = torch.zeros(columns)
        place = torch.full_like(a, float("nan"))
        criterion, f = Criterion(GAUSSIAN, parameter=a), Layer(torch.zeros(columns, 2), None, "identity")
        t = torch.zeros(rows, columns)
        ops.linear_act_loss(torch.zeros(rows, 2), f, t, criterion, True, Out(dparameter=place))
        assert not place.any()
        ops.loss(t, t, GAUSSIAN, "sum", True, Out(dparameter=place.fill_(float("nan"))), a)
        assert not place.any()


def test_sums_wait_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of the loss; what it leaves is among what is pending."""
    counted: list[int] = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **o: (counted.append(1), run(*a, **o))[1])
    x, w, b = layer("identity", M, N, K, torch.float32)
    for a, op in itertools.product((torch.zeros(N), torch.zeros(1)), ("linear_act_loss", "decoder_loss")):
        counted.clear()
        pending, place = Pending(), torch.full_like(a, float("nan"))
        given = x, Layer(w, b, "identity"), normal(M, N, seed=4), Criterion(GAUSSIAN, parameter=a)
        if op == "decoder_loss":
            TRITON.decoder_loss(*given, Below(None, "identity"), place, pending)
        else:
            TRITON.linear_act_loss(*given, True, Out(dparameter=place), pending)
        assert len(counted) == 1
        assert len(pending) == 2
        assert place.isnan().all()
        TRITON.sum_partials(pending)
        assert len(counted) == 2
        assert place.isfinite().all()


def test_the_table_of_parameters() -> None:
    assert set(LOSS_PARAMETERS) == {"gaussian", "nb"}
    assert all(f.__name__ == f"{name}_parameter" for name, f in LOSS_PARAMETERS.items())


# ---------------------------------------------------------------- the negative binomial, value by value

COUNTS = (0, 1, 2, 5, 30, 1000, 30_000, 1_000_000)
LOGS = (*np.linspace(-10, 18.42, 9), 2.0, 2.4)  # log theta: 5e-5 to 1e8, and on both sides of where series begin


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """p, t, a: means from 1e-13 to exp(200), among them those near each count."""
    made = []
    for a, t in itertools.product(LOGS, COUNTS):
        near = [] if t == 0 else [np.log(t) + d for d in (0, 1e-3, 0.3 / t**0.5, -1 / t**0.5, 1, -1)]
        made += [(p, t, a) for p in (-30, -3, 0, 2, 6, 10, 14, 85, 200, *near)]
    p, t, a = torch.tensor(made, dtype=dtype).T.contiguous()
    return p, t, a


def truths(p: Tensor, t: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """-log p(t) without lgamma(t + 1) and with it, and the derivatives by p and by a, in 50 digits."""
    made = []
    with mpmath.workdps(50):
        for one in zip(p.tolist(), t.tolist(), a.tolist(), strict=True):
            q, n, s = map(mpmath.mpf, one)
            theta, mu = mpmath.exp(s), mpmath.exp(q)
            gammas = mpmath.loggamma(n + theta) - mpmath.loggamma(theta)
            loss = -(gammas + theta * s - (n + theta) * mpmath.log(theta + mu) + n * q)
            digammas = mpmath.digamma(n + theta) - mpmath.digamma(theta)
            da = -theta * (digammas + s - mpmath.log(theta + mu) + 1 - (n + theta) / (theta + mu))
            dp = theta * (mu - n) / (theta + mu)
            made.append([*map(float, (loss, loss + mpmath.loggamma(n + 1), dp, da))])
    return tuple(torch.tensor(made, dtype=torch.float64).T.contiguous())


def pieces(p: Tensor, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """What the derivative by a is the difference of."""
    excess = nb.parts(p.double(), t.double(), a.double()).excess
    return excess, nb._digammas(t.double(), a.double().exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_negative_binomial_in_fifty_digits(name: str, dtype: torch.dtype) -> None:
    """A log-likelihood within 1e-5 of the truth in fp32. The derivatives within 64 units of what they are made of: a
    mu that is off by eps (1 + |p|), whatever computes it, and the two brackets of which one is subtracted."""
    p, t, a = grid(dtype)
    loss, nats, dp, da = truths(p, t, a)
    eps, row = torch.finfo(dtype).eps, slice(None) if name == "torch" else slice(None, None, 7)
    p, t, a, loss, nats, dp, da = (v[row] for v in (p, t, a, loss, nats, dp, da))
    if name == "torch":
        found, slope, by_a = nb.value(p, t, a, 1.0), nb.slope(p, t, a), nb.slope_of_log_theta(p, t, a)
        trained = nb.value(p, t, a, 0.0)
    else:
        place = torch.empty_like(a)
        given = p[None], t[None]
        _, slope = losses_kernels.loss(*given, NB, "sum", True, Out(dparameter=place), a)
        one = [
            losses_kernels.loss(q.view(1, 1), n.view(1, 1), WHOLE, "sum", False, None, s.view(1))[0]
            for q, n, s in zip(p, t, a, strict=True)
        ]
        found, trained, by_a, slope = torch.stack(one), None, place, slope[0]
    error = ((found + nb.remainder(t)).double() - nats).abs() / nats.abs().clamp(min=1)
    assert error.max() < (1e-5 if dtype == torch.float32 else 1e-12)
    if trained is not None:
        size = nats.abs().clamp(min=1) + (nats - loss)
        assert ((trained.double() - loss).abs() / size).max() < 16 * eps
    theta = a.double().exp()
    mu = p.double().clamp(max=700).exp()
    weight = theta * (mu + t) / (theta + mu)
    assert ((slope.double() - dp).abs() <= 8 * eps * (1 + p.abs().clamp(max=88)).double() * weight + 1e-30).all()
    first, second = pieces(p, t, a)
    sensitive = (theta * mu * (t - mu).abs() / (theta + mu) ** 2) * (1 + p.abs().clamp(max=88)).double()
    sensitive = torch.where(p > 80, theta, sensitive) + first * (1 + a.abs())
    assert ((by_a.double() - da).abs() <= 64 * eps * (first + second * (1 + a.abs()) + sensitive) + 1e-30).all()


def test_scipy() -> None:
    """fp32 within 1e-5 max(1, |log p|) of scipy.stats.nbinom.logpmf, where that has digits."""
    generator = np.random.default_rng(0)
    theta = 10.0 ** generator.uniform(-3, 8, 2000)
    mu = 10.0 ** generator.uniform(-4, 5, 2000)
    counts = generator.poisson(mu * generator.gamma(theta, 1 / theta))
    p, a, t = (torch.tensor(v, dtype=torch.float32) for v in (np.log(mu), np.log(theta), counts))
    theta, mu = np.exp(a.double().numpy()), np.exp(p.double().numpy())
    truth = nbinom.logpmf(counts, theta, theta / (theta + mu))
    good = (theta < 1e5) & np.isfinite(truth)  # beyond, betaln and 1 - theta / (theta + mu) cost SciPy its own
    mine = -(nb.value(p, t, a, 1.0) + nb.remainder(t)).double().numpy()
    error = np.abs(mine - truth)[good] / np.maximum(1, np.abs(truth[good]))
    assert error.max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_poisson_in_the_limit(dtype: torch.dtype) -> None:
    """theta = 1e8 and beyond what is told apart: the loss of a Poisson law, and no gradient by theta."""
    p, t = normal(200, dtype=dtype), torch.arange(200, dtype=dtype) % 9
    wanted = torch.exp(p) - t * p
    for a in (18.42, 40.0, 60.0, 1e6):
        log = torch.full((1,), a, dtype=dtype)
        found = nb.value(p, t, log, 0.0)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert nb.slope_of_log_theta(p, t, log).abs().max() < 200 / np.exp(min(a, 60))
    small = nb.value(p, t, torch.full((1,), -60.0, dtype=dtype), 0.0)
    assert small.isfinite().all()


def test_what_is_not_a_number_stays_so() -> None:
    p, t, a = torch.tensor([float("nan"), 0, 0]), torch.tensor([1, float("nan"), 1]), torch.tensor([0, 0, float("nan")])
    for f in (lambda *v: nb.value(*v, 0.0), nb.slope, nb.slope_of_log_theta):
        assert f(p, t, a).isnan().all()


def test_autograd_and_its_second_derivatives() -> None:
    p, a = normal(3, 5, dtype=torch.float64), normal(5, dtype=torch.float64, seed=1)
    t = (3 * normal(3, 5, dtype=torch.float64, seed=2)).abs() + 0.1  # which need not be whole
    leaves = tuple(v.requires_grad_() for v in (p, t, a))
    for setting in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda *v, s=setting: nb.NegativeBinomial.apply(*v, s), leaves)
    p, t, a = (v.detach() for v in leaves)

    def loss(p: Tensor, a: Tensor) -> Tensor:
        return nb.NegativeBinomial.apply(p, t, a, 0.0)

    assert torch.autograd.gradgradcheck(loss, (p.requires_grad_(), a.requires_grad_()))
    by_func = torch.func.grad(lambda q: nb.NegativeBinomial.apply(q, t, a.detach(), 0.0).sum())(p.detach())
    torch.testing.assert_close(by_func, nb.slope(p.detach(), t, a.detach()))
    rows = torch.vmap(lambda q, n: nb.NegativeBinomial.apply(q, n, a.detach(), 0.0))(p.detach(), t)
    torch.testing.assert_close(rows, nb.value(p.detach(), t, a.detach(), 0.0))
