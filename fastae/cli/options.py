"""Options that several commands have, and how the command line reads data, widths and devices."""

from __future__ import annotations

from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

import fastae
from fastae.data.arrays import check_finite
from fastae.data.readers import read_array

source = click.argument("data")
key = click.option("--key", help="Which array of a .npz file.")
force = click.option("--force", is_flag=True, help="Overwrite what is there.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
backend = click.option("--backend", help="auto, torch, onednn or triton (default: FASTAE_BACKEND, or auto).")


def numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be whole numbers with commas between, e.g. 784,256,128; got {text!r}"
        ) from None


def device_named(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that works here; got {name!r} ({str(error).splitlines()[0]})") from None


def is_npz(source: str) -> bool:
    """Whether --key can name an array in it."""
    return source.lower().endswith(".npz")


def read(source: str, key: str | None, width: int) -> NDArray[Any]:
    x = read_array(source, key)
    if x.shape[1] != width:
        raise ValueError(f"{source} must have {width} features, as the model has; got {x.shape[1]}")
    check_finite(x, source, largest=float(np.finfo(np.float32).max))  # it is computed with in float32
    return x


def set_up(backend: str | None) -> None:
    if backend is not None:
        fastae.set_backend(backend)
