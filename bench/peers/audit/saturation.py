"""Likelihoods far out: cross-entropy at logits of ±20 to ±100, a decoder that ends in a sigmoid, large dispersions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peers.audit import closed_forms
from peers.audit.rows import Row, Section, named, where

LOGITS = (20.0, 50.0, 100.0)
COUNTS = ((3, 2.5), (40, 55.0))
THETAS = (0.1, 10.0, 1e4, 1e6, 1e8)
ALLOWED = 1e-5

Both = tuple[float, float]  # value, derivative by the logit


def audit() -> Section:
    rows = _cross_entropies() + _range() + _negative_binomials()
    how = (
        "*cross-entropy*: the worst of the values, and of the derivatives by the logit, at logits ±20, ±50 and ±100 "
        "with target 0 and 1, as a difference from fp64; values of up to 100, derivatives of up to 1. *range*: "
        "pythae's VAE at its defaults, and fastae's of the same widths, trained on digits that are scaled to "
        "[0, 300]; the best constant has the variance. *negative binomial*: log p of counts 3 (mean 2.5) and 40 (mean "
        "55), the worst "
        f"difference from 50 digits of mpmath over dispersions {', '.join(f'{theta:g}' for theta in THETAS)}. "
        f"{ALLOWED:g} is allowed."
    )
    notes = [
        "Keras puts the logits in the place of probabilities where it can see the sigmoid: its own, and in a graph any "
        "that is the last op before the loss. After another op it has the probabilities alone. From a probability that "
        "is 1 in fp32 no library can do better: fastae's losses take logits only.",
        "Data of such a range want scaling in fastae too: Adam moves a weight by about the learning rate a step, and "
        "after 300 steps little of the variance is explained.",
    ]
    return Section(rows, how, notes)


# ---------------------------------------------------------------- cross-entropy


def _cross_entropies() -> list[Row]:
    from keras.src.backend.tensorflow.nn import binary_crossentropy
    from pythae.models import VAE

    clip = f"probabilities are clipped to [1e-7, 1 - 1e-7] ({where(binary_crossentropy, 'output, backend.epsilon()')})"
    zero = (
        f"`F.binary_cross_entropy` of a sigmoid ({where(VAE.loss_function, 'F.binary_cross_entropy(')}): in fp32 it is "
        "1 from a logit of 17 on, the logarithm of 0 is taken as -100 and the gradient is 0"
    )
    import keras
    import tensorflow as tf

    sigmoid, reshaped = keras.activations.sigmoid, lambda p: keras.ops.reshape(keras.activations.sigmoid(p), (1, 1))
    ours, theirs = named("fastae"), named("keras")
    rows: list[Row] = []
    for library, what, call, cause in (
        (ours, "`loss`", _fastae, ""),
        (named("pythae"), '`reconstruction_loss="bce"`', _pythae, zero),
        (theirs, "a compiled model with a sigmoid", _compiled(False), ""),
        (theirs, "the same, `run_eagerly=True`", _compiled(True), ""),
        (theirs, "`activations.sigmoid`, eager", _keras(False, sigmoid), ""),
        (theirs, "`tf.sigmoid`, in a `tf.function`", _keras(True, tf.sigmoid), ""),
        (theirs, "`tf.sigmoid`, eager", _keras(False, tf.sigmoid), clip),
        (theirs, "`activations.sigmoid`, then a reshape", _keras(True, reshaped), clip),
        (theirs, "`from_logits=True`", _keras(False, lambda p: p, logits=True), ""),
    ):
        rows += _worst(library, what, call, cause)
    return rows


def _worst(library: str, what: str, call: Callable[[float, float], Both], cause: str) -> list[Row]:
    off = [0.0, 0.0]
    for logit in (sign * size for size in LOGITS for sign in (1, -1)):
        for target in (0.0, 1.0):
            truth, found = closed_forms.cross_entropy(logit, target), call(logit, target)
            off = [max(o, abs(f - t)) for o, f, t in zip(off, found, truth, strict=True)]
    return [
        Row(library, f"cross-entropy, {what}, value", 0.0, off[0], ALLOWED, "nats", cause=cause),
        Row(library, f"cross-entropy, {what}, derivative", 0.0, off[1], ALLOWED, "", cause=cause),
    ]


def _fastae(logit: float, target: float) -> Both:
    from fastae import DenseAutoencoder

    ae = DenseAutoencoder([1, 1], likelihood="bernoulli")
    with torch.no_grad():
        ae.decoder[0].weight.zero_()
        ae.decoder[0].bias.fill_(logit)
    loss = ae.loss(torch.full((1, 1), target))
    loss.backward()
    return float(loss.detach()), float(ae.decoder[0].bias.grad)


def _pythae(logit: float, target: float) -> Both:
    from pythae.models import VAE, VAEConfig

    model = VAE(VAEConfig(input_dim=(1,), latent_dim=1, reconstruction_loss="bce"))
    p, zero = torch.tensor([[logit]], requires_grad=True), torch.zeros(1, 1)
    value = model.loss_function(torch.sigmoid(p), torch.full((1, 1), target), zero, zero, zero)[1]
    value.backward()
    assert p.grad is not None
    return float(value.detach()), float(p.grad)


def _keras(graph: bool, made: Callable[[Any], Any], logits: bool = False) -> Callable[[float, float], Both]:
    """The loss of made(logit), in eager code or in a graph."""
    import keras
    import tensorflow as tf

    loss = keras.losses.BinaryCrossentropy(from_logits=logits)

    def both(p: Any, t: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(p)
            value = loss(t, made(p))
        return value, tape.gradient(value, p)

    called = tf.function(both) if graph else both

    def call(logit: float, target: float) -> Both:
        value, by_logit = called(tf.constant([[logit]]), tf.constant([[target]]))
        return float(value), float(by_logit[0, 0])

    return call


def _compiled(eagerly: bool) -> Callable[[float, float], Both]:
    """A compiled model that ends in a sigmoid: the derivative is what a step of SGD takes from its bias."""
    import keras

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.SGD(1.0), "binary_crossentropy", run_eagerly=eagerly)

    def call(logit: float, target: float) -> Both:
        model.set_weights([np.zeros((1, 1)), np.array([logit])])
        value = float(model.train_on_batch(np.zeros((1, 1)), np.array([[target]])))
        return value, logit - float(model.get_weights()[1][0])

    return call


# ---------------------------------------------------------------- the range of a decoder


def _range() -> list[Row]:
    from pythae.models import VAE, VAEConfig
    from pythae.models.nn.default_architectures import Decoder_AE_MLP
    from sklearn.datasets import load_digits

    from fastae import DenseAutoencoder

    x = torch.from_numpy(load_digits().data).float() * (300 / 16)
    torch.manual_seed(0)
    model = VAE(VAEConfig(input_dim=(64,), latent_dim=8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(20):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                model({"data": x[rows]}).loss.backward()
                optimizer.step()
    with torch.no_grad():
        theirs = model.eval().predict(x).recon_x
    torch.manual_seed(0)
    ae = DenseAutoencoder([64, 512, 8], likelihood="gaussian:scale=learned", bottleneck="variational")
    ae.fit(x, epochs=20, batch_size=128, validation_split=0.0, progress=False)
    variance = float(((x - x.mean(0)) ** 2).mean())
    cause = (
        f"the default decoder ends in a sigmoid ({where(Decoder_AE_MLP, 'nn.Sigmoid()')}) beside the default loss "
        f'"mse"; {"no warning" if not said else "with a warning"}'
    )
    what = "range, mean squared error, at most the variance"
    return [
        Row(named("fastae"), what, variance, float(((ae(x).detach() - x) ** 2).mean()), 0.0, bound=True),
        Row(named("pythae"), what, variance, float(((theirs - x) ** 2).mean()), 0.0, bound=True, cause=cause),
    ]


# ---------------------------------------------------------------- negative binomial


def _negative_binomials() -> list[Row]:
    from scipy.stats import nbinom

    ours, scipy = 0.0, 0.0
    for theta in THETAS:
        for count, mean in COUNTS:
            found, held = _negative_binomial(count, mean, theta)
            ours = max(ours, abs(found - closed_forms.negative_binomial(count, held[0], held[1])))
            theirs = float(nbinom.logpmf(count, theta, theta / (theta + mean)))
            scipy = max(scipy, abs(theirs - closed_forms.negative_binomial(count, mean, theta)))
    what = "negative binomial, worst log p"
    return [
        Row(named("fastae"), f"{what}, fp32", 0.0, ours, ALLOWED, "nats"),
        Row(named("scipy"), f"{what}, fp64", 0.0, scipy, ALLOWED, "nats"),
    ]


def _negative_binomial(count: int, mean: float, theta: float) -> tuple[float, tuple[float, float]]:
    """log p by a model's `score`, and the mean and dispersion that the model holds, in fp32."""
    from fastae import DenseAutoencoder
    from fastae.likelihoods import NegativeBinomial

    ae = DenseAutoencoder([1, 1], likelihood=NegativeBinomial(theta))
    with torch.no_grad():
        ae.decoder[0].weight.zero_()
        ae.decoder[0].bias.fill_(float(np.log(mean)))
    log_mean, log_theta = ae.decoder[0].bias.detach(), ae.likelihood_parameters["log_theta"].detach()
    found = -float(ae.score(torch.full((1, 1), float(count))))
    return found, (float(log_mean.double().exp()), float(log_theta.double().exp()))
