"""Scores of the same rows, twice: a detector that samples its code gives two answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peers.audit.linear_vae import digits
from peers.audit.rows import Row, Section, named, where

EPOCHS, BATCH, CODE, SHARE = 20, 128, 8, 0.1


def audit(epochs: int = EPOCHS) -> Section:
    x = digits().numpy()
    from pyod.models.vae import VAE, VAEModel
    from pythae.models import vae as pythae_vae

    sampled = (
        f"`decision_function` calls the model's `forward` ({where(VAE.evaluating_forward, 'self.model(')}), which "
        f"samples the code in eval mode too ({where(VAEModel.reparameterize, 'randn_like')})"
    )
    line = where(pythae_vae.vae_model.VAE.forward, "_sample_gauss")
    forward = f"`reconstruct` is the training pass, which samples ({line})"
    rows: list[Row] = []
    ours, pyod, pythae, keras = _fastae(x, epochs), _pyod(x, epochs), _pythae(x, epochs), _keras(x, epochs)
    rows += _twice(named("fastae"), "`score`", lambda: ours.score(x))
    rows += _twice(named("fastae"), "`elbo(x, samples=1)`, sampled from its seed", lambda: -ours.elbo(x))
    rows += _twice(named("pyod"), "`VAE.decision_function`", lambda: pyod.decision_function(x), sampled)
    lifted = _pyod(x, epochs, capacity=1e9)
    what = "`VAE(capacity=1e9).decision_function`"
    rows += _twice(named("pyod"), what, lambda: lifted.decision_function(x), sampled)
    rows += _twice(named("pythae"), "error of `predict`", lambda: _errors(x, pythae.predict(_t(x)).recon_x))
    rows += _twice(named("pythae"), "error of `reconstruct`", lambda: _errors(x, pythae.reconstruct(_t(x))), forward)

    def by_output(number: int) -> Any:
        return _errors(x, keras.decoder.predict(keras.encoder.predict(x, verbose=0)[number], verbose=0))

    rows += _twice(named("keras"), "error by way of `z_mean`", lambda: by_output(0))
    rows += _twice(named("keras"), "error by way of `z`", lambda: by_output(2), meant=True)
    how = (
        f"1,797 digits, code {CODE}, {epochs} epochs of batch {BATCH}. *difference*: the median over rows of the "
        "difference between two calls, over the mean score. *outliers*: the share of the "
        f"{SHARE:.0%} highest scores of one call that are not among those of the other."
    )
    notes = [
        "The third output of the Keras example's encoder is the sample; who takes it for the code scores at random.",
        "fastae's `score` of a variational model is -log p(x | μ), without the divergence: a ranking, not a bound "
        "of log p(x). The bound is `elbo`.",
    ]
    return Section(rows, how, notes)


def _t(x: Any) -> torch.Tensor:
    return torch.from_numpy(x)


def _errors(x: Any, made: Any) -> Any:
    return np.square(np.asarray(made.detach() if isinstance(made, torch.Tensor) else made) - x).mean(1)


def _twice(library: str, what: str, score: Callable[[], Any], cause: str = "", meant: bool = False) -> list[Row]:
    with torch.no_grad():
        first, second = (np.asarray(score(), dtype=np.float64) for _ in range(2))
    off = float(np.median(np.abs(first - second)) / np.abs(first).mean())
    count = int(len(first) * SHARE)
    kept = len(set(np.argsort(first)[-count:]) & set(np.argsort(second)[-count:]))
    return [
        Row(library, f"{what}, difference", 0.0, off, 0.0, "of the mean", cause=cause, meant=meant),
        Row(library, f"{what}, outliers", 0.0, 1 - kept / count, 0.0, "of them", cause=cause, meant=meant),
    ]


def _fastae(x: Any, epochs: int) -> Any:
    from fastae import DenseAutoencoder

    torch.manual_seed(0)
    ae = DenseAutoencoder([64, 32, CODE], likelihood="gaussian", bottleneck="variational")
    ae.fit(x, epochs=epochs, batch_size=BATCH, validation_split=0.0, progress=False)
    return ae


def _pyod(x: Any, epochs: int, **options: Any) -> Any:
    """At its defaults, but for the width of the code and the batch."""
    from pyod.models.vae import VAE

    return VAE(latent_dim=CODE, epoch_num=epochs, batch_size=BATCH, verbose=0, **options).fit(x)


def _pythae(x: Any, epochs: int) -> Any:
    """Its own network; the weights hardly matter here, so a plain loop trains it."""
    from pythae.models import VAE, VAEConfig

    torch.manual_seed(0)
    model = VAE(VAEConfig(input_dim=(64,), latent_dim=CODE))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            model({"data": _t(x)[rows]}).loss.backward()
            optimizer.step()
    return model.eval()


def _keras(x: Any, epochs: int) -> Any:
    import keras

    from peers.audit.keras_example import linear

    keras.utils.set_random_seed(0)
    model = linear(64, CODE)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    model.fit(x, epochs=epochs, batch_size=BATCH, verbose=0)
    return model
