"""Loading saved models."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastae.data.scaling import Scaler
from fastae.models import conv, dense  # noqa: F401 (their classes join MODELS)
from fastae.models.base import Autoencoder
from fastae.models.format import (
    EXPONENTS,
    MODELS,
    VERSION,
    listed,
    memory_of,
    not_finite,
    skeleton,
    tensors_of,
    zero_scale,
)  # fmt: skip

logger = logging.getLogger(__name__)

# safetensors' name of a dtype -> PyTorch's
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Autoencoder:
    """Read the model that `save` wrote to the folder `path`, on `device`, bit for bit.

    The model is of the class that `model.safetensors` names, in training mode, its parameters trainable and in memory
    of their own: what happens to the file afterwards changes nothing. `config.json` is a copy of what that file says of
    the model; where it says something else, the log has a warning.

    Raises FileNotFoundError if `path` holds no model and ValueError, which names the cause, if what it holds is
    truncated, not of fastae, of a newer version, or not usable: NaN or inf among the weights or in the scaler, or a
    scale of 0. `save` writes such a model all the same (a refusal there would lose the work), with a warning; its
    tensors can be looked at and mended with `safetensors.torch.load_file`.
    """
    device = torch.device(device)
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"load: path must be a folder with a saved model (model.safetensors); got {str(path)!r}"
        )
    try:
        model = _read(file)
    except _UnreadableError as error:
        # The reason quotes the file, which may say anything: still one line
        reason = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        raise ValueError(
            f"load: {file} must be a model that fastae saved; it is truncated, or was not written by fastae: {reason}"
        ) from None
    return model if device.type == "cpu" else model.to(device)


class _UnreadableError(ValueError):
    """Not what `save` writes; the text is the reason."""


def _read(file: Path) -> Autoencoder:
    with file.open("rb") as opened:
        metadata, entries = _header(opened)
        description = _object(metadata.get("fastae"), "its metadata", "fastae")
        kind, config = _described(file, description)
        model = _skeleton_of(kind, config, len(entries))
        places = tensors_of(model)
        shapes = {name: list(holder[key].shape) for name, (holder, key) in places.items()}
        if description["scaler"] is not None:
            shapes |= {name: [model.features[0]] for name in ("scaler.offset", "scaler.scale")}
        if unlike := list(_unlike(shapes, entries)):
            raise _UnreadableError(listed(unlike))
        tensors = {entry.name: _tensor(opened, entry, file) for entry in entries}
    for name, (holder, key) in places.items():
        tensor = _laid_out(tensors[name], holder[key])
        holder[key] = nn.Parameter(tensor) if isinstance(holder[key], nn.Parameter) else tensor
    if description["scaler"] is not None:
        if fault := zero_scale(tensors["scaler.scale"]):
            raise ValueError(f"load: {file} must hold a scaler that divides by no 0; got {fault}: {_mend(file)}")
        try:
            values = (tensors[f"scaler.{name}"].numpy() for name in ("offset", "scale"))
            model.scaler = Scaler(description["scaler"], *values)
        except ValueError as error:
            raise _UnreadableError(f"its scaler's {str(error).removeprefix('Scaler: ')}") from None
    model.trained = _trained(description)
    _compare_copy(file, description)
    return model


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides that the constructor gives: a file has none, and channels_last is faster."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype).copy_(tensor)


def _compare_copy(file: Path, description: dict[str, Any]) -> None:
    copy = file.with_name("config.json")
    try:
        same = json.loads(copy.read_bytes()) == description
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError):
        same = False
    if not same:
        logger.warning("load: %s says something else than %s, which is what was loaded", copy, file.name)


# ---------------------------------------------------------------- the file


class _Entry(NamedTuple):
    """One tensor of the file, and where its bytes are."""

    name: str
    dtype: str
    shape: list[int]
    begin: int
    end: int


def _header(opened: BinaryIO) -> tuple[dict[str, Any], list[_Entry]]:
    """The metadata, and the tensors in the order of their bytes, which fill the rest of the file; opened is at them.

    The format is safetensors': the header's length in 8 bytes, JSON of that length, the tensors. It is read here, not
    by the library: that maps the file, and a model must not live in a file that others may write to.
    """
    size = os.fstat(opened.fileno()).st_size
    length = int.from_bytes(opened.read(8), "little")
    if length > size - 8:
        raise _UnreadableError(f"8 + {length} bytes of header are announced, the file has {size}")
    header = _json(opened.read(length), "its header")
    if not isinstance(header, dict):
        raise _UnreadableError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda entry: entry[-2:])
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise _UnreadableError(f"{entry.name!r} begins at byte {entry.begin} of the tensors, not at {end}")
        end = entry.end
    if 8 + length + end != size:
        raise _UnreadableError(f"its header describes {8 + length + end} bytes, the file has {size}")
    return metadata if isinstance(metadata, dict) else {}, entries


def _entry(name: str, value: Any) -> _Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (TypeError, ValueError, KeyError):
        whole = False
    if not whole or not isinstance(dtype, str):
        raise _UnreadableError(f"{name!r} must have a dtype, a shape and data_offsets in the header")
    if dtype not in _DTYPES:
        raise _UnreadableError(f"{name!r} is {dtype!r}, a model's tensors are {', '.join(_DTYPES)}")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _UnreadableError(f"{name!r}, {dtype} {shape}, cannot take {end - begin} bytes")
    return _Entry(name, dtype, list(shape), begin, end)


def _tensor(opened: BinaryIO, entry: _Entry, file: Path) -> Tensor:
    """The next tensor of the file, in memory of its own; looked at for NaN and inf while it is in the cache."""
    tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device="cpu")
    memory = memory_of(tensor)
    if opened.readinto(memory) != tensor.nbytes:  # type: ignore[attr-defined]
        raise _UnreadableError(f"it ends within {entry.name!r}")
    if sys.byteorder == "big":
        np.frombuffer(memory, EXPONENTS[tensor.dtype][0]).byteswap(inplace=True)
    if fault := not_finite(entry.name, tensor):
        raise ValueError(f"load: {file} must hold finite numbers; got {fault}: {_mend(file)}")
    return tensor


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(f"{what} is no JSON ({error})") from None


# ---------------------------------------------------------------- the description


def _object(text: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise _UnreadableError(f"{where} has no {key!r}")
    value = _json(text, f"{where}[{key!r}]")
    if not isinstance(value, dict):
        raise _UnreadableError(f"{where}[{key!r}] is no JSON object")
    return value


def _described(file: Path, description: dict[str, Any]) -> tuple[type[Autoencoder], dict[str, Any]]:
    """(class, constructor's arguments), of a format and version that this fastae knows."""
    _require(description, "format", "version")
    name, version = description["format"], description["version"]
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(
            f"load: {file} must have a format that this fastae knows ({', '.join(sorted(MODELS))}); got {name!r}"
        )
    if version != VERSION:
        raise ValueError(f"load: {file} must have version {VERSION}; got {version!r}")
    _require(description, "config", "scaler")
    config = description["config"]
    if not isinstance(config, dict):
        raise _UnreadableError("its description's 'config' is no JSON object")
    return MODELS[name], config


def _trained(description: dict[str, Any]) -> dict[str, Any] | None:
    trained = description.get("trained")
    if trained is not None and not isinstance(trained, dict):
        raise _UnreadableError("its description's 'trained' is no JSON object")
    return trained


def _require(description: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in description:
            raise _UnreadableError(f"its description has no {key!r}")


def _skeleton_of(kind: type[Autoencoder], config: dict[str, Any], count: int) -> Autoencoder:
    """The skeleton, unless the config does not fit the constructor or the file's `count` of tensors."""
    for key, value in config.items():
        # A width makes a tensor at least; compared before 20,000 layers are made for nothing
        if isinstance(value, list) and len(value) > count:
            raise _UnreadableError(f"its config has {len(value)} {key}, the file {count} tensors")
    try:
        return skeleton(kind, config)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise _UnreadableError(f"its config makes no model: {' '.join(str(error).split())}") from None


def _unlike(shapes: dict[str, list[int]], entries: Iterable[_Entry]) -> Iterator[str]:
    """Differences between the tensors that the config makes and those of the file."""
    found = {entry.name: entry.shape for entry in entries}
    for name, shape in shapes.items():
        if name not in found:
            yield f"{name} {shape} is missing"
        elif found[name] != shape:
            yield f"{name} is {found[name]}, its config makes it {shape}"
    yield from (f"its config makes no {name!r}" for name in found if name not in shapes)


# ---------------------------------------------------------------- the numbers


def _mend(file: Path) -> str:
    return f"train again, or mend the tensors that safetensors.torch.load_file({str(file)!r}) reads"
