"""Linear models at the optimum that a book gives for them: a variational code and PCA, denoisers and their matrices."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from fastae import DenseAutoencoder, TrainStep
from fastae.bottlenecks import Variational
from fastae.noise import Drop, Gaussian, Mask, Noise

pytestmark = pytest.mark.usefixtures("one_thread")
DIGITS = torch.from_numpy(load_digits().data).float() / 4


def trained(ae: DenseAutoencoder, x: Tensor, epochs: int, batch: int, rates: tuple[float, ...]) -> DenseAutoencoder:
    """Adam at falling rates."""
    optimizer = torch.optim.Adam(ae.parameters(), lr=rates[0], fused=True)
    step = TrainStep(ae, optimizer, batch, seed=1)
    generator = torch.Generator().manual_seed(0)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                step(x, rows)
    return ae


@pytest.mark.thorough
def test_a_linear_variational_code_is_probabilistic_pca() -> None:
    """Its bound is tight (Lucas et al. 2019): PCA's log-likelihood to 0.05 nats, the noise's variance to 1 %. A KL of
    0, a standard deviation of exp(l), a mean over features are 7 to 280 nats away."""
    pca = PCA(8).fit(DIGITS)
    torch.manual_seed(0)
    ae = DenseAutoencoder([64, 8], "identity", likelihood="gaussian:scale=learned", bottleneck=Variational())
    with torch.no_grad():
        ae.decoder[0].bias.copy_(DIGITS.mean(0))
        ae.encoder[0].weight[8:] = 0
    trained(ae, DIGITS, 400, 128, (1e-2, 3e-3, 1e-3, 1e-4))
    bound = ae.elbo(DIGITS, samples=200).mean()
    truth = pca.score(DIGITS)
    assert float(bound) == pytest.approx(truth, abs=0.05)
    weighted = float(ae.elbo(DIGITS, samples=200, importance=True).mean())
    assert float(bound) - 0.02 < weighted < truth + 0.02
    variance = ae.likelihood_parameters["log_variance"].exp().item()
    assert variance == pytest.approx(pca.noise_variance_, rel=0.01)


@pytest.mark.parametrize("noise", [Mask(0.3), Gaussian(1.0), Drop(0.5)], ids=str)
def test_a_linear_denoiser_is_at_its_closed_form(noise: Noise) -> None:
    """E |x - B x~ - c|^2, least where B = Cov(x, x~) Cov(x~)^-1: the trained model's risk within 0.5 %."""
    x = DIGITS.double()
    cov, square = torch.cov(x.T, correction=0), (x**2).mean(0)
    if isinstance(noise, Gaussian):
        cross, spoilt = cov, cov + noise.std**2 * torch.eye(64).double()
    else:
        keep = 1 - noise.q
        gain = 1 / keep if isinstance(noise, Drop) else 1.0
        cross = gain * keep * cov
        spoilt = gain**2 * (keep**2 * cov + keep * noise.q * torch.diag(square))
    best = torch.linalg.solve(spoilt + 1e-12 * torch.eye(64), cross).T

    def risk(b: Tensor, off: Tensor) -> float:
        return float(torch.trace(cov - 2 * b @ cross + b @ spoilt @ b.T) + (off**2).sum()) / 64

    torch.manual_seed(0)
    ae = trained(DenseAutoencoder([64, 64], "identity", corrupt=noise), DIGITS, 200, 256, (3e-3, 1e-3, 2e-4, 4e-5))
    first, last = ae.encoder[0], ae.decoder[0]
    b = (last.weight @ first.weight).detach().double()
    mean = x.mean(0) * (1 - noise.q if isinstance(noise, Mask) else 1)
    off = b @ mean + (last.weight @ first.bias + last.bias).detach().double() - x.mean(0)
    assert risk(b, off) == pytest.approx(risk(best, torch.zeros(64)), rel=5e-3)
    assert risk(torch.eye(64).double(), 0 * off) > 1.5 * risk(best, 0 * off)


