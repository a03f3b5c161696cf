"""`python bench/train_step.py`: a training step, and `score`, beside the ways of writing them in PyTorch."""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise

import torch
from sides import machine, ratio, seconds, training_sides

import fastae
from fastae.demo import PlainAutoencoder

MNIST, TABULAR = [784, 256, 128], [30, 64, 32]
STEPS = [  # widths, batch, precision, rows of data, steps per round
    (MNIST, 256, "float32", 4096, 16),
    (MNIST, 1024, "float32", 8192, 8),
    (MNIST, 256, "bfloat16", 4096, 16),
    (MNIST, 1024, "bfloat16", 8192, 8),
    (TABULAR, 32, "float32", 4096, 256),
    (TABULAR, 1024, "float32", 65536, 64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (it needs a C++ compiler)")
    options = parser.parse_args()
    names = ("idiom", "tuned") if options.no_compile else ("idiom", "tuned", "compiled")
    print(machine())
    print(f"medians of {options.rounds} alternating rounds; a ratio is theirs / ours, with its quartiles\n")
    print(f"{'step':<40}{'fastae':>16}" + "".join(f"{name:>26}" for name in names) + f"{'of it GEMM':>12}")
    for dims, batch, precision, rows, calls in STEPS:
        took = seconds(training_sides(dims, batch, precision, rows, names), calls, options.rounds)
        ours = statistics.median(took["fastae"])
        label = f"{'-'.join(map(str, [*dims, *dims[-2::-1]]))} {batch} {precision}"
        share = gemm_seconds(dims, batch, precision) / ours
        print(f"{label:<40}{batch / ours:>9,.0f} rows/s" + _ratios(took, names) + f"{share:>11.0%}", flush=True)
    for precision in ("float32", "bfloat16"):
        took = seconds(score_sides(precision), 4, options.rounds)
        ours = statistics.median(took["fastae"])
        label = f"score 784-256-128 4096 {precision}"
        share = gemm_seconds(MNIST, 4096, precision, backward=False) / ours
        columns = f"{_ratios(took, ('eager',)):<{26 * len(names)}}"
        print(f"{label:<40}{4096 / ours:>9,.0f} rows/s{columns}{share:>11.0%}", flush=True)


def _ratios(took: dict[str, list[float]], names: tuple[str, ...]) -> str:
    columns = ""
    for name in names:
        low, middle, high = ratio(took, name)
        columns += f"{f'{name} {middle:.2f} ({low:.2f}-{high:.2f})':>26}"
    return columns


def gemm_seconds(dims: list[int], batch: int, precision: str, backward: bool = True) -> float:
    """The 3 L - 1 matrix products of a step (L of a forward pass) alone, by the faster of PyTorch's two libraries."""
    dtype, total = getattr(torch, precision), 0.0
    widths = [*dims, *dims[-2::-1]]
    for layer, (k, n) in enumerate(pairwise(widths)):
        x, dp, w = torch.rand(batch, k, dtype=dtype), torch.rand(batch, n, dtype=dtype), torch.rand(n, k, dtype=dtype)
        products = [(x, w.t())]
        if backward:
            products += [(dp.t(), x), (dp, w)] if layer else [(dp.t(), x)]
        for a, b in products:
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
            took = seconds(
                {
                    "aten": lambda a=a, b=b, out=out: torch.mm(a, b, out=out),
                    "onednn": lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""),
                },
                20, 7,
            )  # fmt: skip
            total += min(statistics.median(t) for t in took.values())
    return total


def score_sides(precision: str) -> dict[str, object]:
    """`score` of 4096 rows beside the line people write, in a model of that precision."""
    torch.manual_seed(0)
    model = fastae.DenseAutoencoder(MNIST)
    plain = PlainAutoencoder(model).to(getattr(torch, precision))
    model.to(getattr(torch, precision))
    x = torch.rand(4096, 784).to(getattr(torch, precision))

    def eager() -> torch.Tensor:
        with torch.inference_mode():
            return ((plain(x) - x) ** 2).mean(1)

    return {"fastae": lambda: model.score(x), "eager": eager}


if __name__ == "__main__":
    main()
