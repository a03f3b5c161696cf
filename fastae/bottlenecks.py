"""What is asked of a code: parts for `DenseAutoencoder(..., bottleneck=Variational())`.

`Variational` makes the code a random one, whose divergence from the standard normal law is part of the objective. The
others leave the code as it is and raise the objective, in training and in `loss`, by a sum over the latents, its mean
over the rows. (A sum: beside mse, whose loss is a mean over values, their factors are small numbers.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastae.parts import number


@dataclass(frozen=True)
class Variational:
    """A code z = mu + sigma e, e standard normal; the objective is -log p(x | z) + beta KL (Kingma and Welling 2014).

    The encoder's last layer gives mu and log sigma^2. KL is the divergence of the code from the standard normal law in
    nats, summed over the latents, its mean over the rows. `encode`, `score` and calls of the model take z = mu.

    Args:
        beta: factor of the divergence, at least 0 (Higgins et al. 2017).
        warmup_steps: training steps over which beta rises from 0 (Bowman et al. 2016); beta in full at once if 0.
        capacity: nats; the objective has beta |KL - capacity| instead (Burgess et al. 2018). None for KL itself.
        free_bits: nats that a latent's mean KL may have for nothing: beta sum max(free_bits, KL_j) (Kingma et al.
            2016).

    Raises ValueError for a number below 0, warmup_steps that are no whole number, or capacity beside free_bits.
    """

    beta: float = 1.0
    warmup_steps: int = 0
    capacity: float | None = None
    free_bits: float = 0.0
    name: ClassVar[str] = "variational"

    def __post_init__(self) -> None:
        made: dict[str, float | int] = {
            name: number("Variational", name, getattr(self, name), 0) for name in ("beta", "free_bits", "warmup_steps")
        }
        if made["warmup_steps"] != int(made["warmup_steps"]):
            raise ValueError(f"Variational: warmup_steps must be a whole number; got {self.warmup_steps!r}")
        made["warmup_steps"] = int(made["warmup_steps"])
        if self.capacity is not None:
            made["capacity"] = number("Variational", "capacity", self.capacity, 0)
            if self.free_bits:
                raise ValueError("Variational: capacity and free_bits exclude each other; got both")
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def beta_at(self, step: int) -> float:
        """beta of a training step, counted from 0."""
        return self.beta if step >= self.warmup_steps else self.beta * (step + 1) / self.warmup_steps


@dataclass(frozen=True)
class L1:
    """A sparse code: the objective is raised by c sum |z_j|.

    What Keras' `activity_regularizer=L1(c)` on the code's layer does. Raises ValueError for a c below 0.
    """

    c: float
    name: ClassVar[str] = "l1"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", number("L1", "c", self.c, 0))


@dataclass(frozen=True)
class KLSparse:
    """A code whose units are mostly off: c sum_j KL(rho || mean of z_j over the batch's rows), of Bernoulli laws (Ng,
    CS294A 2011); the mean weighs rows by their `sample_weight`.

    The code lies in (0, 1): code_activation="sigmoid". Raises ValueError for a rho outside of (0, 1) or a c below 0.
    """

    rho: float = 0.05
    c: float = 0.01
    name: ClassVar[str] = "kl_sparse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rho", number("KLSparse", "rho", self.rho, 0, 1, below=True))
        if self.rho == 0:
            raise ValueError("KLSparse: rho must be above 0; got 0")
        object.__setattr__(self, "c", number("KLSparse", "c", self.c, 0))


@dataclass(frozen=True)
class Contractive:
    """A code that changes little with its row: c ||dz / dx||^2, the sum of squares over latents and features of the
    Jacobian of the whole encoder, at the row as the encoder gets it (Rifai et al. 2011).

    The encoder consists of plain layers, without dropout. Each row costs one backward pass for each latent where the
    encoder has several layers. Raises ValueError for a c below 0.
    """

    c: float
    name: ClassVar[str] = "contractive"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", number("Contractive", "c", self.c, 0))


CodePenalty = L1 | KLSparse
Bottleneck = Variational | L1 | KLSparse | Contractive
PARTS = {part.name: part for part in (Variational, L1, KLSparse, Contractive)}
