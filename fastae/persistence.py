"""Saved models: a folder with `model.safetensors` (the tensors) and `config.json` (everything else). No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastae.autoencoder import DenseAutoencoder
from fastae.scaling import Scaler

FORMAT = "fastae.DenseAutoencoder"
VERSION = 1


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Write all files or none: a full disk or a kill while writing leaves what was there before."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, data in files.items():
            with parts[path].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def save(model: DenseAutoencoder, path: str | os.PathLike[str]) -> None:
    """Write `model` to the folder `path`, made if it is missing; an older model there survives until the new one is
    complete.

    Raises OSError if the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.scaler is not None:
        tensors["scaler.offset"] = torch.from_numpy(model.scaler.offset)
        tensors["scaler.scale"] = torch.from_numpy(model.scaler.scale)
    weights = to_bytes(tensors)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config(),
        "scaler": None if model.scaler is None else model.scaler.kind,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_atomically({folder / "model.safetensors": weights, folder / "config.json": text.encode()})


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> DenseAutoencoder:
    """The `DenseAutoencoder` that `save` wrote to the folder `path`, on `device`, bit for bit.

    Raises FileNotFoundError if `path` holds no model and ValueError if what it holds is truncated, foreign or of a
    newer version.
    """
    from safetensors.torch import load as from_bytes

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"load: path must be a folder with a saved model (config.json); got {str(path)!r}")
    config = _read_config(folder / "config.json")
    try:
        weights = (folder / "model.safetensors").read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"load: {folder / 'model.safetensors'} is missing beside its config.json") from None
    if hashlib.sha256(weights).hexdigest() != config["weights_sha256"]:
        raise ValueError(
            f"load: {folder / 'model.safetensors'} must be the file that config.json describes; it is truncated, "
            "changed, or from another save"
        )
    tensors = from_bytes(weights)
    scaler = None
    if config["scaler"] is not None:
        offset, scale = tensors.pop("scaler.offset").numpy(), tensors.pop("scaler.scale").numpy()
        scaler = Scaler(config["scaler"], offset, scale)
    model = DenseAutoencoder(**config["config"], device="meta")  # allocates nothing, draws no random numbers
    model.load_state_dict(tensors, assign=True)
    model.scaler = scaler
    return model.to(device)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        known = config["format"] == FORMAT
        version = config["version"]
        complete = {"config", "scaler", "weights_sha256"} <= config.keys()
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"load: {path} must be the description of a saved fastae model; it is truncated or foreign")
    if version != VERSION or not complete:
        raise ValueError(f"load: {path} must have version {VERSION}; got {version!r}, which another fastae wrote")
    return config
