"""Likelihoods with something to train: the parameter in a step, in files, after a resumed run; scores against SciPy."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import nbinom, norm
from torch import Tensor, nn
from torch.distributions import NegativeBinomial, Normal

import fastae
from fastae import likelihoods
from fastae.likelihoods import Gaussian

EACH = ("gaussian:scale=learned", "gaussian:scale=per_feature", "nb")


def model(likelihood: Any = "nb", seed: int = 1, **options: Any) -> fastae.DenseAutoencoder:
    torch.manual_seed(seed)
    return fastae.DenseAutoencoder([12, 7, 3], likelihood=likelihood, **options)


def rows(likelihood: str, count: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rate = 4 * torch.rand(count, 12, generator=generator, dtype=torch.float64)
    if likelihood == "nb":
        return torch.poisson(rate, generator=generator).to(dtype)
    return torch.randn(count, 12, generator=generator, dtype=torch.float64).to(dtype)


def nll(ae: fastae.DenseAutoencoder, x: Tensor) -> Tensor:
    """The loss in the words of torch.distributions."""
    p, a = ae.decoder(ae.encoder(x)), ae.loss_parameter
    assert a is not None
    if ae.likelihood.name == "nb":
        values = -NegativeBinomial(a.exp().expand_as(p), logits=p - a).log_prob(x) - torch.lgamma(x + 1)
    else:
        values = -Normal(p, torch.exp(a / 2)).log_prob(x) - 0.5 * math.log(2 * math.pi)
    return values.sum(1).mean()


def plain_step(ae: fastae.DenseAutoencoder, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = nll(ae, x)
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---------------------------------------------------------------- the parameter


def test_which_parameters_there_are() -> None:
    assert not hasattr(model("gaussian"), "likelihood_parameters")
    assert list(model("gaussian").state_dict()) == list(model("mse").state_dict())
    for likelihood, name, shape, start in (
        (EACH[0], "log_variance", [1], 0.0),
        (EACH[1], "log_variance", [12], 0.0),
        ("nb", "log_theta", [12], 0.0),
        (likelihoods.NegativeBinomial(theta=10), "log_theta", [12], math.log(10)),
    ):
        ae = model(likelihood)
        assert [*ae.state_dict()][-1] == f"likelihood_parameters.{name}"
        parameter = ae.loss_parameter
        assert parameter is ae.likelihood_parameters[name]
        assert list(parameter.shape) == shape
        assert parameter.tolist() == pytest.approx([start] * shape[0])
        assert next(ae.parameters()) is ae.encoder[0].weight, "whose dtype and device are the model's"
    assert model(dtype=torch.bfloat16).loss_parameter.dtype == torch.float32
    assert model(dtype=torch.float64).loss_parameter.dtype == torch.float64


def test_a_likelihood_that_the_model_was_not_made_with() -> None:
    ae, x = model("mse"), rows("nb")
    ae.likelihood = likelihoods.NegativeBinomial()
    text = "DenseAutoencoder: likelihood must be one that the model was made with, or have nothing to train; got 'nb', "
    for call in (ae.loss, ae.score, lambda x: fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 0.1), 40)):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}whose log_theta"):
            call(x)
    ae = model("nb")
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 1e-9), 40)
    step(x)
    ae.likelihood = fastae.likelihoods.Poisson()
    assert step(x).item() == pytest.approx((ae(x) - x * ae.logits(x)).sum(1).mean().item(), rel=1e-5)
    assert ae.loss_parameter is None
    assert ae.likelihood_parameters["log_theta"].grad is None


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("kind", EACH)
def test_a_step_in_fp64_is_autograds(kind: str, backend: str) -> None:
    """Loss and each gradient, of unequal batches; and those of `model.loss`."""
    mine, theirs = model(kind, dtype=torch.float64), model(kind, dtype=torch.float64)
    x = rows(kind, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9) for m in (mine, theirs)]
    step = fastae.TrainStep(mine, optimizers[0], 16)
    for batch in (x[:16], x[16:32], x[32:], x[:1]):
        mine.load_state_dict(theirs.state_dict())
        found = step(batch)
        loss = plain_step(theirs, batch, optimizers[1])
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    eager = copy.deepcopy(theirs)
    eager.zero_grad()
    eager.loss(x).backward()
    wanted = torch.autograd.grad(nll(theirs, x), list(theirs.parameters()))
    torch.testing.assert_close([p.grad for p in eager.parameters()], list(wanted), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", EACH)
def test_a_step_in_bf16_keeps_the_parameter_in_fp32(kind: str, backend: str) -> None:
    """Its gradient is as near to fp64 as eager autocast's in the same precision; in a bf16 model too."""
    x = rows(kind)
    for options, precision in (({}, "bfloat16"), ({"dtype": torch.bfloat16}, None)):
        mine = model(kind, **options)
        truth = copy.deepcopy(mine).double()
        truth_grads = torch.autograd.grad(nll(truth, x.double()), list(truth.parameters()))
        step = fastae.TrainStep(mine, torch.optim.SGD(mine.parameters(), 1e-2), 40, precision)
        step(x)
        parameter = mine.loss_parameter
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - truth_grads[-1]).norm() / truth_grads[-1].norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps
        adam = fastae.TrainStep(mine, torch.optim.Adam(mine.parameters(), 1e-2, fused=True), 40, precision)
        before = adam(x)
        for _ in range(30):
            loss = adam(x)
        assert loss < before


