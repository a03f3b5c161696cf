"""The divergence that each library's loss holds at given means and log-variances, and its gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.audit import closed_forms
from peers.audit.rows import Row, Section, named, where

ROWS, LATENTS = 64, 8
ALLOWED = 1e-5  # of the truth; the losses are computed in fp32

Found = tuple[float, Any, Any]


def audit() -> Section:
    from torch.distributions import Normal, kl_divergence

    random = np.random.default_rng(0)
    mu, log_var = random.normal(size=(ROWS, LATENTS)), random.uniform(-4, 2, (ROWS, LATENTS))
    mu, log_var = mu.astype(np.float32), log_var.astype(np.float32)
    truth = closed_forms.divergence(mu.astype(np.float64), log_var.astype(np.float64))
    laws = Normal(torch.from_numpy(mu).double(), (torch.from_numpy(log_var).double() / 2).exp())
    theirs = float(kl_divergence(laws, Normal(torch.zeros(1).double(), torch.ones(1).double())).sum(1).mean())
    assert abs(theirs / truth[0] - 1) < 1e-12, "the closed form is not that of torch.distributions"

    from pyod.models.vae import vae_loss

    clamp = f"{where(vae_loss, 'max=capacity')}: clamped to `capacity`, 0 by default"
    unscaled = f"{where(vae_loss, 'recon_loss = get_criterion')}: the mean over features beside a sum over latents"
    rows: list[Row] = []
    for library, what, found, cause in (
        (named("fastae"), "`loss`", _fastae(mu, log_var), ""),
        (named("fastae"), "`TrainStep`", _fastae_step(mu, log_var), ""),
        (named("pythae"), "`VAE.loss_function`", _pythae(mu, log_var), ""),
        (named("keras"), "the documented example", _keras(mu, log_var), ""),
        (named("recbole"), "`MultiVAE`, annealed to 1", _recbole(mu, log_var), ""),
        (named("pyod"), "`vae_loss`", _pyod(mu, log_var), clamp),
        (named("pyod"), "`vae_loss(capacity=1e9)`", _pyod(mu, log_var, capacity=1e9), ""),
    ):
        rows += _compared(library, what, truth, found, cause)
    rows += _reductions(unscaled)
    how = (
        f"{ROWS} rows of {LATENTS} latents, means from N(0, 1) and log-variances from U(-4, 2). The value is the sum "
        "over latents, mean over rows, of torch.distributions in fp64. *gradient*: the norm of the difference from the "
        "true gradient, by means and log-variances together, over the norm of the truth. "
        f"{ALLOWED:g} of the truth is allowed, for fp32."
    )
    return Section(rows, how)


def _compared(library: str, what: str, truth: Found, found: Found, cause: str) -> list[Row]:
    true_gradient = np.concatenate([np.ravel(truth[1]), np.ravel(truth[2])])
    gradient = np.concatenate([np.ravel(np.asarray(part, dtype=np.float64)) for part in found[1:]])
    off = float(np.linalg.norm(gradient - true_gradient) / np.linalg.norm(true_gradient))
    return [
        Row(library, f"{what}, value", truth[0], found[0], ALLOWED * truth[0], "nats", cause=cause),
        Row(library, f"{what}, gradient", 0.0, off, ALLOWED, "of its norm", cause=cause),
    ]


def _reductions(unscaled: str) -> list[Row]:
    """What a row's sum of squares over 2 weighs beside its divergence, means over rows: 1 where the loss is a bound."""
    from pyod.models.vae import vae_loss

    width, zeros = 2 * LATENTS, torch.zeros(4, LATENTS)
    x, off = torch.zeros(4, width), torch.ones(4, width)
    half_squares = width / 2  # of each row of `off`
    pyod = float(vae_loss(x, off, zeros, zeros))
    pythae = float(_pythae_model().loss_function(off, x, zeros, zeros, zeros)[1])
    ours = float(_fixed().eval().loss(x, target=off).detach())
    what = f"weight of Σ(x - y)² / 2 beside the divergence, {width} features"
    return [
        Row(named("fastae"), what, 1.0, ours / half_squares, ALLOWED),
        Row(named("pythae"), what, 1.0, pythae / half_squares, ALLOWED),
        Row(named("pyod"), what, 1.0, pyod / half_squares, ALLOWED, cause=unscaled),
    ]


