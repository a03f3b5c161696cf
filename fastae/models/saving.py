"""Saved models: a folder with `model.safetensors` (tensors and description) and `config.json` (a copy). No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from fastae.data.writers import write_atomically
from fastae.models.dense import DenseAutoencoder
from fastae.nn.arguments import is_dtensor

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