@pytest.mark.parametrize("kind", EACH)
def test_what_changes_between_steps(kind: str) -> None:
    """A frozen parameter, one whose memory moved, a hook on it: noticed, and as a plain loop has it."""
    mine, theirs = model(kind, dtype=torch.float64), model(kind, dtype=torch.float64)
    x = rows(kind, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (mine, theirs)]
    step = fastae.TrainStep(mine, optimizers[0], 40)
    seen: list[Tensor] = []

    def freeze(ae: fastae.DenseAutoencoder) -> None:
        ae.loss_parameter.requires_grad_(False)

    def thaw(ae: fastae.DenseAutoencoder) -> None:
        ae.loss_parameter.requires_grad_(True)
        for p in (*ae.encoder.parameters(), *ae.decoder.parameters()):
            p.requires_grad_(False)

    def move(ae: fastae.DenseAutoencoder) -> None:
        ae.loss_parameter.data = ae.loss_parameter.data.clone() + 0.25
        ae.requires_grad_(True)

    def hook(ae: fastae.DenseAutoencoder) -> None:
        ae.loss_parameter.register_hook(lambda grad: (seen.append(grad), 2 * grad)[1])

    for change in (lambda ae: None, freeze, thaw, move, hook, lambda ae: None):
        change(mine)
        change(theirs)
        loss, wanted = step(x), plain_step(theirs, x, optimizers[1])
        torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=0)
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
            assert (a.grad is None) == (b.grad is None)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", EACH)
def test_islands_and_a_loss_of_ones_own(kind: str) -> None:
    class Own(fastae.DenseAutoencoder):
        def loss(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            return super().loss(x, target) * 2

    x = rows(kind, dtype=torch.float64)
    for number in range(2):
        torch.manual_seed(1)
        ae = (Own if number else fastae.DenseAutoencoder)([12, 7, 3], likelihood=kind, dtype=torch.float64)
        if not number:
            ae.decoder.append(nn.LayerNorm(12, dtype=torch.float64))  # the last stage is an island
        other = copy.deepcopy(ae)
        step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 1e-3), 40)
        optimizer = torch.optim.SGD(other.parameters(), 1e-3)
        for _ in range(2):
            found = step(x)
            optimizer.zero_grad()
            loss = nll(other, x) * (1 + number)
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(found, loss.detach(), rtol=1e-11, atol=0)
        torch.testing.assert_close([*ae.parameters()], [*other.parameters()], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", EACH)
def test_a_step_on_a_cpu_is_recorded_and_replayed(kind: str) -> None:
    ae, x = model(kind), rows(kind)
    step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 1e-2), 40)
    with fastae.use_backend("torch"):
        step(x)
    assert step.static.repeats
    assert step.static.memory.recorded


