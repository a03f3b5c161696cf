"""Lost frames of speech: restored by a model of whole windows, beside linear interpolation and ridge regression.

    python examples/speech_restored.py

Japanese vowels of nine speakers, frames of 12 cepstral coefficients: 270 utterances to train on, 370 others. The data
file is inside the package aeon, which is not imported. Prints a table, writes runs/speech_restored.png.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import RidgeCV

import fastae

AROUND, GAPS = 3, (1, 3)  # frames known on each side of a gap, frames lost


def utterances(split: str) -> list[np.ndarray]:
    """The utterances, each [frames, 12]: 7 to 29 frames."""
    spec = find_spec("aeon")
    if spec is None or spec.origin is None:
        raise SystemExit("speech_restored.py needs the data that comes with aeon: pip install --no-deps aeon")
    file = Path(spec.origin).parent / "datasets/data/JapaneseVowels" / f"JapaneseVowels_{split}.ts"
    lines = file.read_text().partition("@data\n")[2].splitlines()  # coefficients and the speaker, between colons
    return [np.array([c.split(",") for c in line.split(":")[:-1]], dtype=np.float32).T for line in lines]


def windows(spoken: list[np.ndarray], length: int) -> np.ndarray:
    """All windows, [n, 12 length], frame after frame."""
    cut = [np.lib.stride_tricks.sliding_window_view(u, length, 0) for u in spoken if len(u) >= length]
    return np.concatenate(cut).transpose(0, 2, 1).reshape(-1, 12 * length)


def trained(x: np.ndarray, lost: np.ndarray, epochs: int) -> fastae.DenseAutoencoder:
    """A model that gets windows with the lost values at 0, their mean, and has to give them back whole."""
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([x.shape[1], 256, 72], activation="tanh")
    for count, lr in ((epochs, 1e-3), (max(1, epochs // 4), 1e-4)):
        ae.fit(np.where(lost, 0, x), target=x, epochs=count, batch_size=64, lr=lr, validation_split=0, progress=False)
    return ae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="and a quarter as many at a smaller learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/speech_restored.png"))
    arguments = parser.parse_args()

    train, test = utterances("TRAIN"), utterances("TEST")
    mean, deviation = np.concatenate(train).mean(0), np.concatenate(train).std(0)
    train, test = ([(u - mean) / deviation for u in split] for split in (train, test))
    train += [u[::-1] for u in train]  # every method learns from speech played backwards, too
    print("squared error of the lost frames, in variances of each coefficient")
    print(f"{'':38}{'mean frame':>12}{'interpolation':>15}{'ridge':>9}{'fastae':>9}")
    for gap in GAPS:
        x, judged = (windows(split, 2 * AROUND + gap) for split in (train, test))
        lost = np.repeat([False] * AROUND + [True] * gap + [False] * AROUND, 12)
        before, after = (judged[:, 12 * n : 12 * n + 12] for n in (AROUND - 1, AROUND + gap))
        shares = np.arange(1, gap + 1) / (gap + 1)
        ridge = RidgeCV(np.logspace(-2, 3, 11)).fit(x[:, ~lost], x[:, lost])
        ae = trained(x, lost, arguments.epochs)
        made = {
            "mean frame": np.zeros((len(judged), 12 * gap)),
            "interpolation": np.concatenate([(1 - share) * before + share * after for share in shares], 1),
            "ridge": ridge.predict(judged[:, ~lost]),
            "fastae": ae(np.where(lost, 0, judged))[:, lost],
        }
        errors = [np.square(rows - judged[:, lost]).mean() for rows in made.values()]
        name = f"gap of {gap} in {2 * AROUND + gap} frames, {len(judged):,} windows"
        print(f"{name:38}{errors[0]:12.4f}{errors[1]:15.4f}{errors[2]:9.4f}{errors[3]:9.4f}")

    moved = np.square(judged[:, 12 * AROUND :] - judged[:, : -12 * AROUND]).mean(1)
    chosen = moved.argsort()[int(0.95 * len(moved))]  # a window with much movement, whoever restores it best
    spoken, restored = judged[chosen], judged[chosen].copy()
    restored[lost] = made["fastae"][chosen]
    shown = {"spoken": spoken, f"{gap} frames lost": np.where(lost, np.nan, spoken), "restored by fastae": restored}
    for name in ("interpolation", "ridge", "fastae"):
        shown[f"error of {name}"] = np.zeros_like(spoken)
        shown[f"error of {name}"][lost] = made[name][chosen] - spoken[lost]
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axis, (name, row) in zip(figure.subplots(1, 6, sharey=True), shown.items(), strict=True):
        limit, area = 1 if "error" in name else 3, (0.5, len(row) / 12 + 0.5, 0.5, 12.5)
        picture = axis.imshow(row.reshape(-1, 12).T, "RdBu_r", vmin=-limit, vmax=limit, extent=area, origin="lower")
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="frame", xticks=(1, 5, 9), aspect="auto")
    figure.colorbar(picture, ax=figure.axes[3:], label="standard deviations")
    figure.colorbar(figure.axes[2].images[0], ax=figure.axes[:3], label="standard deviations")
    figure.axes[0].set(ylabel="coefficient", yticks=(1, 4, 8, 12))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