def test_the_masked_values_alone_make_the_same_linear_denoiser() -> None:
    """A value that is masked is predicted from the others: by the regression on those that are kept."""
    torch.manual_seed(0)
    x = torch.randn(4000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])  # both of variance 1, correlation 0.8
    ae = DenseAutoencoder([2, 2], "identity", corrupt=Mask(0.5, "masked"))
    trained(ae, x, 40, 500, (1e-2, 1e-3, 1e-4))
    b = (ae.decoder[0].weight @ ae.encoder[0].weight).detach()
    # of two masked, nothing is known; of one, the other is known: off the diagonal 0.8, and the diagonal never counts
    torch.testing.assert_close(b[0, 1], torch.tensor(0.8), atol=0.03, rtol=0)
    torch.testing.assert_close(b[1, 0], torch.tensor(0.8), atol=0.03, rtol=0)


@pytest.mark.thorough
def test_a_linear_autoencoder_is_pca() -> None:
    pca = PCA(8).fit(DIGITS)
    wanted = float(np.mean((DIGITS.numpy() - pca.inverse_transform(pca.transform(DIGITS))) ** 2))
    torch.manual_seed(0)
    ae = trained(DenseAutoencoder([64, 8], "identity"), DIGITS, 500, 64, (1e-2, 3e-3, 1e-3, 2e-4))
    assert float(ae.score(DIGITS).mean()) == pytest.approx(wanted, rel=2e-3)


def test_poisson_and_bernoulli_codes_of_nothing_are_the_means() -> None:
    """A decoder that gets no code, beta so large: the mean of each column is the most likely one."""
    for likelihood, x in (("poisson", DIGITS.round()), ("bernoulli", DIGITS / 4)):
        torch.manual_seed(0)
        part: dict[str, Any] = {"likelihood": likelihood, "bottleneck": Variational(1e3)}
        ae = trained(DenseAutoencoder([64, 2], **part), x, 60, 256, (3e-2, 1e-2, 1e-3))
        seen = x.mean(0) > 0.05  # a mean of 0 is infinitely far
        torch.testing.assert_close(ae(x).mean(0)[seen], x.mean(0)[seen], rtol=0.05, atol=0.02)


def test_steps_of_mnist_size_are_those_of_torch_distributions() -> None:
    """784-512-32 with a bernoulli likelihood: the same losses as a plain model that is given the same noise."""
    from torch.distributions import Bernoulli, Normal, kl_divergence

    x = torch.rand(512, 784, generator=torch.Generator().manual_seed(0)).round()
    torch.manual_seed(0)
    ae = DenseAutoencoder([784, 512, 32], likelihood="bernoulli", bottleneck=Variational())
    layers = [torch.nn.Linear(k, n) for k, n in [*pairwise([784, 512, 64]), *pairwise([32, 512, 784])]]
    for mine, its in zip(layers, [*ae.encoder, *ae.decoder], strict=True):
        mine.load_state_dict(its.state_dict())
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    step = TrainStep(ae, torch.optim.Adam(ae.parameters(), lr=1e-3, fused=True), 128)
    for rows in torch.arange(512).split(128):
        loss = step(x, rows)
        (key,) = [place.key for place in step._last.places if place.key is not None]
        mu, log_var = layers[1](layers[0](x[rows]).relu()).chunk(2, 1)
        code = Normal(mu, (log_var / 2).exp())
        logits = layers[3](layers[2](mu + code.stddev * key.drawn[0]).relu())
        nll = -Bernoulli(logits=logits).log_prob(x[rows]).sum(1)
        kl = kl_divergence(code, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
        wanted = (nll + kl).mean()
        optimizer.zero_grad()
        wanted.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        measured, raised = step.divergence()
        assert measured.item() == pytest.approx(kl.mean().item(), rel=1e-4)
        assert raised.item() == pytest.approx(measured.item(), rel=1e-6)
