"""Linear denoisers beside their closed forms: the risk that is left, exact, from the trained matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peers.audit.closed_forms import best_denoiser, risk
from peers.audit.linear_vae import PASSES, digits, train
from peers.audit.rows import Row, Section, named

EPOCHS, RATES, ALLOWED = 200, (3e-3, 1e-3, 2e-4, 4e-5), 0.005
NOISES = (("mask", 0.3), ("gaussian", 1.0))


def audit(epochs: int = EPOCHS) -> Section:
    x = digits()
    wide = x.double().numpy()
    gram = wide.T @ wide / len(wide)
    rows = []
    for noise, amount in NOISES:
        best, cross, spoilt = best_denoiser(gram, noise, amount)
        least = risk(gram, best, cross, spoilt)
        for library, trained in ((named("fastae"), _fastae), (named("keras"), _keras)):
            b, off = trained(x, noise, amount, epochs)
            found = risk(gram, b, cross, spoilt, off)
            what = f"risk, {noise} {amount:g}"
            rows.append(Row(library, what, least, found, ALLOWED * least, relative=True))
    how = (
        "The digits as above, 64-64-64 without activations, mean squared error to the clean row. Mask q: B = "
        "(1 - q) G [(1 - q)² G + q(1 - q) diag G]⁻¹; Gaussian: B = G (G + σ² I)⁻¹. fastae has `Mask` and `Gaussian`; "
        "Keras `Dropout(q)`, then `Rescaling(1 - q)`, and `GaussianNoise`. Adam at "
        f"{', '.join(f'{r:g}' for r in RATES)}, {epochs} epochs each, batch 599. The risk of the trained matrix over "
        "all noise is exact, per feature; 0.5 % above the least is allowed."
    )
    return Section(rows, how)


def _fastae(x: torch.Tensor, noise: str, amount: float, epochs: int) -> tuple[Any, Any]:
    from fastae import DenseAutoencoder, TrainStep
    from fastae.noise import Gaussian, Mask

    torch.manual_seed(0)
    part = Mask(amount) if noise == "mask" else Gaussian(amount)
    ae = DenseAutoencoder([64, 64], "identity", corrupt=part)
    optimizer = torch.optim.Adam(ae.parameters(), fused=True)
    train(TrainStep(ae, optimizer, 599, seed=1), optimizer, x, epochs, RATES)
    first, last = ae.encoder[0], ae.decoder[0]
    with torch.no_grad():
        w, v = first.weight.double(), last.weight.double()
        return (v @ w).numpy(), (v @ first.bias.double() + last.bias.double()).numpy()


def _keras(x: torch.Tensor, noise: str, amount: float, epochs: int) -> tuple[Any, Any]:
    import keras

    keras.utils.set_random_seed(0)
    noisy = [keras.layers.Dropout(amount), keras.layers.Rescaling(1 - amount)]
    if noise == "gaussian":
        noisy = [keras.layers.GaussianNoise(amount)]
    dense = [keras.layers.Dense(64), keras.layers.Dense(64)]
    model = keras.Sequential([keras.Input((64,)), *noisy, *dense])
    model.compile(keras.optimizers.Adam(RATES[0]), "mse")
    often = np.tile(x.numpy(), (PASSES, 1))
    for rate in RATES:
        model.optimizer.learning_rate = rate
        model.fit(often, often, epochs=epochs // PASSES, batch_size=599, verbose=0)
    (w, b), (v, c) = ([np.asarray(a, dtype=np.float64) for a in layer.get_weights()] for layer in dense)
    return (w @ v).T, b @ v + c
