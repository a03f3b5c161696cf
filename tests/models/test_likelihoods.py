"""Models with a log-likelihood: loss, score, output and training against torch.distributions."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, NegativeBinomial, Normal, Poisson

import fastae
from fastae.nn.log_likelihood import LOG_LIKELIHOODS, check_support

# With something to train, and one with a number of its own
WITH = ("gaussian:scale=learned", "gaussian:scale=per_feature", "nb")
KINDS = (*LOG_LIKELIHOODS, *WITH[:2], "gaussian:scale=0.5")
MODES = ["plain", "tied", "BatchNorm", "own forward"]


class Own(fastae.DenseAutoencoder):
    """A model whose forward is its own."""

    def forward(self, x: Any) -> Any:
        return super().forward(x * 0.9)


def model(kind: str, mode: str = "plain", dtype: torch.dtype = torch.float64) -> fastae.DenseAutoencoder:
    torch.manual_seed(1)
    made = (Own if mode == "own forward" else fastae.DenseAutoencoder)(
        [12, 7, 3], likelihood=kind, tied=mode == "tied", dtype=dtype
    )
    if mode == "BatchNorm":
        made.encoder.insert(1, nn.BatchNorm1d(7, dtype=dtype))
    if made.loss_parameter is not None:
        nn.init.normal_(made.loss_parameter)
    return made


def rows(kind: str, count: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    """Data that the likelihood is for."""
    generator = torch.Generator().manual_seed(0)
    if kind.startswith("gaussian"):
        return torch.randn(count, 12, generator=generator, dtype=torch.float64).to(dtype)
    rate = torch.rand(count, 12, generator=generator, dtype=torch.float64) * (1 if kind == "bernoulli" else 4)
    draw = torch.bernoulli if kind == "bernoulli" else torch.poisson
    return draw(rate, generator=generator).to(dtype)


def log_prob(ae: fastae.DenseAutoencoder, p: Tensor, t: Tensor) -> Tensor:
    """log p(t), value by value."""
    part, a = ae.likelihood, ae.loss_parameter
    if isinstance(part, fastae.likelihoods.Gaussian):
        return Normal(p, part.scale if a is None else torch.exp(a / 2)).log_prob(t)
    if part.name == "nb":
        assert a is not None
        return NegativeBinomial(a.exp().expand_as(p), logits=p - a).log_prob(t)
    return (Bernoulli(logits=p) if part.name == "bernoulli" else Poisson(p.exp())).log_prob(t)


def constants(kind: str, t: Tensor) -> Tensor:
    """What the score has and the loss has not, by the book."""
    if kind.startswith("gaussian"):
        fixed = math.log(0.5) if kind.endswith("0.5") else 0.0
        return t.new_full((len(t),), t.shape[1] * (0.5 * math.log(2 * math.pi) + fixed))
    return t.new_zeros(len(t)) if kind == "bernoulli" else torch.lgamma(t + 1).sum(1)


# ---------------------------------------------------------------- loss, score, output


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_score_are_log_likelihoods_in_nats(kind: str, mode: str, backend: str) -> None:
    ae, x = model(kind, mode).eval(), rows(kind)
    p = ae.decoder(ae.encoder(x * 0.9 if mode == "own forward" else x))
    nats = -log_prob(ae, p, x).sum(1)
    torch.testing.assert_close(ae.score(x), nats.detach(), rtol=1e-10, atol=0)
    loss, wanted = ae.loss(x), (nats - constants(kind, x)).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    grads = [torch.autograd.grad(f, list(ae.parameters()), retain_graph=True) for f in (loss, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_the_mean_of_the_data(kind: str) -> None:
    ae, x = model(kind), rows(kind)
    p = ae.decoder(ae.encoder(x))
    functions = {"bernoulli": torch.sigmoid, "poisson": torch.exp, "nb": torch.exp}
    mean = functions.get(kind, lambda p: p)(p)
    torch.testing.assert_close(ae(x), mean)
    torch.testing.assert_close(ae.decode(ae.encode(x)), mean)
    torch.testing.assert_close(ae.logits(x), p)
    torch.testing.assert_close(torch.from_numpy(ae(x.numpy())), mean.detach())


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli", "poisson", "gaussian:scale=0.5"])
def test_extreme_logits_stay_finite(kind: str) -> None:
    ae = model(kind)
    p = torch.tensor([[-200.0, 200.0, -80.0, 80.0]])
    t = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    for backend in ("torch", "triton"):
        if kind == "poisson":
            p = p.clamp(max=80)
        with fastae.use_backend(backend):
            loss = fastae.linear_act_loss(p, torch.eye(4), None, t, loss=kind)
        truth = -log_prob(ae, p.double(), t.double()).sum() - constants(kind, t.double()).sum()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_a_plain_loop_does(kind: str, mode: str, backend: str) -> None:
    mine, theirs, x = model(kind, mode), model(kind, mode), rows(kind)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2, fused=True) for m in (mine, theirs)]
    step = fastae.TrainStep(mine, optimizers[0], 16)
    for batch in (x[:16], x[16:32], x[32:], x[3:10]):
        found = step(batch)
        p = theirs.decoder(theirs.encoder(batch * 0.9 if mode == "own forward" else batch))
        loss = (-log_prob(theirs, p, batch).sum(1) - constants(kind, batch)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        torch.testing.assert_close(found, loss.detach(), rtol=1e-9, atol=0)
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_fit_save_load_and_a_changed_likelihood(kind: str, tmp_path: Path) -> None:
    x = rows(kind, dtype=torch.float32).numpy()
    ae = model(kind, dtype=torch.float32)
    history = ae.fit(x, epochs=30, lr=1e-2, batch_size=16, progress=False)
    assert history.loss[-1] < history.loss[0]
    ae.save(tmp_path / "m")
    same = fastae.load(tmp_path / "m")
    assert same.config() == ae.config()
    np.testing.assert_array_equal(same.score(x), ae.score(x))
    np.testing.assert_array_equal(same(x), ae(x))
    held_out = torch.from_numpy(x[:7])
    val = ae.fit(x, epochs=1, validation_data=held_out, lr=1e-9, progress=False).val_loss[0]
    assert val == pytest.approx(ae.loss(held_out).item(), rel=1e-5)
    other = copy.deepcopy(ae)
    step = fastae.TrainStep(other, torch.optim.SGD(other.parameters(), 1e-9), 16)
    step(held_out)
    other.likelihood = fastae.likelihoods.MSE()
    assert step(held_out).item() == pytest.approx(((other(held_out) - held_out) ** 2).mean().item(), rel=1e-5)


def test_a_loss_of_ones_own_beside_a_likelihood() -> None:
    class Squared(fastae.DenseAutoencoder):
        def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            return (self(x) - x).square().mean()

    torch.manual_seed(0)
    ae, x = Squared([12, 7, 3], likelihood="bernoulli"), rows("bernoulli", dtype=torch.float32)
    wanted = ae.loss(x).item()
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 0.1), 40)
    assert step(x).item() == pytest.approx(wanted, rel=1e-6)
    assert ae.loss(x).item() < wanted


def test_threads_that_ask_for_logits_do_not_meet() -> None:
    ae, x = model("bernoulli"), rows("bernoulli")
    ae.register_forward_hook(lambda *_: None)  # so that the loss calls the model
    wanted, logits, wrong = ae(x).detach(), ae.logits(x).detach(), list[str]()

    def work() -> None:
        for _ in range(100):
            ae.loss(x)
            for name, found, right in (("logits", ae.logits(x), logits), ("mean", ae(x), wanted)):
                if not torch.equal(found.detach(), right):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(copy.deepcopy(ae)(x), wanted)


# ---------------------------------------------------------------- what does not fit


def test_data_that_a_likelihood_is_not_for() -> None:
    x = rows("bernoulli", dtype=torch.float32)
    bad = x.clone()
    bad[3, 5] = 1.5
    text = r"^fit: x must be between 0 and 1 for likelihood 'bernoulli'; got 1\.5 at row 3, column 5$"
    with pytest.raises(ValueError, match=text):
        model("bernoulli", dtype=torch.float32).fit(bad, progress=False)
    text = r"^fit: validation_data must be at least 0 for likelihood 'poisson'; got -1 at row 0, column"
    with pytest.raises(ValueError, match=text):
        model("poisson", dtype=torch.float32).fit(x, validation_data=x - 1, progress=False)
    check_support("gaussian", -x, "x")
    check_support("poisson", torch.empty(0, 12), "x")


@pytest.mark.parametrize("kind", LOG_LIKELIHOODS)
def test_an_output_activation_beside_a_likelihood_is_refused(kind: str) -> None:
    text = f"^DenseAutoencoder: output_activation must be 'identity' beside likelihood '{kind}', which has a mean"
    with pytest.raises(ValueError, match=text):
        fastae.DenseAutoencoder([12, 3], output_activation="sigmoid", likelihood=kind)
