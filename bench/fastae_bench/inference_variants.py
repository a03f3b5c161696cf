"""`score` and `encode` beside the lines people write, in a model of the precision named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastae.analysis.plain import PlainAutoencoder
from fastae.analysis.products import products
from fastae.models.dense import DenseAutoencoder
from fastae_bench.compiling import compiled
from fastae_bench.sizes import Size
from fastae_bench.variants import FASTAE, MATMUL_ONLY, Variant

CPU_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", MATMUL_ONLY)
CUDA_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", "reduce-overhead", "max-autotune", MATMUL_ONLY)


class InferenceProblem:
    """A model and rows for it, both of the precision; `what` is "score" or "encode"."""

    def __init__(self, what: str, size: Size, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.what, self.size, self.device, self.dtype = what, size, device, getattr(torch, precision)
        self.model = DenseAutoencoder(size.features, device=device).to(self.dtype)
        self.x = torch.rand(size.batch, size.features[0]).to(device, self.dtype)


def variant(name: str, problem: InferenceProblem) -> Variant:
    if name == MATMUL_ONLY:
        return Variant(MATMUL_ONLY, _products(problem))
    function, x = _function(name, problem), problem.x

    def run() -> Tensor:
        with torch.inference_mode():
            return function(x)

    return Variant(name, run, lambda: {problem.what: run()})


def _function(name: str, problem: InferenceProblem) -> Callable[[Tensor], Tensor]:
    if name == FASTAE:
        return problem.model.score if problem.what == "score" else problem.model.encode
    plain = PlainAutoencoder(problem.model, tuned=name != "idiom")

    def row_errors(x: Tensor) -> Tensor:
        return ((plain(x) - x) ** 2).mean(1)

    def row_errors_in_place(x: Tensor) -> Tensor:
        y: Tensor = plain(x)
        return y.sub_(x).square_().mean(1)

    if name in ("idiom", "tuned"):
        return plain.encoder if problem.what == "encode" else row_errors if name == "idiom" else row_errors_in_place
    function = plain.encoder if problem.what == "encode" else row_errors
    return compiled(function, "default" if name == "compiled" else name)


def _products(problem: InferenceProblem) -> Callable[[], object]:
    size = problem.size
    layers = size.layers if problem.what == "score" else size.layers[: len(size.features) - 1]
    return products(layers, size.batch, problem.dtype, problem.device, backward=False)
