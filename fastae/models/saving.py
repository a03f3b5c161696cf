"""Saved models: a folder with `model.safetensors` (tensors and description) and `config.json` (a copy). No pickle."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastae.data.scaling import Scaler
from fastae.data.writers import new_folder, write_atomically
from fastae.models.format import MODELS, VERSION, listed, not_finite, skeleton, zero_scale
from fastae.nn.arguments import FLOATS, is_dtensor
from fastae.nn.tied_linear_act import TiedLinearAct

logger = logging.getLogger(__name__)

_ELSE = "torch.save(model.state_dict(), file) keeps the tensors of any model"
_ABSENT = object()
_LATER = ("training", "scaler", "trained")  # what is set after the constructor


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Write `model` to the folder `path`, made if missing; an older model there survives until the new one is complete.

    `model.safetensors` is the whole model, its description in the file's metadata: one rename decides between old and
    new. `config.json` is a copy of that description for people and other tools: editing it changes nothing but that
    `load` warns of it. A folder that was not there appears whole.

    What is written is the class, the constructor's arguments, the tensors, the scaler and how `fit` trained it. So
    before anything is written, the model is compared with what its constructor makes of `config()`: modules,
    activations, widths, tensors.
    Not part of a file, and so not compared: hooks, `requires_grad`, training or evaluation mode, and that parameters
    share memory (a bias used twice): each comes back as a tensor of its own with the same values, so the outputs are
    the same, and further training moves them apart. NaN and inf are written, with a warning in the log, for a refusal
    would lose the work; `load` refuses them and says how to reach them.

    Raises TypeError for a model of another class than those of `MODELS` (a subclass would come back as its base), a
    scaler that is not a `Scaler`, or parameters that are not plain tensors; ValueError that names each difference from
    the constructor's model; and OSError if the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    if any(map(is_dtensor, model.parameters())):
        raise TypeError(
            "save: parameters must be plain tensors; got DTensors: on every rank, gather them with .full_tensor(); on "
            "rank 0, load them into a model that is not sharded and save that"
        )
    name = _name_of(type(model))
    twin = _twin(model)
    if differences := list(_differences(model, twin)):
        raise ValueError(
            "save: model must be as its constructor makes it, or a loaded one would differ; "
            f"{listed(differences)} ({_ELSE})"
        )
    tensors = _tensors(model)
    description = {
        "format": name,
        "version": VERSION,
        "config": twin.config(),
        "scaler": None if model.scaler is None else model.scaler.kind,
    } | ({} if model.trained is None else {"trained": model.trained})
    weights = to_bytes(tensors, {"fastae": json.dumps(description)})
    text = json.dumps(description, indent=2) + "\n"
    with new_folder(Path(path), replace=True, last="model.safetensors") as folder:
        write_atomically({folder / "config.json": text.encode(), folder / "model.safetensors": weights})


def _name_of(kind: type) -> str:
    """The name of exactly that class in a file."""
    for name, made in MODELS.items():
        if kind is made:
            return name
    base = next((made.__name__ for made in MODELS.values() if issubclass(kind, made)), None)
    returns = "" if base is None else f", which would come back as a {base}"
    known = ", ".join(sorted(MODELS))
    raise TypeError(
        f"save: model must be of a class that load makes ({known}); got a {kind.__name__}{returns}: "
        "keep its state_dict with torch.save or safetensors, or load that into a plain model and save this"
    )


# ---------------------------------------------------------------- is it what its description says?


def _twin(model: Any) -> Any:
    """Model that the constructor makes from `config()`, on the meta device."""
    try:
        return skeleton(type(model), model.config())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"save: model.config() must be what its constructor takes; got: {error}") from None


def _differences(model: Any, twin: Any) -> Iterator[str]:
    mine, its = (dict(m.named_modules(remove_duplicate=False)) for m in (model, twin))
    unlike: list[str] = []
    for name in its | mine:
        if name.startswith(tuple(f"{above}." for above in unlike)):
            continue
        kinds = [type(modules[name]) if name in modules else None for modules in (mine, its)]
        if kinds[0] is kinds[1]:
            yield from _own(name, mine[name], its[name])
        else:
            unlike.append(name)
            is_, was = (None if kind is None else f"a {kind.__name__}" for kind in kinds)
            yield _difference(name, is_, was)
    if not unlike:
        if list(mine) != list(its):
            yield f"its modules come in the order {', '.join(filter(None, mine))}"
        sources, wanted = _sources(mine), _sources(its)
        for name, source in sources.items():
            if source != wanted[name]:
                yield _difference(f"{name}.source", source, wanted[name])
        yield from _unlike(_contents(model), _contents(twin))


def _own(name: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
    """A forward of its own, and plain attributes that the constructor sets otherwise."""
    if "forward" in vars(module):
        yield f"{name or 'the model'} has a forward of its own"
    for key, wanted in vars(other).items():
        if key.startswith("_") or key in _LATER:
            continue
        value = vars(module).get(key, _ABSENT)
        if type(value) is not type(wanted) or value != wanted:
            yield _difference(_join(name, key), None if value is _ABSENT else repr(value), repr(wanted))


def _sources(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The name of the layer whose weight each tied layer uses."""
    names = {id(module): name for name, module in modules.items()}
    tied = {name: module for name, module in modules.items() if isinstance(module, TiedLinearAct)}
    return {name: names.get(id(module.source), "a layer elsewhere") for name, module in tied.items()}