@pytest.mark.parametrize("kind", EACH)
def test_launches_do_not_rise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastae_kernels.jit import launch

    counted: list[int] = []
    run = launch.launch
    monkeypatch.setattr(launch, "launch", lambda *a, **o: (counted.append(1), run(*a, **o))[1])
    launches = []
    for likelihood in (kind, "gaussian"):
        with fastae.use_backend("triton"):
            ae, x = model(likelihood), rows(kind)
            step = fastae.TrainStep(ae, torch.optim.SGD(ae.parameters(), 1e-2), 40)
            counted.clear()
            step(x)
            launches.append(len(counted))
    assert launches[0] == launches[1]


# ---------------------------------------------------------------- autograd, compile, explain


@pytest.mark.parametrize("kind", EACH)
def test_second_derivatives_and_input_gradients(kind: str) -> None:
    ae, x = model(kind, dtype=torch.float64, activation="tanh"), rows(kind, dtype=torch.float64)
    found, wanted = [
        torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(f, list(ae.parameters()), create_graph=True)),
            list(ae.parameters()),
        )
        for f in (ae.loss(x), nll(ae, x))
    ]
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    leaf = x.clone().requires_grad_()
    mine, theirs = (torch.autograd.grad(f, leaf)[0] for f in (ae.loss(leaf), nll(ae, leaf)))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
@pytest.mark.parametrize("kind", EACH)
def test_compiled(kind: str) -> None:
    ae, x = model(kind), rows(kind)
    loss = torch.compile(ae.loss, backend="aot_eager")(x)
    grads = torch.autograd.grad(loss, list(ae.parameters()))
    wanted = ae.loss(x)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, list(ae.parameters())))


@pytest.mark.parametrize("kind", EACH)
def test_explained(kind: str) -> None:
    for options in ({}, {"gpu": "h100", "precision": "bfloat16"}):
        assert "linear_act_loss" in str(fastae.explain(model(kind), 64, **options)) or options


# ---------------------------------------------------------------- score


def test_the_score_of_counts_is_scipys(backend: str) -> None:
    """fp32, with counts up to 20,000 near the mean, where the loss and its constants are 200,000 nats a value each."""
    ae = model(likelihoods.NegativeBinomial(theta=50))
    generator = np.random.default_rng(0)
    with torch.no_grad():
        ae.decoder[-1].bias.copy_(torch.linspace(-1, 9.9, 12))
        ae.decoder[-1].weight.mul_(1e-2)
    theta = np.exp(ae.loss_parameter.detach().double().numpy())
    bias = ae.decoder[-1].bias.detach().double().numpy()
    x = generator.poisson(np.exp(bias) * generator.gamma(50, 1 / 50, (64, 12))).astype(np.float32)
    with torch.no_grad():  # codes of such rows are large: let the layers see none of it
        ae.encoder[0].weight.mul_(1e-5)
    mu = np.exp(copy.deepcopy(ae).double().logits(torch.from_numpy(x).double()).detach().numpy())
    truth = -nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1)
    np.testing.assert_allclose(ae.score(x), truth, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 3.0, "learned", "per_feature"])
def test_the_score_of_a_gaussian_is_scipys(scale: float | str, backend: str) -> None:
    ae, x = model(Gaussian(scale)), rows("gaussian")
    sigma: Any = scale
    if ae.loss_parameter is not None:
        nn.init.normal_(ae.loss_parameter)
        sigma = np.exp(ae.loss_parameter.detach().double().numpy() / 2)
    mean = copy.deepcopy(ae).double()(x.double()).detach().numpy()
    truth = -norm.logpdf(x.double().numpy(), mean, sigma).sum(1)
    np.testing.assert_allclose(ae.score(x).numpy(), truth, rtol=1e-5)


# ---------------------------------------------------------------- fit, files, checkpoints


@pytest.mark.parametrize("kind", EACH)
def test_saved_loaded_and_summarised(kind: str, tmp_path: Path) -> None:
    ae, x = model(kind), rows(kind).numpy()
    ae.fit(x, epochs=5, lr=1e-2, batch_size=16, progress=False)
    assert ae.loss_parameter.abs().max() > 0, "it was trained"
    assert ae.config()["likelihood"] == kind
    ae.save(tmp_path / "m")
    same = fastae.load(tmp_path / "m")
    assert same.config() == ae.config()
    assert all(map(torch.equal, same.state_dict().values(), ae.state_dict().values()))
    assert same.loss_parameter.requires_grad
    np.testing.assert_array_equal(same.score(x), ae.score(x))
    assert f"likelihood {kind}" in ae.summary()
    state = ae.state_dict()
    fresh = model(kind, seed=2)
    fresh.load_state_dict(state)
    np.testing.assert_array_equal(fresh.score(x), ae.score(x))


