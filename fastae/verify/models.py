"""The models whose training and scoring steps are compiled, executed and counted: sizes that people train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastae.bottlenecks import Variational
from fastae.engine.train_step import TrainStep
from fastae.models.dense import DenseAutoencoder
from fastae.nn import backend as _backend
from fastae.noise import Mask


@dataclass(frozen=True)
class Model:
    """A `DenseAutoencoder` of these widths and parts, and the batches it is trained with."""

    name: str
    features: tuple[int, ...]
    batches: tuple[int, ...]
    parts: tuple[tuple[str, Any], ...] = ()


MODELS = (
    Model("mnist", (784, 256, 128), (256, 8192)),
    Model("tabular", (30, 64, 32), (4096,)),
    Model("wide", (1024, 512, 128), (16384,)),
    Model("genes", (2000, 128, 10), (1024,)),
    Model("odd", (785, 255, 31), (333,)),
    Model("variational", (784, 256, 32), (256, 8192), (("likelihood", "bernoulli"), ("bottleneck", Variational()))),
    Model("latents", (304, 256, 128), (4096,), (("likelihood", "poisson"), ("bottleneck", Variational(capacity=2.0)))),
    Model("denoising", (784, 256, 32), (8192,), (("corrupt", Mask(0.3)), ("dropout", 0.2))),
)
# Compiled and held to the same budgets: the losses with a parameter of their own
TRAINED = (Model("counts", (2000, 128, 10), (1024,), (("likelihood", "nb"),)),)


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    matmul: str = "highest"  # as in torch.set_float32_matmul_precision


VERIFY_PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "tf32": Precision(torch.float32, "high"),
    "float32": Precision(torch.float32),
}


@contextmanager
def triton_in(precision: Precision) -> Iterator[None]:
    """The Triton backend, with fp32 multiplied as `precision` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision.matmul)
    try:
        with _backend.use_backend("triton"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def build(
    features: tuple[int, ...], precision: Precision, activation: str = "relu", parts: Sequence[tuple[str, Any]] = ()
) -> DenseAutoencoder:
    return DenseAutoencoder(features, activation=activation, dtype=precision.dtype, **dict(parts))


def training_step(model: DenseAutoencoder, batch: int) -> TrainStep:
    """A `TrainStep` that launches on a CPU what it would launch on a GPU: under the Triton backend."""
    return TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), batch)


def score_and_encode(model: DenseAutoencoder, x: Tensor) -> None:
    """The launches of `score` and `encode`."""
    with torch.no_grad():
        model.score(x)
        model.encode(x)
