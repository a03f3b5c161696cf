"""The commands that apply a saved model: `fastae encode`, `reconstruct` and `score`; and `fastae info`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import fastae
from fastae.cli.options import backend, device, device_named, force, key, read, set_up, source
from fastae.data.arrays import row_blocks
from fastae.data.writers import check_writable, write_rows
from fastae.models.base import Autoencoder
from fastae.train.plots import is_drawable, plot_samples, square_image

Function = Callable[[Autoencoder, NDArray[Any]], NDArray[Any]]


def _transform(name: str, summary: str, function: Function) -> click.Command:
    """A command that maps the rows of DATA through a saved model into a file."""

    @click.command(name, help=summary)
    @click.argument("model", type=click.Path(path_type=Path))
    @source
    @key
    @click.option("--out", required=name != "score", type=click.Path(path_type=Path), help=".npy or .csv file.")
    @force
    @device
    @backend
    def command(
        model: Path, data: str, key: str | None, out: Path | None, force: bool, device: str, backend: str | None
    ) -> None:
        set_up(backend)
        if out is not None:
            if out.exists() and Path(data).exists() and out.samefile(data):
                raise ValueError(f"--out must be another file than DATA; got {out}")
            check_writable(out, force)
        ae = fastae.load(model, device_named(device))
        x = read(data, key, ae.features[0])
        rows = (function(ae, x if ae.scaler is None else ae.scaler.transform(x)) for x in row_blocks(x, 65536))
        if out is not None:
            write_rows(out, rows, len(x))
            return
        for block in rows:
            np.savetxt(sys.stdout, block, fmt="%.9g")

    return command


def _reconstruct(ae: Autoencoder, x: NDArray[Any]) -> NDArray[Any]:
    return ae(x) if ae.scaler is None else ae.scaler.inverse_transform(ae(x))


encode = _transform("encode", "Write the codes of DATA: [rows, code].", lambda ae, x: ae.encode(x))
reconstruct = _transform(
    "reconstruct", "Write the reconstructions of DATA, in DATA's own units: [rows, features].", _reconstruct
)
score = _transform(
    "score",
    "Write the loss of each row, after scaling: [rows]; to stdout without --out.",
    lambda ae, x: ae.score(x),
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
def info(model: Path) -> None:
    """Describe a saved model."""
    print(fastae.load(model).summary())


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--n", default=60, show_default=True, help="How many rows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help=".npy or .csv file, or a picture, .png.")
@force
@device
@backend
def sample(model: Path, n: int, seed: int, out: Path, force: bool, device: str, backend: str | None) -> None:
    """Draw new rows from a saved model with a variational code, in the units of its training data."""
    set_up(backend)
    check_writable(out, force)
    ae = fastae.load(model, device_named(device))
    rows = ae.sample(n, seed=seed).flatten(1).cpu().float().numpy()
    if out.suffix == ".png":
        image = getattr(ae, "image", None) or square_image(rows.shape[1])
        if image is None or not is_drawable(image) or not n:
            raise ValueError(f"--out must be .npy or .csv for rows that are no images; got {out}")
        plot_samples(rows, out, image)
        return
    write_rows(out, iter([rows if ae.scaler is None else ae.scaler.inverse_transform(rows)]), n)
