"""The audit's own pieces, none of which needs another library: closed forms by brute force, verdicts, the page."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import nbinom
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch.distributions import Normal, kl_divergence

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

from peers.audit import closed_forms  # noqa: E402
from peers.audit.page import TITLES, deviation, entry_of, number, page  # noqa: E402
from peers.audit.rows import SPREADS, Row, Section, moments, where  # noqa: E402

DIGITS = load_digits().data / 4 - (load_digits().data / 4).mean(0)


# ---------------------------------------------------------------- closed forms


def test_the_divergence_and_its_gradients_are_those_of_torch_distributions():
    random = np.random.default_rng(0)
    mu, log_var = random.normal(size=(6, 3)), random.uniform(-4, 2, (6, 3))
    m, v = (torch.from_numpy(part).requires_grad_() for part in (mu, log_var))
    one = torch.ones(1).double()
    kl = kl_divergence(Normal(m, (v / 2).exp()), Normal(0 * one, one)).sum(1).mean()
    kl.backward()
    value, by_mean, by_log_var = closed_forms.divergence(mu, log_var)
    assert value == pytest.approx(kl.item(), rel=1e-12)
    np.testing.assert_allclose(by_mean, m.grad, rtol=1e-12)
    np.testing.assert_allclose(by_log_var, v.grad, rtol=1e-12)


def test_the_best_linear_bound_is_the_score_of_pca():
    pca = PCA(8).fit(DIGITS)
    # scikit-learn divides by n - 1, the likelihood by n
    value, variance = closed_forms.best_linear_bound(DIGITS, 8)
    assert value == pytest.approx(pca.score(DIGITS), abs=2e-3)
    assert variance == pytest.approx(pca.noise_variance_ * 1796 / 1797, rel=1e-9)


@pytest.mark.parametrize("variance", [None, 1.0, 3.0])
def test_the_best_linear_bound_is_reached_and_not_exceeded(variance):
    """The parameters that theory names reach it; 50 random changes of them do not go beyond."""
    best, noise = closed_forms.best_linear_bound(DIGITS, 8, variance)
    values, vectors = np.linalg.eigh(np.cov(DIGITS.T, bias=True))
    values, vectors = values[::-1][:8], vectors[:, ::-1][:, :8]
    decoder = vectors * np.sqrt(np.maximum(values - noise, 0))
    inner = (decoder**2).sum(0) + noise
    encoder, log_var = decoder / inner, np.log(noise / inner)
    bias, every = np.zeros(64), np.ones((len(DIGITS), 1))

    def bound(d, e, v, b):
        return closed_forms.linear_bound(DIGITS, DIGITS @ e, every * v, d, b, variance)

    assert bound(decoder, encoder, log_var, bias) == pytest.approx(best, abs=1e-9)
    random = np.random.default_rng(0)
    for size in [1e-2, 1e-1] * 25:
        moved = [t + size * random.normal(size=t.shape) for t in (decoder, encoder, log_var, bias)]
        assert bound(*moved) < best


def test_the_bound_of_linear_models_is_what_sampling_gives():
    random = np.random.default_rng(0)
    x, decoder, bias = random.normal(size=(50, 6)), random.normal(size=(6, 2)), random.normal(size=6)
    mu, log_var = random.normal(size=(50, 2)), random.uniform(-1, 1, (50, 2))
    z = mu + np.exp(log_var / 2) * random.normal(size=(4000, 50, 2))
    log_p = -((x - z @ decoder.T - bias) ** 2 / 0.7 + math.log(2 * math.pi * 0.7)).sum(2) / 2
    sampled = log_p.mean() - closed_forms.divergence(mu, log_var)[0]
    error = log_p.mean(1).std() / math.sqrt(4000)
    assert closed_forms.linear_bound(x, mu, log_var, decoder, bias, 0.7) == pytest.approx(sampled, abs=5 * error)


@pytest.mark.parametrize(("noise", "amount"), [("mask", 0.3), ("gaussian", 1.0)])
def test_the_best_denoiser_is_the_regression_on_noisy_rows(noise, amount):
    gram = DIGITS.T @ DIGITS / len(DIGITS)
    best, cross, spoilt = closed_forms.best_denoiser(gram, noise, amount)
    least = closed_forms.risk(gram, best, cross, spoilt)
    random = np.random.default_rng(0)
    rows = np.tile(DIGITS, (40, 1))
    keep = random.random(rows.shape) >= amount
    noisy = rows * keep if noise == "mask" else rows + amount * random.normal(size=rows.shape)
    assert np.mean((noisy @ best.T - rows) ** 2) == pytest.approx(least, rel=0.01)
    for _ in range(20):
        assert closed_forms.risk(gram, best + 0.01 * random.normal(size=best.shape), cross, spoilt) > least
    assert closed_forms.risk(gram, best, cross, spoilt, np.full(64, 0.5)) == pytest.approx(least + 0.25)
    assert least < closed_forms.risk(gram, np.eye(64), cross, spoilt)


@pytest.mark.parametrize("logit", [-100.0, -20.0, -0.3, 0.0, 2.0, 50.0])
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_the_cross_entropy_is_that_of_torch(logit, target):
    p, t = torch.tensor(logit, dtype=torch.float64, requires_grad=True), torch.tensor(target, dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(p, t)
    loss.backward()
    assert closed_forms.cross_entropy(logit, target) == pytest.approx(
        (loss.item(), p.grad.item()), rel=1e-10, abs=1e-15
    )


def test_the_negative_binomial_is_that_of_scipy():
    for theta in (0.1, 10.0, 1e4):
        wanted = nbinom.logpmf(40, theta, theta / (theta + 55))
        assert closed_forms.negative_binomial(40, 55, theta) == pytest.approx(wanted, abs=1e-8)


# ---------------------------------------------------------------- verdicts


def test_a_verdict_allows_the_tolerance_and_the_sampling_error():
    assert Row("a", "b", 1.0, 1.09, 0.1).right
    assert not Row("a", "b", 1.0, 1.11, 0.1).right
    assert Row("a", "b", 1.0, 1.11, 0.1, error=0.02 / SPREADS).right
    assert not Row("a", "b", 1.0, 0.5, 0.1).right
    assert Row("a", "b", 1.0, 0.5, 0.1, bound=True).right
    assert not Row("a", "b", 1.0, math.nan, 0.1).right
    assert Row("a", "b", 0.0, 1.0, 0.1).verdict == "off"
    assert Row("a", "b", 0.0, 1.0, 0.1, meant=True).verdict == "as meant"
    assert Row("a", "b", 0.0, 0.0, 0.1, meant=True).verdict == "right"


def test_moments_come_with_their_standard_errors():
    random = np.random.default_rng(0)
    found = np.array([[*moments(random.normal(2, 3, 500)).values()] for _ in range(400)])
    (mean, std), (mean_error, std_error) = found[..., 0].T, found[..., 1].T
    assert mean.std() == pytest.approx(mean_error.mean(), rel=0.15)
    assert std.std() == pytest.approx(std_error.mean(), rel=0.15)


def test_a_line_of_the_source_is_found_or_refused():
    found = where(closed_forms.divergence, "np.expm1(log_var) - log_var")
    line = int(re.fullmatch(r"`audit/closed_forms.py:(\d+)`", found).group(1))
    assert "np.expm1(log_var) - log_var" in Path(closed_forms.__file__).read_text().splitlines()[line - 1]
    with pytest.raises(ValueError, match="the installed version says something else"):
        where(closed_forms.divergence, "torch.clamp")


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.0, 6, "0"), (-74.51305, 6, "-74.5131"), (1234567.0, 6, "1.2e+06"), (2e-9, 2, "2.0e-09"), (0.0105, 2, "0.011"),
     (6599.92, 6, "6,599.92"), (100.0, 1, "100"), (math.nan, 6, "nan")],
)  # fmt: skip
def test_numbers(value, digits, text):
    assert number(value, digits) == text


def test_deviations():
    assert deviation(Row("a", "b", 2.0, 2.01, 0.1, "nats")) == "+0.01 nats"
    assert deviation(Row("a", "b", 2.0, 2.01, 0.1, relative=True)) == "+0.50 %"
    assert deviation(Row("a", "b", 2.0, 2.0, 0.1, "nats")) == "0"


def test_a_page_names_causes_once_and_only_of_what_is_off():
    off = Row("peer 1", "value", 0.0, 1.0, 0.1, cause="`file.py:3` clamps it")
    rows = [Row("fastae 1", "value", 0.0, 0.0, 0.1, cause="not said"), off, off]
    entry = {"machine": "a machine", "commit": "abc", "versions": "v 1", "command": "make audit", "seconds": 60.0}
    entry |= entry_of(Section(rows, "How.", ["A note."]))
    text = page({"sections": {"scores": json.loads(json.dumps(entry))}})
    assert (
        "| fastae 1 | 1 | 0 | - |\n| peer 1 | 2 | 2 | [The same rows, scored twice](#the-same-rows-scored-twice) |"
        in text
    )
    assert text.count("- peer: `file.py:3` clamps it.\n- A note.") == 1
    assert "not said" not in text
    assert "\na machine. v 1. Commit abc, `make audit`.\n" in text


def test_the_committed_page_is_what_its_json_gives():
    results = json.loads((BENCH / "results" / "audit.json").read_text())
    assert (ROOT / "docs" / "wrong-by-default.md").read_text() == page(results)
    assert set(results["sections"]) == set(TITLES)


def test_no_section_forgets_fastae():
    results = json.loads((BENCH / "results" / "audit.json").read_text())
    for entry in results["sections"].values():
        assert any(row["library"].startswith("fastae ") for row in entry["rows"])
