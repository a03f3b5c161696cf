"""Mean and standard deviation of what is drawn: the samples of a code, and noise on values that are all the same."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from peers.audit.rows import Row, Section, moments, named, where

DRAWS, COLUMNS = 1_000_000, 8


def audit(draws: int = DRAWS) -> Section:
    rows = _samples(draws) + _keras_layers(draws) + _fastae_noise(draws) + _fastae_steps(draws)
    how = (
        f"{draws:,} draws each, ± one standard error; nothing else is allowed. *code*: ε of z = μ + σε, drawn by the "
        "library's own function at μ = 0 and log σ² = 0. *layer* and *noise*: values after it, all of them 1 before "
        "(0.5 for salt and pepper, N(0, 1) for swapped ones). *step*: the mean squared difference from the clean value "
        "that a `TrainStep` of an identity matrix has as its loss: the noise that training itself draws."
    )
    notes = [
        "Keras' `GaussianNoise` takes no `stddev` above 1: ValueError. RecBole's divergence is right (above); "
        "with ε a hundredth of what it should be, the code is all but deterministic.",
    ]
    return Section(rows, how, notes)


def _samples(draws: int) -> list[Row]:
    from pyod.models.vae import VAEModel
    from pythae.models import VAE, VAEConfig
    from recbole.model.general_recommender.multivae import MultiVAE

    from peers.audit.keras_example import make_classes

    zeros = torch.zeros(draws // COLUMNS, COLUMNS)
    torch.manual_seed(0)
    model = VAE(VAEConfig(input_dim=(4,), latent_dim=COLUMNS))
    training = SimpleNamespace(training=True)
    wrong = f"{where(MultiVAE.reparameterize, 'std=0.01')} draws it with `std=0.01`"
    rows = [_std(named("fastae"), "code", 1.0, *_fastae_code(draws))]
    for library, what, drawn, cause in (
        (named("pythae"), "code", model._sample_gauss(zeros, torch.ones_like(zeros))[0], ""),
        (named("keras"), "code, the documented example", np.asarray(make_classes()[0]()([zeros.numpy()] * 2)), ""),
        (named("pyod"), "code", VAEModel(4, [4], [4], COLUMNS).reparameterize(zeros, zeros).detach(), ""),
        (named("recbole"), "code, MultiVAE", MultiVAE.reparameterize(training, zeros, zeros), wrong),
    ):
        rows.append(_std(library, what, 1.0, *moments(drawn)["std"], cause))
    return rows


def _std(library: str, what: str, wanted: float, found: float, error: float, cause: str = "") -> Row:
    return Row(library, f"{what}, std", wanted, found, 0.0, error=error, cause=cause)


def _both(library: str, what: str, mean: float, std: float, drawn: Any) -> list[Row]:
    found = moments(drawn)
    return [
        Row(library, f"{what}, mean", mean, found["mean"][0], 0.0, error=found["mean"][1]),
        Row(library, f"{what}, std", std, found["std"][0], 0.0, error=found["std"][1]),
    ]


def _fastae_code(draws: int) -> tuple[float, float]:
    """(std, error) of a training step's ε: with mu = log_var = 0 and an identity decoder, its loss is Σ ε² / 2."""
    from fastae import DenseAutoencoder

    ae = DenseAutoencoder([COLUMNS, COLUMNS], "identity", likelihood="gaussian", bottleneck="variational")
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter.zero_()
        ae.decoder[0].weight.copy_(torch.eye(COLUMNS))
    mean, error = _losses(ae, torch.zeros(draws // 20 // COLUMNS, COLUMNS))
    square = 2 * mean / COLUMNS
    return math.sqrt(square), error / mean * math.sqrt(square) / 2


def _losses(ae: Any, x: torch.Tensor, steps: int = 20) -> tuple[float, float]:
    """(mean, standard error) of the loss of independent training steps that change nothing."""
    from fastae import TrainStep

    step = TrainStep(ae, torch.optim.SGD(ae.parameters(), lr=0.0), len(x))
    found = [float(step(x)) for _ in range(steps)]
    return float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(steps)


def _keras_layers(draws: int) -> list[Row]:
    import keras

    keras.utils.set_random_seed(0)
    ones, library = np.ones((draws // COLUMNS, COLUMNS), np.float32), named("keras")
    rows: list[Row] = []
    for layer, what, std in (
        (keras.layers.GaussianNoise(0.4), "layer `GaussianNoise(0.4)`", 0.4),
        (keras.layers.GaussianDropout(0.3), "layer `GaussianDropout(0.3)`", math.sqrt(3 / 7)),
        (keras.layers.Dropout(0.3), "layer `Dropout(0.3)`", math.sqrt(3 / 7)),
    ):
        rows += _both(library, what, 1.0, std, layer(ones, training=True))
    return rows


def _fastae_noise(draws: int) -> list[Row]:
    from fastae.models.objective import noisy
    from fastae.noise import Drop, Gaussian, Mask, SaltPepper, Swap

    ones, library = torch.ones(draws // COLUMNS, COLUMNS), named("fastae")
    normal = torch.randn(ones.shape, generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    for part, mean, std, x in (
        (Gaussian(0.4), 1.0, 0.4, ones),
        (Mask(0.3), 0.7, math.sqrt(0.3 * 0.7), ones),
        (Drop(0.3), 1.0, math.sqrt(3 / 7), ones),
        (SaltPepper(0.2), 0.5, math.sqrt(0.2 / 4), ones / 2),
        (Swap(0.3), float(normal.mean()), float(normal.std()), normal),
    ):
        rows += _both(library, f"noise `{_short(part)}`", mean, std, noisy(part, x))
    return rows


def _short(part: Any) -> str:
    return f"{type(part).__name__}({part.std if part.name == 'gaussian' else part.q:g})"


def _fastae_steps(draws: int) -> list[Row]:
    from fastae import DenseAutoencoder
    from fastae.noise import Drop, Gaussian, Mask, SaltPepper, Swap

    ones = torch.ones(draws // 20 // COLUMNS, COLUMNS)
    normal = torch.randn(ones.shape, generator=torch.Generator().manual_seed(0))
    swapped = 2 * 0.3 * float(normal.var(0, correction=0).mean())  # of another row or, by chance, of its own
    rows: list[Row] = []
    for part, square, x in (
        (Gaussian(0.4), 0.16, ones), (Mask(0.3), 0.3, ones), (Drop(0.3), 3 / 7, ones),
        (SaltPepper(0.2), 0.05, ones / 2), (Swap(0.3), swapped, normal),
    ):  # fmt: skip
        ae = DenseAutoencoder([COLUMNS, COLUMNS], "identity", corrupt=part)
        with torch.no_grad():
            for layer in (ae.encoder[0], ae.decoder[0]):
                layer.weight.copy_(torch.eye(COLUMNS))
                layer.bias.zero_()
        found, error = _losses(ae, x)
        rows.append(Row(named("fastae"), f"step, `{_short(part)}`, mean square", square, found, 0.0, error=error))
    return rows
