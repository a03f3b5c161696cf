"""The ops of one layer: fastae's functions beside the lines people write, at the shapes of an autoencoder's ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastae.analysis.products import fastest
from fastae.nn.linear_act import linear_act
from fastae.nn.linear_act_loss import linear_act_mse
from fastae.nn.losses import mse_loss
from fastae_bench.compiling import compiled
from fastae_bench.sizes import Size
from fastae_bench.variants import FASTAE, MATMUL_ONLY, Variant

CPU_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", MATMUL_ONLY)
CUDA_VARIANTS = (FASTAE, "idiom", "tuned", "compiled", "max-autotune", MATMUL_ONLY)


@dataclass(frozen=True)
class OpVariants:
    """An op in three ways of writing it; `wants` are the arguments that get a gradient, none for the forward alone."""

    ours: Callable[..., Tensor]
    idiom: Callable[..., Tensor]
    tuned: Callable[..., Tensor]
    arguments: str  # names of what `Tensors` holds
    wants: str = ""


OPS = {
    "linear_act forward": OpVariants(
        lambda x, w, b: linear_act(x, w, b, "relu"),
        lambda x, w, b: F.relu(F.linear(x, w, b)),
        lambda x, w, b: F.linear(x, w, b).relu_(),
        "x w b",
    ),
    "linear_act forward+backward": OpVariants(
        lambda x, w, b: linear_act(x, w, b, "relu"),
        lambda x, w, b: F.relu(F.linear(x, w, b)),
        lambda x, w, b: F.linear(x, w, b).relu_(),
        "x w b",
        "x w b",
    ),
    "mse_loss": OpVariants(
        mse_loss,
        lambda y, t: ((y - t) ** 2).mean(),
        F.mse_loss,
        "y t",
        "y",
    ),
    "linear_act_mse": OpVariants(
        linear_act_mse,
        lambda h, v, c, t: ((F.linear(h, v, c) - t) ** 2).mean(),
        lambda h, v, c, t: F.mse_loss(F.linear(h, v, c), t),
        "h v c t",
        "h v c",
    ),
}


class OpProblem:
    """The tensors of a first layer (x, w, b), a last layer (h, v, c), its output y and target t, and a gradient dy."""

    def __init__(self, what: str, size: Size, precision: str, device: torch.device) -> None:
        self.op, self.device, self.dtype, self.rows = OPS[what], device, getattr(torch, precision), size.batch
        self.first, self.last = size.layers[0], size.layers[-1]
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int, bound: float = 1.0) -> Tensor:
            t = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            return t.to(device, self.dtype)

        (k, n), (hidden, out) = self.first, self.last
        named = {
            "x": lambda: uniform(size.batch, k), "w": lambda: uniform(n, k, bound=k**-0.5), "b": lambda: uniform(n),
            "h": lambda: uniform(size.batch, hidden), "v": lambda: uniform(out, hidden, bound=hidden**-0.5),
            "c": lambda: uniform(out), "y": lambda: uniform(size.batch, out), "t": lambda: uniform(size.batch, out),
        }  # fmt: skip
        names = self.op.arguments.split()
        self.arguments = [named[name]() for name in names]
        wants = self.op.wants.split()
        self.wanted = [t.requires_grad_() for name, t in zip(names, self.arguments, strict=True) if name in wants]
        self.dy = uniform(size.batch, n) if "w" in self.op.wants else None


def variant(name: str, problem: OpProblem) -> Variant:
    op = problem.op
    if name == MATMUL_ONLY:
        return Variant(MATMUL_ONLY, _products(problem))
    if name in (FASTAE, "idiom", "tuned"):
        function = {FASTAE: op.ours, "idiom": op.idiom, "tuned": op.tuned}[name]
    else:
        function = compiled(op.tuned, "default" if name == "compiled" else name)
    arguments, wanted, dy = problem.arguments, problem.wanted, problem.dy

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*arguments)

    def forward_backward() -> tuple[Tensor, ...]:
        y = function(*arguments)
        return y.detach(), *torch.autograd.grad(y, wanted, dy)

    def results() -> Mapping[str, Tensor]:
        if not wanted:
            return {"output": forward()}
        names = ["output", *(f"d{name}" for name in op.wants.split())]
        return dict(zip(names, forward_backward(), strict=True))

    return Variant(name, forward_backward if wanted else forward, results)


def _products(problem: OpProblem) -> Callable[[], object]:
    if "w" in problem.op.arguments or "v" in problem.op.arguments:
        x, w = (t.detach() for t in problem.arguments[:2])
        calls = [fastest(x, w.t())]
        if problem.wanted:
            dp = torch.rand(problem.rows, len(w), dtype=problem.dtype, device=problem.device)
            calls += [fastest(dp.t(), x), fastest(dp, w)]
        return lambda: [call() for call in calls]
    raise ValueError("op_variants: an op without matrix products has no matmul-only variant")