def _contents(model: nn.Module) -> dict[str, Any]:
    """Tensors that hold numbers: the state_dict, buffers that are not in it, and None where one of them is None."""
    absent = {
        _join(name, key): None
        for name, module in model.named_modules(remove_duplicate=False)
        for key, value in (*module._parameters.items(), *module._buffers.items())
        if value is None
    }
    return absent | dict(model.named_buffers(remove_duplicate=False)) | dict(model.state_dict(keep_vars=True))


def _unlike(mine: dict[str, Any], its: dict[str, Any]) -> Iterator[str]:
    for name in its | mine:
        value, wanted = (_shown(contents[name]) if name in contents else None for contents in (mine, its))
        if value != wanted:
            yield _difference(name, value, wanted)


def _shown(value: Tensor | None) -> str:
    return "None" if value is None else str(list(value.shape))


def _difference(name: str, value: str | None, wanted: str | None) -> str:
    """One difference in words; None is what is not there."""
    constructors = "the constructor makes none" if wanted is None else f"the constructor's is {wanted}"
    return f"{name} is {'missing' if value is None else value}, {constructors}"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


# ---------------------------------------------------------------- what is written


def _tensors(model: Any) -> dict[str, Tensor]:
    """All that the file holds, each tensor in memory of its own."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        _check_plain(name, value)
        tensor = value.detach().cpu().contiguous().resolve_neg()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor  # safetensors refuses what shares memory
        seen.add(memory)
    if model.scaler is not None:
        tensors |= _scaler_tensors(model.scaler, model.features[0])
    faults = [fault for name, tensor in tensors.items() if (fault := not_finite(name, tensor))]
    if "scaler.scale" in tensors and (fault := zero_scale(tensors["scaler.scale"])):
        faults.append(fault)
    if faults:
        logger.warning("save: model holds numbers that load refuses: %s", listed(faults))
    return tensors


def _check_plain(name: str, value: Tensor) -> None:
    """A dense tensor with numbers, of a dtype that `load` takes."""
    if value.is_meta:
        raise ValueError(f"save: model must hold numbers; {name} is on the meta device ({_ELSE})")
    kinds = (nn.Parameter, Tensor)
    if type(value) not in kinds or type(value.data) is not Tensor or value.layout is not torch.strided:
        got = str(value.layout) if type(value) in kinds and type(value.data) is Tensor else type(value.data).__name__
        raise TypeError(f"save: parameters must be plain tensors; {name} is {got} ({_ELSE})")
    if value.dtype not in FLOATS:
        *most, last, got = (str(dtype).removeprefix("torch.") for dtype in (*FLOATS, value.dtype))
        raise TypeError(f"save: parameters must be {', '.join(most)} or {last}; {name} is {got} ({_ELSE})")


def _scaler_tensors(scaler: object, width: int) -> dict[str, Tensor]:
    if type(scaler) is not Scaler:
        raise TypeError(
            f"save: model.scaler must be a fastae.Scaler or None; got a {type(scaler).__name__} "
            "(fastae.Scaler.fit(x, 'standard') makes one)"
        )
    tensors = {}
    for name in ("offset", "scale"):
        values = getattr(scaler, name)
        plain = isinstance(values, np.ndarray)
        if not plain or values.dtype not in (np.float32, np.float64) or values.shape != (width,):
            got = f"{values.dtype} {list(values.shape)}" if plain else type(values).__name__
            raise ValueError(
                f"save: model.scaler.{name} must be a float32 array [{width}], as the model's input is wide; got {got}"
            )
        tensors[f"scaler.{name}"] = torch.from_numpy(np.array(values))
    return tensors
