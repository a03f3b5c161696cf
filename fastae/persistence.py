"""Saved models: a folder with `model.safetensors` (tensors and description) and `config.json` (a copy). No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from fastae._errors import is_dtensor
from fastae.autoencoder import DenseAutoencoder
from fastae.outputs import write_atomically
from fastae.scaling import Scaler

FORMAT = "fastae.DenseAutoencoder"
VERSION = 1


def save(model: DenseAutoencoder, path: str | os.PathLike[str]) -> None:
    """Write `model` to the folder `path`, made if missing; an older model there survives until the new one is complete.

    `model.safetensors` is the whole model, its description in the file's metadata: one rename decides between old and
    new; `config.json` is that description for people and other tools. Raises OSError if the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    if any(map(is_dtensor, model.parameters())):
        raise TypeError(
            "save: parameters must be plain tensors; got DTensors: on every rank, gather them with .full_tensor(); on "
            "rank 0, load them into a model that is not sharded and save that"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.scaler is not None:
        tensors["scaler.offset"] = torch.from_numpy(model.scaler.offset)
        tensors["scaler.scale"] = torch.from_numpy(model.scaler.scale)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config(),
        "scaler": None if model.scaler is None else model.scaler.kind,
    }
    weights = to_bytes(tensors, {"fastae": json.dumps(description)})
    text = json.dumps(description, indent=2) + "\n"
    write_atomically({folder / "config.json": text.encode(), folder / "model.safetensors": weights})  # the last decides


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> DenseAutoencoder:
    """The `DenseAutoencoder` that `save` wrote to the folder `path`, on `device`, bit for bit.

    Raises FileNotFoundError if `path` holds no model and ValueError if what it holds is truncated, foreign or of a
    newer version.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"load: path must be a folder with a saved model (model.safetensors); got {str(path)!r}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            description = json.loads(opened.metadata()["fastae"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}")
        if description["version"] != VERSION:
            raise _VersionError(f"load: {file} must have version {VERSION}; got {description['version']!r}")
        scaler = None
        if description["scaler"] is not None:
            offset, scale = tensors.pop("scaler.offset").numpy(), tensors.pop("scaler.scale").numpy()
            scaler = Scaler(description["scaler"], offset, scale)
        model = DenseAutoencoder(**description["config"], device="meta")  # allocates nothing, draws no random numbers
        model.load_state_dict(tensors, assign=True)
    except _VersionError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"load: {file} must be a model that fastae saved; it is truncated or foreign ({reason})"
        ) from None
    model.scaler = scaler
    return model.to(device)


class _VersionError(ValueError):
    """A model of fastae, but of another version of the format."""
