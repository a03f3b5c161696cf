"""Anomaly detection on a table: trained on benign tumours alone, asked to find the malignant ones.

    python examples/breast_cancer_anomalies.py

Prints the ROC-AUC of fastae beside scikit-learn's PCA (by its reconstruction error) and IsolationForest, over five
splits; writes runs/breast_cancer_anomalies.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler

import fastae

CODE = 8  # values in the code; PCA keeps as many components


def scores(train: np.ndarray, test: np.ndarray, seed: int, epochs: int) -> dict[str, np.ndarray]:
    """How unusual each row of `test` is to what has seen `train` alone, by three methods."""
    scaler = StandardScaler().fit(train)
    train, test = (scaler.transform(rows).astype(np.float32) for rows in (train, test))
    torch.manual_seed(seed)
    ae = fastae.DenseAutoencoder([30, 64, CODE], activation="relu")
    ae.fit(
        train, epochs=epochs, batch_size=32, lr=1e-3, seed=seed, progress=False,
        callbacks=[fastae.EarlyStopping(patience=20)],
    )  # fmt: skip
    pca = PCA(CODE, random_state=seed).fit(train)
    rebuilt = pca.inverse_transform(pca.transform(test))
    forest = IsolationForest(random_state=seed).fit(train)
    return {
        "fastae, reconstruction error": ae.score(test),
        "PCA, reconstruction error": np.square(rebuilt - test).mean(1),
        "IsolationForest": -forest.score_samples(test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/breast_cancer_anomalies.png"))
    arguments = parser.parse_args()

    x, y = load_breast_cancer(return_X_y=True)
    benign, malignant = x[y == 1], x[y == 0]
    areas: dict[str, list[float]] = {}
    for seed in range(arguments.splits):
        order = np.random.default_rng(seed).permutation(len(benign))
        train, held_out = benign[order[:250]], benign[order[250:]]
        test = np.concatenate([held_out, malignant])
        is_malignant = np.arange(len(test)) >= len(held_out)
        found = scores(train, test, seed, arguments.epochs)
        for name, score in found.items():
            areas.setdefault(name, []).append(roc_auc_score(is_malignant, score))

    print(f"ROC-AUC, {arguments.splits} splits: 250 benign rows to train on, {len(test)} to judge")
    for name, values in areas.items():
        print(f"{name:30} {np.mean(values):.4f} (from {min(values):.4f} to {max(values):.4f})")

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    error = found["fastae, reconstruction error"]
    bins = np.geomspace(error.min(), error.max(), 40)
    left.hist(error[~is_malignant], bins, alpha=0.6, label=f"benign, held out ({(~is_malignant).sum()})")
    left.hist(error[is_malignant], bins, alpha=0.6, label=f"malignant ({is_malignant.sum()})")
    left.set(xscale="log", xlabel="fastae's reconstruction error (standardised features)", ylabel="tumours",
             title=f"One split (seed {seed})")  # fmt: skip
    left.set_ylim(0, 1.3 * left.get_ylim()[1])
    left.legend()
    for name, score in found.items():
        false, true, _ = roc_curve(is_malignant, score)
        right.plot(false, true, label=f"{name}: {areas[name][-1]:.3f}")
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    right.set(
        xlabel="benign taken for malignant (share)", ylabel="malignant found (share)", title="The same split: ROC"
    )
    right.legend(title="ROC-AUC", fontsize=8)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
