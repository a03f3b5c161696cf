"""Noise taken off 16-bit CT and MR slices, patch by patch: trained on the left halves, judged on the right halves.

    python examples/medical_slice_denoised.py

The slices come with pydicom. The noise has 10 % of the slice's range; the peers' settings are those best on the left
half of the same slice. Prints a table of PSNRs, writes runs/medical_slice_denoised.png.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from pydicom import dcmread
from pydicom.data import get_testdata_file
from scipy.ndimage import median_filter
from skimage.restoration import denoise_nl_means

import fastae
from fastae.noise import Gaussian

SIDE, NOISE = 8, 0.1
PEERS = {
    "median filter": (median_filter, [(3,), (5,)]),
    "non-local means": (
        lambda image, size, h: denoise_nl_means(image, size, 6, h, sigma=NOISE),
        [(size, h * NOISE / 10) for size in (3, 5, 7) for h in range(4, 11)],
    ),
}


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(np.clip(image, 0, 1) - clean).mean()))


def patches(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All overlapping patches, [n, 64], and their means taken off, [n, 1]."""
    rows = sliding_window_view(image, (SIDE, SIDE)).reshape(-1, SIDE * SIDE)
    means = rows.mean(1, keepdims=True)
    return rows - means, means


def training_rows(image: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Patches of the image in its eight orientations, with 0.3 to 1.7 times their contrast."""
    turned = [np.rot90(flipped, turns) for flipped in (image, image.T) for turns in range(4)]
    rows = rng.permutation(np.concatenate([patches(image)[0] for image in turned]))[:count]
    return rows * rng.uniform(0.3, 1.7, (len(rows), 1)).astype(np.float32)


def restore(ae: fastae.DenseAutoencoder, image: np.ndarray) -> np.ndarray:
    """Each pixel is the mean over all patches that it is in."""
    rows, means = patches(image)
    height, width = (n - SIDE + 1 for n in image.shape)
    made = (ae(rows) + means).reshape(height, width, SIDE, SIDE)
    total = np.zeros((2, *image.shape), np.float32)  # of values, of patches
    for i, j in np.ndindex(SIDE, SIDE):
        total[:, i : i + height, j : j + width] += made[:, :, i, j], np.ones((height, width))
    return total[0] / total[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/medical_slice_denoised.png"))
    arguments = parser.parse_args()

    rng, halves = np.random.default_rng(0), {}
    for name in ("CT", "MR"):
        pixels = dcmread(get_testdata_file(f"{name}_small.dcm", download=False)).pixel_array.astype(np.float32)
        halves[name] = np.split((pixels - pixels.min()) / np.ptp(pixels), 2, axis=1)
    x = np.concatenate([training_rows(left, 20_000, rng) for left, _ in halves.values()])
    torch.manual_seed(0)
    ae = fastae.DenseAutoencoder([SIDE * SIDE, 256, 64], corrupt=Gaussian(NOISE))
    ae.fit(x, epochs=arguments.epochs, batch_size=128, validation_split=0, progress=False)

    print(f"{len(x):,} patches of {SIDE} x {SIDE} of the left halves to train on; PSNR of the right halves")
    print(f"{'':7}{'noisy':>8}{''.join(f'{name:>17}' for name in (*PEERS, 'fastae'))}{'gain of fastae':>17}")
    figure = Figure(figsize=(8.6, 7), layout="constrained")
    for cells, (name, (left, right)) in zip(figure.subplots(2, 5), halves.items(), strict=True):
        noisy_left, noisy = (half + NOISE * rng.standard_normal(half.shape, np.float32) for half in (left, right))
        made = {"noisy": noisy}
        for peer, (function, grid) in PEERS.items():
            best = max(grid, key=lambda options: psnr(function(noisy_left, *options), left))
            made[peer] = function(noisy, *best)
        made["fastae"] = restore(ae, noisy)
        found = [psnr(image, right) for image in made.values()]
        print(f"{name:7}{found[0]:8.2f}{''.join(f'{db:17.2f}' for db in found[1:])}{found[-1] - found[0]:14.2f} dB")
        for cell, (title, image) in zip(cells, {**made, f"{name}, clean": right}.items(), strict=True):
            cell.imshow(image, cmap="gray", vmin=0, vmax=1)
            cell.set_title(title if image is right else f"{title}\n{psnr(image, right):.1f} dB", fontsize=9)
            cell.set_axis_off()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=120)
    print("picture:", arguments.out)


if __name__ == "__main__":
    main()
