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


def image_side(features: int) -> int | None:
    """The side of the square image that `features` pixels make, if they make one of at least 4 x 4."""
    side = math.isqrt(features)
    return side if side >= 4 and side * side == features else None


def plot_reconstructions(originals: NDArray[Any], reconstructions: NDArray[Any], path: str | os.PathLike[str]) -> None:
    """Square images [count, side * side]: originals in the upper row, their reconstructions below, one grey scale."""
    side, count = image_side(originals.shape[1]), len(originals)
    if side is None or not count:
        raise ValueError(f"plot_reconstructions: originals must be [count, side * side]; got {list(originals.shape)}")
    figure = new_figure(count, 2.3)
    rows = figure.subplots(2, count, squeeze=False)
    low, high = float(np.min(originals)), float(np.max(originals))
    for images, axes, title in zip((originals, reconstructions), rows, ("original", "reconstruction"), strict=True):
        for image, axis in zip(images, axes, strict=True):
            axis.imshow(image.reshape(side, side), cmap="gray_r", vmin=low, vmax=high)
            axis.set_axis_off()
        axes[0].set_title(title, loc="left", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    file = Path(path)
    with replaced_when_complete(file if file.suffix else file.with_suffix(".png")) as part:
        figure.savefig(part, dpi=120)
