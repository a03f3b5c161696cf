"""Loading saved models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from fastae.data.scaling import Scaler
from fastae.models.dense import DenseAutoencoder
from fastae.models.saving import FORMAT, VERSION


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
