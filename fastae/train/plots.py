"""Pictures: loss curves, and originals above their reconstructions."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastae.data.writers import replaced_when_complete


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastae[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")  # no pyplot: no display, no global state


def plot_losses(curves: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """The named losses of each epoch, on a logarithmic scale where they allow one."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for label, values in curves.items():
        if values:
            axes.plot(range(1, len(values) + 1), values, label=label, marker="." if len(values) < 15 else None)
    drawn = [value for values in curves.values() for value in values]
    if drawn and min(drawn) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def square_image(features: int) -> tuple[int, ...] | None:
    """(1, side, side) of the square image that `features` pixels make, if they make one of at least 4 x 4."""
    side = math.isqrt(features)
    return (1, side, side) if side >= 4 and side * side == features else None


def is_drawable(image: Sequence[int]) -> bool:
    """Whether (channels, height, width) is an image in grey or in colours."""
    return image[0] in (1, 3)


def plot_reconstructions(
    originals: NDArray[Any],
    reconstructions: NDArray[Any],
    path: str | os.PathLike[str],
    image: Sequence[int] | None = None,
    noisy: NDArray[Any] | None = None,
) -> None:
    """Originals [count, pixels] in the upper row, their reconstructions below, on one scale; three channels in colours.
    Between them, what the reconstructions were made of, if that was `noisy`.

    image: (channels, height, width), square and grey by default.
    """
    image = square_image(originals.shape[1]) if image is None else image
    if image is None or not len(originals) or originals.shape[1] != math.prod(image) or not is_drawable(image):
        raise ValueError(
            f"plot_reconstructions: originals must be [count, side * side] or as image {image}, of 1 or 3 channels; "
            f"got {list(originals.shape)}"
        )
    rows = {"original": originals, "noisy": noisy, "reconstruction": reconstructions}
    low, high = float(np.min(originals)), float(np.max(originals))
    plot_images({title: images for title, images in rows.items() if images is not None}, path, image, low, high)


def plot_images(
    rows: Mapping[str, NDArray[Any]], path: str | os.PathLike[str], image: Sequence[int], low: float, high: float
) -> None:
    """Rows of images [count, pixels] with a title each ("" for none), white at `low` and black at `high`."""
    _, height, width = image
    count = max(map(len, rows.values()))
    figure = new_figure(count, 1.15 * len(rows) * min(3.0, max(1.0, height / width)))
    for (title, images), axes in zip(rows.items(), figure.subplots(len(rows), count, squeeze=False), strict=True):
        for axis in axes:
            axis.set_axis_off()
        for pixels, axis in zip(images, axes, strict=False):
            shaped = np.moveaxis(np.asarray(pixels).reshape(image), 0, -1)
            if image[0] == 1:
                axis.imshow(shaped[..., 0], cmap="gray_r", vmin=low, vmax=high)
            else:
                axis.imshow(np.clip((shaped - low) / max(high - low, 1e-12), 0, 1))
        axes[0].set_title(title.strip(), loc="left", fontsize=9)
    _save(figure, path)


def plot_samples(images: NDArray[Any], path: str | os.PathLike[str], image: Sequence[int], wide: int = 10) -> None:
    """A grid of images [count, pixels], `wide` in a row."""
    lines = {" " * n: images[n * wide : (n + 1) * wide] for n in range(-(-len(images) // wide))}
    plot_images(lines, path, image, float(np.min(images)), float(np.max(images)))


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    file = Path(path)
    with replaced_when_complete(file if file.suffix else file.with_suffix(".png")) as part:
        figure.savefig(part, dpi=120)
