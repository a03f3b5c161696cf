"""What linear models, divergences and likelihoods must give, in fp64: by algebra, without a training step."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def divergence(mu: Matrix, log_var: Matrix) -> tuple[float, Matrix, Matrix]:
    """KL of N(mu, exp log_var) from N(0, 1), summed over latents, mean over rows; its gradients by mu and log_var."""
    kl = (mu**2 + np.expm1(log_var) - log_var) / 2
    rows = len(mu)
    return float(kl.sum(1).mean()), mu / rows, np.expm1(log_var) / 2 / rows


def best_linear_bound(x: Matrix, code: int, variance: float | None = None) -> tuple[float, float]:
    """(ELBO, variance of the noise) of the best linear variational autoencoder, mean nats of a row.

    variance None: learned, probabilistic PCA (Tipping and Bishop 1999). Its likelihood is reached by the bound, since
    with orthogonal columns the posterior is diagonal and linear in x (Lucas et al. 2019). A fixed one: the latents with
    an eigenvalue above it keep sqrt(eigenvalue - variance), the others collapse; the bound is tight again.
    """
    width = x.shape[1]
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    if variance is None:
        variance = float(values[code:].mean())
    kept = values[:code][values[:code] > variance]
    others = values[len(kept) :]
    log_p = width * math.log(2 * math.pi) + np.log(kept).sum() + len(kept)
    log_p += len(others) * math.log(variance) + others.sum() / variance
    return -float(log_p) / 2, variance


def linear_bound(
    x: Matrix, mu: Matrix, log_var: Matrix, decoder: Matrix, bias: Matrix, variance: float | None = None
) -> float:
    """ELBO of rows under a linear decoder [features, code], exact: E |x - D z - b|^2 needs no sample.

    mu, log_var [rows, code]: the encoder's. variance None: the one that is best for these rows and this decoder.
    """
    width = x.shape[1]
    error = ((x - mu @ decoder.T - bias) ** 2).sum(1) + np.exp(log_var) @ (decoder**2).sum(0)
    if variance is None:
        variance = float(error.mean()) / width
    log_p = -(width * math.log(2 * math.pi * variance) + error.mean() / variance) / 2
    return float(log_p) - divergence(mu, log_var)[0]


def best_denoiser(gram: Matrix, noise: str, amount: float) -> tuple[Matrix, Matrix, Matrix]:
    """(B, C, S) of centred rows with second moments `gram`: the risk of a matrix is tr(G - 2 B C + B S B^T).

    "mask": a share `amount` of the values is 0, B = (1 - q) G S^-1 with S = (1 - q)^2 G + q (1 - q) diag G.
    "gaussian": standard deviation `amount`, B = G (G + s^2 I)^-1.
    """
    if noise == "mask":
        cross = (1 - amount) * gram
        spoilt = (1 - amount) ** 2 * gram + amount * (1 - amount) * np.diag(np.diag(gram))
    else:
        cross, spoilt = gram, gram + amount**2 * np.eye(len(gram))
    # a column that is 0 in every row is 0 after masking as well: the least-norm solution
    return cross.T @ np.linalg.pinv(spoilt, hermitian=True), cross, spoilt


def risk(gram: Matrix, b: Matrix, cross: Matrix, spoilt: Matrix, off: Matrix | float = 0.0) -> float:
    """E |x - B x~ - off|^2 of centred rows, the mean over features."""
    return float(np.trace(gram - 2 * b @ cross + b @ spoilt @ b.T) + np.sum(np.square(off))) / len(gram)


def cross_entropy(logit: float, target: float) -> tuple[float, float]:
    """-log p(target) of a Bernoulli law with that logit, and the derivative by the logit."""
    value = max(logit, 0.0) - target * logit + math.log1p(math.exp(-abs(logit)))
    sigmoid = 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
    if target == 1:  # sigmoid - 1 would cancel
        return value, -1 / (1 + math.exp(logit))
    return value, sigmoid - target


def negative_binomial(count: int, mean: float, theta: float) -> float:
    """log of the negative binomial law with that mean and dispersion theta, by 50 digits."""
    import mpmath

    with mpmath.workdps(50):
        t, mu, r = mpmath.mpf(count), mpmath.mpf(mean), mpmath.mpf(theta)
        coefficient = mpmath.loggamma(t + r) - mpmath.loggamma(r) - mpmath.loggamma(t + 1)
        return float(coefficient + r * mpmath.log(r / (r + mu)) + t * mpmath.log(mu / (r + mu)))
