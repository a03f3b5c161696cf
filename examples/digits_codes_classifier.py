"""Codes as features: a classifier that has few labels, on raw pixels, on PCA's components and on fastae's codes.

    python examples/digits_codes_classifier.py

The autoencoder and PCA see all training digits without their labels; logistic regression then sees only some labels.
Prints the accuracies, writes runs/digits_codes_classifier.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fastae

CODE, LABELS = 16, (20, 50, 100, 200, 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=10, help="how often the labelled digits are drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/digits_codes_classifier.png"))
    arguments = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32) / 16
    x, test, y, test_y = train_test_split(x, y, test_size=500, random_state=0, stratify=y)
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([64, 128, CODE], activation="relu")
    history = ae.fit(x, epochs=arguments.epochs, batch_size=64, progress=False)
    pca = PCA(CODE, random_state=0).fit(x)
    features = {
        "64 pixels": (x, test),
        f"{CODE} components of PCA": (pca.transform(x), pca.transform(test)),
        f"{CODE} values of fastae's code": (ae.encode(x), ae.encode(test)),
    }
    print(f"reconstruction error of held-out rows: {history.val_loss[-1]:.5f}")
    print(f"{'accuracy on 500 digits':28}" + "".join(f"{count:>5} labels" for count in LABELS))

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, (train, judged) in features.items():
        accuracies = np.array([
            [accuracy(train, y, judged, test_y, count, draw) for count in LABELS] for draw in range(arguments.draws)
        ])  # fmt: skip
        mean = accuracies.mean(0)
        print(f"{name:28}" + "".join(f"{value:12.3f}" for value in mean))
        axis.errorbar(LABELS, mean, accuracies.std(0), marker="o", markersize=4, capsize=3, label=name)
    axis.set(xscale="log", xlabel="labelled digits", ylabel="accuracy on 500 held-out digits",
             title=f"Logistic regression; mean and deviation of {arguments.draws} draws of the labels")  # fmt: skip
    axis.set_xticks(LABELS, [str(count) for count in LABELS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(title="features")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


def accuracy(x: np.ndarray, y: np.ndarray, test: np.ndarray, test_y: np.ndarray, count: int, draw: int) -> float:
    chosen, _ = train_test_split(np.arange(len(x)), train_size=count, random_state=draw, stratify=y)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return classifier.fit(x[chosen], y[chosen]).score(test, test_y)


if __name__ == "__main__":
    main()
