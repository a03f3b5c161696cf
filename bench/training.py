"""`python bench/training.py`: epochs of `fit` beside the DataLoader + Adam idiom, alternating in one process."""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastae
from fastae.demo import PlainAutoencoder
from fastae.run import Callback, Run


class Idiom(Callback):
    """After each epoch of `fit`, one epoch the way tutorials write it."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor, batch_size: int) -> None:
        self.model, self.seconds = model, []
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.loader = DataLoader(TensorDataset(x), batch_size, shuffle=True)

    def on_epoch_end(self, run: Run) -> None:
        started, total = time.perf_counter(), 0.0
        for (batch,) in self.loader:
            loss = F.mse_loss(self.model(batch), batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.rand(options.rows, 784)
    model = fastae.DenseAutoencoder([784, 256, 128])
    other = Idiom(PlainAutoencoder(model), x, options.batch_size)
    history = model.fit(
        x, epochs=options.epochs + 2, batch_size=options.batch_size, precision=options.precision,
        validation_split=0.0, progress=False, callbacks=[other],
    )  # fmt: skip
    ours, theirs = history.rows_per_s[2:], [options.rows / s for s in other.seconds[2:]]  # two epochs to warm up
    low, middle, high = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"784-256-128-256-784, batch {options.batch_size}, {options.rows} rows, medians of {options.epochs} epochs")
    print(f"fastae fit, {options.precision:<24}{statistics.median(ours):10,.0f} rows/s")
    print(f"DataLoader + Adam + loss.item()    {statistics.median(theirs):10,.0f} rows/s")
    print(f"ratio, epoch by epoch: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