def _fixed() -> Any:
    """A model whose rows are [mu | log_var] and whose decoder gives 0: with target 0 its objective is KL."""
    from fastae import DenseAutoencoder

    ae = DenseAutoencoder([2 * LATENTS, LATENTS], "identity", likelihood="gaussian", bottleneck="variational")
    with torch.no_grad():
        ae.encoder[0].weight.copy_(torch.eye(2 * LATENTS))
        for zero in (ae.encoder[0].bias, ae.decoder[0].weight, ae.decoder[0].bias):
            zero.zero_()
    return ae


def _fastae(mu: Any, log_var: Any) -> Found:
    """By `loss`: the gradient by the rows, which the encoder hands on as they are."""
    x = torch.from_numpy(np.concatenate([mu, log_var], 1)).requires_grad_()
    loss = _fixed().loss(x, target=torch.zeros(x.shape))
    loss.backward()
    assert x.grad is not None
    by_mean, by_log_var = x.grad.chunk(2, 1)
    return float(loss.detach()), by_mean.numpy(), by_log_var.numpy()


def _fastae_step(mu: Any, log_var: Any) -> Found:
    """By a `TrainStep`, which computes no gradient by its rows: one row at a time, that of the encoder's bias."""
    from fastae import TrainStep

    x = torch.from_numpy(np.concatenate([mu, log_var], 1))
    ae = _fixed()
    step = TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), 1)
    losses, gradients = [], []
    for row in x.split(1):
        losses.append(float(step(row, target=torch.zeros(row.shape))))
        gradients.append(ae.encoder[0].bias.grad.numpy().copy() / len(x))
    by_mean, by_log_var = np.split(np.stack(gradients), 2, 1)
    return float(np.mean(losses)), by_mean, by_log_var


def _by_autograd(mu: Any, log_var: Any, loss: Any) -> Found:
    m, v = (torch.from_numpy(part).requires_grad_() for part in (mu, log_var))
    value = loss(m, v)
    value.backward()
    return float(value.detach()), m.grad.numpy(), v.grad.numpy()  # type: ignore[union-attr]


def _pythae_model() -> Any:
    from pythae.models import VAE, VAEConfig

    return VAE(VAEConfig(input_dim=(2 * LATENTS,), latent_dim=LATENTS))


def _pythae(mu: Any, log_var: Any) -> Found:
    zeros, model = torch.zeros(len(mu), 2 * LATENTS), _pythae_model()
    return _by_autograd(mu, log_var, lambda m, v: model.loss_function(zeros, zeros, m, v, m)[0])


def _pyod(mu: Any, log_var: Any, **options: Any) -> Found:
    from pyod.models.vae import vae_loss

    zeros = torch.zeros(len(mu), 2 * LATENTS)
    return _by_autograd(mu, log_var, lambda m, v: vae_loss(zeros, zeros, m, v, **options))


def _keras(mu: Any, log_var: Any) -> Found:
    from peers.audit.keras_example import kl_of

    return kl_of(mu, log_var)


def _recbole(mu: Any, log_var: Any) -> Found:
    """Its `calculate_loss` on a stand-in for the model, whose cross-entropy is of no ratings: 0."""
    from recbole.model.general_recommender.multivae import MultiVAE

    none = torch.zeros(len(mu), 4)

    def loss(m: Tensor, v: Tensor) -> Tensor:
        stand_in = SimpleNamespace(
            USER_ID="user", update=0, total_anneal_steps=0, anneal_cap=1.0, get_rating_matrix=lambda _: none,
            forward=lambda _: (none, m, v),
        )  # fmt: skip
        return MultiVAE.calculate_loss(stand_in, {"user": None})

    return _by_autograd(mu, log_var, loss)
