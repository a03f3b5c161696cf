"""The commands that look at a model of any width: `fastae explain` and `fastae profile`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

import fastae
from fastae.cli.options import device_named, numbers
from fastae.data.writers import check_writable
from fastae.models.base import Autoencoder
from fastae.models.dense import DenseAutoencoder

_model = click.argument("model", required=False, type=click.Path(path_type=Path))
_features = click.option("--features", help="Widths from the input to the code, instead of MODEL: 784,256,128.")
_activation = click.option("--activation", default="relu", show_default=True, help="With --features.")
_batch = click.option("--batch", default=256, show_default=True, help="Rows of a step.")
_precision = click.option("--precision", default="float32", show_default=True, help="float32 or bfloat16.")


@click.command()
@_model
@_features
@_activation
@_batch
@_precision
@click.option("--gpu", help="a100, h100, b200, mi300x or rtx4090: what would run there, and a model of its time.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def explain(model: Path | None, features: str | None, activation: str, batch: int, precision: str, gpu: str | None,
            as_json: bool) -> None:  # fmt: skip
    """Which implementation runs each op of a training step, why, and what it costs; no data, no GPU needed."""
    found = fastae.explain(_loaded(model, features, activation, "meta"), batch, gpu, precision)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


@click.command()
@_model
@_features
@_activation
@_batch
@_precision
@click.option("--steps", default=20, show_default=True, help="How many are profiled.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="Write a .json that Perfetto opens.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
def profile(model: Path | None, features: str | None, activation: str, batch: int, precision: str, steps: int,
            trace: Path | None, force: bool, device: str) -> None:  # fmt: skip
    """Where the time of a training step goes, op by op, on rows drawn at random."""
    if batch < 1:
        raise ValueError(f"--batch must be at least 1; got {batch}")
    if trace is not None:
        check_writable(trace, force, "--trace")
    ae = _loaded(model, features, activation, "cpu").to(device_named(device))
    rows = torch.rand(batch, ae.features[0], generator=torch.Generator().manual_seed(0))
    fastae.profile(ae, rows, steps=steps, precision=precision, trace=trace)


def _loaded(path: Path | None, features: str | None, activation: str, device: str) -> Autoencoder:
    if (path is None) == (features is None):
        raise click.UsageError("give a saved MODEL or --features 784,256,128, one of the two")
    if path is not None:
        return fastae.load(path)
    widths: Any = numbers(features or "", "--features")
    return DenseAutoencoder(widths, activation, device=device)