@pytest.mark.parametrize("kind", EACH)
def test_a_resumed_run_has_the_bits_of_one_go(kind: str, tmp_path: Path) -> None:
    x = rows(kind).numpy()
    whole, half = model(kind), model(kind)
    options = {"lr": 1e-2, "batch_size": 16, "progress": False}
    whole.fit(x, epochs=6, **options)
    half.fit(x, epochs=3, callbacks=[fastae.Checkpoint(tmp_path / "c")], **options)
    rest = model(kind)
    rest.fit(x, epochs=6, callbacks=[fastae.Checkpoint(tmp_path / "c", resume=True)], **options)
    assert all(map(torch.equal, whole.state_dict().values(), rest.state_dict().values()))


def test_a_learned_variance_is_the_mean_square() -> None:
    """s = log MSE where the gradient is 0; its features' where each has its own, beside frozen weights: trained, they
    would let three features' errors go to 0 for a code of three."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    x = x + torch.randn(200, 12, generator=generator) * torch.linspace(0.1, 1, 12)
    for scale, dims in (("learned", (0, 1)), ("per_feature", (0,))):
        torch.manual_seed(0)
        ae = fastae.DenseAutoencoder([12, 3], code_activation="identity", likelihood=Gaussian(scale))
        if scale == "per_feature":
            for p in (*ae.encoder.parameters(), *ae.decoder.parameters()):
                p.requires_grad_(False)
        for lr, epochs in ((3e-2, 300), (3e-3, 100), (3e-4, 50)):
            ae.fit(x, epochs=epochs, lr=lr, batch_size=200, validation_split=0, progress=False)
        wanted = (ae(x) - x).square().mean(dims).log().flatten()
        torch.testing.assert_close(ae.loss_parameter.detach(), wanted.detach(), rtol=0, atol=0.02)


def test_dispersion_is_found() -> None:
    """Counts of theta = 2 and mean 5, whatever the code: log theta within four standard errors, some 0.05 a feature."""
    generator = np.random.default_rng(0)
    counts = generator.negative_binomial(2, 2 / (2 + 5), (4000, 6)).astype(np.float32)
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([6, 1], likelihood="nb")
    with torch.no_grad():
        ae.encoder[0].weight.zero_()
        ae.encoder[0].weight.requires_grad_(False)
    for lr in (3e-2, 3e-3):
        ae.fit(counts, epochs=25, lr=lr, batch_size=500, validation_split=0, progress=False)
    assert (ae.loss_parameter.detach() - math.log(2)).abs().max() < 0.2
    np.testing.assert_allclose(ae(counts).mean(0), 5, rtol=0.1)


# ---------------------------------------------------------------- what does not fit


def test_counts_must_not_be_negative() -> None:
    text = r"^fit: x must be at least 0 for likelihood 'nb'; got -1 at row 2, column 3$"
    x = rows("nb")
    x[2, 3] = -1
    with pytest.raises(ValueError, match=text):
        model("nb").fit(x, progress=False)


SCALE = "Gaussian: scale must be a positive number or 'learned' or 'per_feature'; got "


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Gaussian(-1), f"{SCALE}-1"),
        (lambda: Gaussian("foo"), f"{SCALE}'foo'"),
        (lambda: Gaussian(math.inf), f"{SCALE}inf"),
        (lambda: Gaussian(None), f"{SCALE}None"),
        (lambda: likelihoods.NegativeBinomial(0), "NegativeBinomial: theta must be a positive number; got 0"),
        (lambda: model("gaussian:scale=-1"), f"{SCALE}-1.0"),
        (lambda: model("gaussian:scale=foo"), "likelihood: scale must be a number, learned, per_feature; got 'foo'"),
        (lambda: model("nb:theta=learned"), "likelihood: theta must be a number; got 'learned'"),
    ],
)
def test_options_that_there_are_not(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()
