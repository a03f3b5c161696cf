"""`make demo`: the MNIST autoencoder 784-256-128-256-784, trained beside plain PyTorch on the same batches."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastae
from fastae.analysis.plain import PlainAutoencoder
from fastae.data.readers import read_array
from fastae.data.writers import write_atomically
from fastae.train.plots import plot_reconstructions
from fastae.train.rows import split_rows
from fastae.train.run import Callback, Run

BATCH_SIZE, LR, SEED, VALIDATION = 256, 1e-3, 0, 0.2


class PlainTwin(Callback):
    """After each epoch of `fit`, one epoch of plain PyTorch on the same batches, so that noise meets both."""

    def __init__(self, model: PlainAutoencoder, x: Tensor) -> None:
        self.model, self.seconds = model, 0.0
        # the same optimizer on both sides: it is the layers and the loop that are compared
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
        self.generator = torch.Generator().manual_seed(SEED)
        self.train = x[split_rows(len(x), VALIDATION, self.generator)[0]]

    def on_epoch_end(self, run: Run) -> None:
        started = time.perf_counter()
        for rows in torch.randperm(len(self.train), generator=self.generator).split(BATCH_SIZE):
            batch = self.train[rows]
            loss = F.mse_loss(self.model(batch), batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds += time.perf_counter() - started


def main() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    epochs, out = arguments.epochs, arguments.out
    x = torch.from_numpy(np.ascontiguousarray(read_array("mnist5k"), dtype=np.float32))
    train_rows, held_out_rows = split_rows(len(x), VALIDATION, torch.Generator().manual_seed(SEED))
    train, held_out = x[train_rows], x[held_out_rows]

    torch.manual_seed(SEED)
    model = fastae.DenseAutoencoder([784, 256, 128], activation="relu")
    plain = PlainAutoencoder(model)
    print(model.summary(), flush=True)
    print(
        "each epoch of fastae is followed by one of plain PyTorch, from the same weights, on the same batches",
        flush=True,
    )
    twin = PlainTwin(plain, x)
    history = model.fit(
        x, epochs=epochs, batch_size=BATCH_SIZE, lr=LR, validation_split=VALIDATION, seed=SEED, callbacks=[twin]
    )
    if history.stopped:
        raise SystemExit(130)
    seconds = sum(len(train) / rate for rate in history.rows_per_s)

    title = f"{epochs} epochs, {len(train):,} rows, {len(held_out):,} held out"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in ("", "validation MSE", "explained variance", "training time"):
        table.add_column(name, justify="left" if not name else "right")
    variance = (held_out - held_out.mean(0)).square().mean().item()
    with torch.no_grad():
        results = [("fastae", model(held_out), seconds), ("plain PyTorch", plain(held_out), twin.seconds)]
    for name, output, time_s in results:
        error = F.mse_loss(output, held_out).item()
        table.add_row(name, f"{error:.6f}", f"{1 - error / variance:.2%}", f"{time_s:.1f} s")
    Console(width=100).print(table)

    model.save(out)
    write_atomically({out / "history.json": (json.dumps(history.to_dict(), indent=2) + "\n").encode()})
    history.plot(out / "loss.png")
    shown = held_out[:: max(1, len(held_out) // 12)][:12].numpy()
    plot_reconstructions(shown, model(shown), out / "reconstructions.png")
    print("left in", out, "-", ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    main()
