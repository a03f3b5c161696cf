"""save and load: every bit, models that are not what they say, files that change or lie, and names of older classes."""

import copy
import hashlib
import importlib
import io
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastae
from fastae import DenseAutoencoder, LinearAct, Scaler, aliases
from fastae.models import loading
from fastae.models.format import MODELS
from fastae.nn.tied_linear_act import TiedLinearAct

KNOWN = "fastae.ConvAutoencoder, fastae.DenseAutoencoder"


def model(seed: int = 0, **options: Any) -> DenseAutoencoder:
    torch.manual_seed(seed)
    return DenseAutoencoder([12, 8, 3], **options)


def data(rows: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(3, 2, size=(rows, 12)).astype(np.float32)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("scale", [None, "none", "unit", "standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"decoder_features": [3, 12], "activation": "gelu"}])
def test_every_bit_comes_back(options: dict[str, Any], dtype: torch.dtype, scale: str | None, tmp_path: Path) -> None:
    ae = model(output_activation="sigmoid", dtype=dtype, **options)
    torch.nn.init.normal_(ae.decoder[-1].bias)
    if scale is not None:
        ae.scaler = Scaler.fit(data(), scale)
    for folder in (tmp_path / "a" / "b", str(tmp_path / "c")):  # the second is a saved copy of the loaded one
        ae.save(folder)
        loaded = fastae.load(folder)
        assert (repr(loaded), loaded.config()) == (repr(ae), ae.config())
        assert loaded.state_dict().keys() == ae.state_dict().keys()
        for name, value in loaded.named_parameters():
            assert torch.equal(value, ae.get_parameter(name))
            assert (value.dtype, value.device, value.requires_grad) == (dtype, torch.device("cpu"), True)
        np.testing.assert_array_equal(loaded.score(data()), ae.score(data()))
        if scale is None:
            assert loaded.scaler is None
        else:
            assert loaded.scaler.kind == scale
            assert loaded.scaler.transform(data()).tobytes() == ae.scaler.transform(data()).tobytes()
        ae = loaded
    assert content(tmp_path / "a" / "b") == content(tmp_path / "c")


def test_a_loaded_model_trains_on_as_the_saved_one(tmp_path: Path) -> None:
    ae = model(tied=True)
    ae.save(tmp_path)
    loaded = fastae.load(tmp_path)
    for each in (ae, loaded):
        each.fit(data(), epochs=2, batch_size=16, progress=False)
    for a, b in zip(ae.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ae.encoder[0].weight, model().encoder[0].weight)


@pytest.mark.parametrize("context", [torch.device("meta"), torch.no_grad()], ids=["meta", "no_grad"])
def test_loading_and_saving_take_nothing_from_their_surroundings(context: Any, tmp_path: Path) -> None:
    ae = model()
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with context:
            ae.save(tmp_path)
            loaded = fastae.load(tmp_path)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), before)  # no random number was drawn
    for value, wanted in zip(loaded.parameters(), ae.parameters(), strict=True):
        assert torch.equal(value, wanted)
        assert (value.dtype, value.requires_grad, value.is_leaf) == (torch.float32, True, True)


def test_a_folder_holds_two_files_and_no_pickle(tmp_path: Path) -> None:
    ae = model()
    ae.save(tmp_path)
    assert sorted(content(tmp_path)) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["version"], config["config"]) == ("fastae.DenseAutoencoder", 1, ae.config())


DIGESTS = {  # as fastae 0.1 wrote them
    False: (
        "0620df4d174375d57301163caf58cb3e69cb564de05e3fd4d6e9ba0072d0da40",
        "ba498464b1c4ae805e76d85d7f19754a3499b86f07eb4f761768e7ebf61987ca",
    ),
    True: (
        "8513050f4e2d2fc4989bf888cfa05292461bb222d15c78d3d8e4714c7f11b567",
        "a236a1ab8d8e76e7165943a9d89de322ee2fc8bc6e9f839c6601180fffdc4bce",
    ),
}


@pytest.mark.parametrize("tied", [False, True])
def test_files_of_plain_models_stay_the_same_bytes(tied: bool, tmp_path: Path) -> None:
    ae = DenseAutoencoder([12, 8, 3], output_activation="sigmoid", tied=tied)
    for i, p in enumerate(ae.parameters()):
        p.data.copy_(torch.arange(p.numel()).view_as(p) + i)
    if tied:
        ae.scaler = Scaler("unit", np.arange(12, dtype=np.float32), np.arange(1, 13, dtype=np.float32))
    ae.save(tmp_path)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path).items()}
    assert (digests["config.json"], digests["model.safetensors"]) == DIGESTS[tied]


def test_config_hands_out_copies(tmp_path: Path) -> None:
    ae = DenseAutoencoder([12, 8, 3], decoder_features=[3, 5, 12])
    config = ae.config()
    config["features"][-1] = 2
    config["decoder_features"].append(7)
    assert (ae.features, ae.decoder_features) == ([12, 8, 3], [3, 5, 12])
    ae.save(tmp_path)
    assert fastae.load(tmp_path).config() == ae.config()


# ---------------------------------------------------------------- writing over an older model


def test_a_newer_model_takes_the_place_of_an_older(tmp_path: Path) -> None:
    model(0).save(tmp_path)
    new = model(1, tied=True)
    new.save(tmp_path)
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, new.encoder[0].weight)
    assert sorted(content(tmp_path)) == ["config.json", "model.safetensors"]


def fail_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int) -> None:
    """Let that call (from 1) of target.name find the disk full."""
    real, calls = getattr(target, name), iter(range(1, 1000))

    def full(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(target, name, full)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("target", "name"), [(os, "fsync"), (Path, "open"), (Path, "replace")])
def test_an_older_model_survives_a_write_that_fails(
    target: Any, name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model(0)
    old.save(tmp_path)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, target, name, call)
        with pytest.raises(OSError, match="No space left"):
            model(1).save(tmp_path)
    assert sorted(content(tmp_path)) == sorted(before)  # no .part file stays
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, old.encoder[0].weight)


def test_files_are_complete_before_they_take_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(file: int) -> None:
        events.append("fsync")
        fsync(file)

    def replaced(part: Path, path: Path) -> Path:
        events.append(path.name)
        assert part.parent == path.parent or part.parent.parent == path.parent  # one file system
        return replace(part, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    (tmp_path / "config.json").touch()
    model().save(tmp_path)
    wanted = ["config.json", "fsync", "fsync", "model.safetensors"]
    assert events[:2] == ["fsync", "fsync"]
    assert sorted(events[:4]) == wanted


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            model().save(path)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- models that are not what their constructor makes


class Denoising(DenseAutoencoder):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + 1


class Own(torch.Tensor):
    pass


def changed(change: Callable[[DenseAutoencoder], Any], **options: Any) -> DenseAutoencoder:
    ae = model(**options)
    change(ae)
    return ae


def turned(ae: DenseAutoencoder) -> None:
    """The first layer last, all of one shape."""
    ae.__init__([8, 8, 8], code_activation="relu")  # type: ignore[misc]
    ae.encoder._modules["0"] = ae.encoder._modules.pop("0")


def swapped(ae: DenseAutoencoder) -> None:
    first, second = ae.decoder
    first._source, second._source = second._source, first._source  # type: ignore[union-attr]


UNLIKE: dict[str, tuple[dict[str, Any], Callable[[DenseAutoencoder], Any], str]] = {
    "activation": (
        {},
        lambda ae: setattr(ae.encoder[0], "activation", "tanh"),
        "encoder.0.activation is 'tanh', the constructor's is 'relu'",
    ),
    "the model's activation": (
        {},
        lambda ae: setattr(ae, "activation", "tanh"),
        "encoder.0.activation is 'relu', the constructor's is 'tanh'; "
        "decoder.0.activation is 'relu', the constructor's is 'tanh'",
    ),
    "attribute of another type": (
        {},
        lambda ae: setattr(ae.encoder[0], "in_features", np.array([12, 12])),
        "encoder.0.in_features is array([12, 12]), the constructor's is 12",
    ),
    "appended": ({}, lambda ae: ae.decoder.append(nn.Sigmoid()), "decoder.2 is a Sigmoid, the constructor makes none"),
    "inserted": (
        {},
        lambda ae: ae.encoder.insert(1, nn.Dropout()),
        "encoder.1 is a Dropout, the constructor's is a LinearAct; "
        "encoder.2 is a LinearAct, the constructor makes none",
    ),
    "removed": (
        {},
        lambda ae: ae.encoder.pop(1),
        "encoder.1 is missing, the constructor's is a LinearAct",
    ),
    "another class": (
        {},
        lambda ae: ae.encoder.__setitem__(0, nn.Linear(12, 8)),
        "encoder.0 is a Linear, the constructor's is a LinearAct",
    ),
    "parametrized": (
        {},
        lambda ae: parametrizations.weight_norm(ae.encoder[0]),
        "encoder.0 is a ParametrizedLinearAct, the constructor's is a LinearAct",
    ),
    "pruned": (
        {},
        lambda ae: prune.l1_unstructured(ae.encoder[0], "weight", 0.5),
        "encoder.0.weight is missing, the constructor's is [8, 12]; encoder.0.weight_mask is [8, 12], the constructor "
        "makes none; encoder.0.weight_orig is [8, 12], the constructor makes none",
    ),
    "other widths": (
        {},
        lambda ae: ae.encoder.__setitem__(1, LinearAct(8, 4, activation="identity")),
        "encoder.1.out_features is 4, the constructor's is 3; encoder.1.weight is [4, 8], the constructor's is [3, 8]; "
        "encoder.1.bias is [4], the constructor's is [3]",
    ),
    "all other widths": (
        {},
        lambda ae: ae.encoder.__setitem__(0, LinearAct(13, 9)),
        "encoder.0.in_features is 13, the constructor's is 12; encoder.0.out_features is 9, the constructor's is 8; "
        "encoder.0.weight is [9, 13], the constructor's is [8, 12]; encoder.0.bias is [9], the constructor's is [8]",
    ),
    "bias": (
        {},
        lambda ae: setattr(ae.encoder[0], "bias", None),
        "encoder.0.bias is None, the constructor's is [8]",
    ),
    "no bias": (
        {},
        lambda ae: delattr(ae.encoder[0], "bias"),
        "encoder.0.bias is missing, the constructor's is [8]",
    ),
    "buffer": (
        {},
        lambda ae: ae.register_buffer("threshold", torch.ones(3)),
        "threshold is [3], the constructor makes none",
    ),
    "buffer that no state_dict holds": (
        {},
        lambda ae: ae.encoder[0].register_buffer("mask", torch.ones(8), persistent=False),
        "encoder.0.mask is [8], the constructor makes none",
    ),
    "parameter": (
        {},
        lambda ae: setattr(ae.encoder[0], "gain", nn.Parameter(torch.ones(8))),
        "encoder.0.gain is [8], the constructor makes none",
    ),
    "forward": (
        {},
        lambda ae: setattr(ae, "forward", lambda x: x),
        "the model has a forward of its own",
    ),
    "a layer's forward": (
        {},
        lambda ae: setattr(ae.encoder[1], "forward", lambda x: x),
        "encoder.1 has a forward of its own",
    ),
    "order": ({}, turned, "its modules come in the order encoder, encoder.1, encoder.0, decoder, decoder.0, decoder.1"),
    "tied to another": (
        {"tied": True},
        lambda ae: ae.decoder.__setitem__(0, TiedLinearAct(LinearAct(8, 3), "relu")),
        "decoder.0.source is a layer elsewhere, the constructor's is encoder.1",
    ),
    "tied crosswise": (
        {"tied": True},
        swapped,
        "decoder.0.source is encoder.0, the constructor's is encoder.1; "
        "decoder.1.source is encoder.1, the constructor's is encoder.0",
    ),
    "many": (
        {},
        lambda ae: [part.register_buffer("seen", torch.ones(())) for part in (ae, *ae.encoder, *ae.decoder)],
        "seen is [], the constructor makes none; encoder.0.seen is [], the constructor makes none; "
        "encoder.1.seen is [], the constructor makes none; decoder.0.seen is [], the constructor makes none; "
        "and 1 more",
    ),
}
ELSE = " (torch.save(model.state_dict(), file) keeps the tensors of any model)"


def refusal_of(ae: DenseAutoencoder, folder: Path) -> str:
    """The text of the error, with its class; nothing may have been written."""
    with pytest.raises((TypeError, ValueError)) as error:
        ae.save(folder / "new")
    assert not list(folder.iterdir())
    return f"{error.type.__name__}: {error.value}"


@pytest.mark.parametrize("case", UNLIKE)
def test_a_model_that_its_description_would_not_make_is_refused(case: str, tmp_path: Path) -> None:
    options, change, difference = UNLIKE[case]
    start = "ValueError: save: model must be as its constructor makes it, or a loaded one would differ; "
    assert refusal_of(changed(change, **options), tmp_path) == f"{start}{difference}{ELSE}"


def test_attributes_that_fit_no_constructor_are_refused(tmp_path: Path) -> None:
    text = (
        "ValueError: save: model.config() must be what its constructor takes; got: DenseAutoencoder: decoder_features "
        "must run from 2 to 12; got [3, 8, 12]"
    )
    assert refusal_of(changed(lambda ae: ae.features.__setitem__(-1, 2)), tmp_path) == text


@pytest.mark.parametrize(
    ("kind", "returns"), [(Denoising, ", which would come back as a DenseAutoencoder"), (nn.Linear, "")]
)
def test_another_class_is_refused_with_what_to_do(kind: Any, returns: str, tmp_path: Path) -> None:
    ae = Denoising([12, 8, 3])
    ae.__class__ = kind
    known = ", ".join(sorted(MODELS))
    text = (
        f"TypeError: save: model must be of a class that load makes ({known}); got a {kind.__name__}"
        f"{returns}: keep its state_dict with torch.save or safetensors, or load that into a plain model and save this"
    )
    ae.save = lambda path: DenseAutoencoder.save(ae, path)  # type: ignore[method-assign]
    assert refusal_of(ae, tmp_path) == text


class StandardScaler:
    pass


def scaler(offset: Any, scale: Any) -> Callable[[DenseAutoencoder], None]:
    return lambda ae: setattr(ae, "scaler", Scaler("unit", offset, scale))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda ae: setattr(ae, "scaler", StandardScaler()),
            "TypeError: save: model.scaler must be a fastae.Scaler or None; got a StandardScaler "
            "(fastae.Scaler.fit(x, 'standard') makes one)",
        ),
        (
            scaler(np.zeros(5, np.float32), np.ones(5, np.float32)),
            "ValueError: save: model.scaler.offset must be a float32 array [12], as the model's input is wide; "
            "got float32 [5]",
        ),
        (
            scaler(np.zeros(12, np.float32), np.ones(12, np.int64)),
            "ValueError: save: model.scaler.scale must be a float32 array [12], as the model's input is wide; "
            "got int64 [12]",
        ),
        (
            scaler(torch.zeros(12), torch.ones(12)),
            "ValueError: save: model.scaler.offset must be a float32 array [12], as the model's input is wide; "
            "got Tensor",
        ),
    ],
    ids=["of another library", "of other features", "of integers", "of tensors"],
)
def test_another_scaler_is_refused(change: Callable[[DenseAutoencoder], Any], text: str, tmp_path: Path) -> None:
    assert refusal_of(changed(change), tmp_path) == text


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.empty(8, 12, device="meta"), "ValueError: save: model must hold numbers; {} is on the meta device"),
        (
            torch.ones(8, 12, dtype=torch.float8_e4m3fn),
            "TypeError: save: parameters must be float32, float16, bfloat16 or float64; {} is float8_e4m3fn",
        ),
        (
            torch.ones(8, 12, dtype=torch.complex64),
            "TypeError: save: parameters must be float32, float16, bfloat16 or float64; {} is complex64",
        ),
        (torch.ones(8, 12).to_sparse(), "TypeError: save: parameters must be plain tensors; {} is torch.sparse_coo"),
        (torch.ones(8, 12).as_subclass(Own), "TypeError: save: parameters must be plain tensors; {} is Own"),
    ],
    ids=["meta", "float8", "complex", "sparse", "subclass"],
)
def test_tensors_that_load_would_not_take_are_refused(weight: torch.Tensor, text: str, tmp_path: Path) -> None:
    ae = changed(lambda ae: setattr(ae.encoder[0], "weight", nn.Parameter(weight)))
    assert refusal_of(ae, tmp_path) == text.format("encoder.0.weight") + ELSE


def shares_a_bias(ae: DenseAutoencoder) -> None:
    ae.decoder[0].bias = ae.encoder[0].bias


def shares_a_storage(ae: DenseAutoencoder) -> None:
    memory = torch.randn(30)
    ae.encoder[0].bias, ae.encoder[1].bias = nn.Parameter(memory[:8]), nn.Parameter(memory[4:7])


def shares_a_layer(ae: DenseAutoencoder) -> None:
    ae.__init__([8, 8, 8], code_activation="relu")  # type: ignore[misc]
    ae.encoder[1] = ae.decoder[0] = ae.encoder[0]


def in_other_layouts(ae: DenseAutoencoder) -> None:
    ae.encoder[0].weight = nn.Parameter(torch.randn(12, 8).T)
    ae.encoder[1].weight = nn.Parameter(torch._neg_view(torch.randn(3, 8)))  # its negative is what lies in memory


def in_use(ae: DenseAutoencoder) -> None:
    """What is not part of a file, and is no reason to refuse."""
    ae.requires_grad_(False)
    ae.encoder[0].register_forward_hook(lambda *_: None)
    ae.eval()
    ae.note = "mine"  # type: ignore[assignment]
    ae._compiled_call_impl = ae._call_impl  # as ae.compile() does


@pytest.mark.parametrize(
    "change",
    [
        shares_a_bias,
        shares_a_storage,
        shares_a_layer,
        in_other_layouts,
        in_use,
        lambda ae: ae.features.__setitem__(1, np.int64(8)),
        lambda ae: ae.decoder.double(),
        lambda ae: ae.half(),
        lambda ae: fastae.patch(ae),
        scaler(np.zeros(24, np.float32)[::2], np.arange(12.0, 0, -1)[::-1]),
    ],
    ids=[
        "bias",
        "storage",
        "layer",
        "layouts",
        "in use",
        "numpy's widths",
        "mixed dtypes",
        "half",
        "patched",
        "scaler of views",
    ],
)
def test_values_come_back_whatever_holds_them(change: Callable[[DenseAutoencoder], Any], tmp_path: Path) -> None:
    ae = changed(change)
    ae.save(tmp_path)
    loaded = fastae.load(tmp_path)
    for (name, value), wanted in zip(loaded.state_dict().items(), ae.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), name
        assert value.dtype == wanted.dtype
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.training
    memories = [p.untyped_storage() for p in loaded.parameters()]
    assert len({memory.data_ptr() for memory in memories}) == len(memories)
    if ae.scaler is not None:
        assert loaded.scaler is not None
        np.testing.assert_array_equal(loaded.scaler.offset, ae.scaler.offset)
        np.testing.assert_array_equal(loaded.scaler.scale, ae.scaler.scale)


def test_a_copy_of_a_tied_model_is_tied_to_its_own_layers_and_saved(tmp_path: Path) -> None:
    again = copy.deepcopy(model(tied=True))
    again.save(tmp_path)
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, again.encoder[0].weight)


# ---------------------------------------------------------------- a loaded model and its file


def test_a_loaded_model_does_not_live_in_its_file(tmp_path: Path) -> None:
    model(0).save(tmp_path / "a")
    model(1).save(tmp_path / "b")
    file = tmp_path / "a" / "model.safetensors"
    ae, wanted = fastae.load(tmp_path / "a"), model(0)
    with file.open("r+b") as opened:  # as cp and rsync --inplace do
        opened.write((tmp_path / "b" / "model.safetensors").read_bytes())
    for value, its in zip(ae.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(value, its)
    ae = fastae.load(tmp_path / "a")
    os.truncate(file, 100)  # with the file mapped, what follows ends the process (SIGBUS)
    np.testing.assert_array_equal(ae.score(data()), model(1).score(data()))


def test_each_parameter_has_memory_of_its_own_size_that_can_be_resized(tmp_path: Path) -> None:
    ae = model()
    ae.scaler = Scaler.fit(data(), "unit")
    ae.save(tmp_path)
    loaded = fastae.load(tmp_path)
    for p in loaded.parameters():
        memory = p.untyped_storage()
        assert (memory.nbytes(), memory.resizable()) == (p.nbytes, True)
    assert loaded.scaler is not None
    assert loaded.scaler.offset.flags.writeable


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().save(tmp_path)
    file = tmp_path / "model.safetensors"
    fstat, size = os.fstat, file.stat().st_size
    monkeypatch.setattr(os, "fstat", lambda number: os.stat_result((*fstat(number)[:6], size, 0, 0, 0)))
    os.truncate(file, size - 4)
    assert foreign(tmp_path) == "it ends within 'encoder.1.weight'"


def test_on_a_big_endian_machine_bytes_are_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ae = model()
    ae.save(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:start] + np.frombuffer(whole[start:], np.uint32).byteswap().tobytes())
    monkeypatch.setattr(sys, "byteorder", "big")
    for value, wanted in zip(fastae.load(tmp_path).parameters(), ae.parameters(), strict=True):
        assert torch.equal(value, wanted)


# ---------------------------------------------------------------- numbers that no model should have

MEND = "train again, or mend the tensors that safetensors.torch.load_file({!r}) reads"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_written_with_a_warning_and_not_loaded(
    dtype: torch.dtype, value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ae = model(dtype=dtype)
    ae.encoder[0].weight.data[2, 5] = ae.encoder[0].weight.data[7, 0] = value
    with caplog.at_level(logging.WARNING):
        ae.save(tmp_path)
    fault = "NaN or inf in encoder.0.weight: 2 of 96, the first at [2, 5]"
    assert [record.getMessage() for record in caplog.records] == [
        f"save: model holds numbers that load refuses: {fault}"
    ]
    file = tmp_path / "model.safetensors"
    text = f"load: {file} must hold finite numbers; got {fault}: {MEND.format(str(file))}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.load(tmp_path)
    assert not load_file(file)["encoder.0.weight"].isfinite().all()  # the work is not lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_largest_finite_numbers_are_loaded(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ae = model(dtype=dtype)
    ae.encoder[0].weight.data[:4] = torch.finfo(dtype).max
    ae.encoder[0].weight.data[4:] = torch.finfo(dtype).min
    ae.save(tmp_path)
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, ae.encoder[0].weight)
    assert not caplog.records


def test_nan_far_into_a_large_tensor_is_found(tmp_path: Path) -> None:
    ae = DenseAutoencoder([600, 400])
    ae.encoder[0].weight.data[399, 599] = float("nan")
    ae.save(tmp_path)
    with pytest.raises(ValueError, match=re.escape("encoder.0.weight: 1 of 240000, the first at [399, 599]: ")):
        fastae.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "requirement", "what"),
    [
        ("scale", 0.0, "a scaler that divides by no 0", "0"),
        ("scale", float("nan"), "finite numbers", "NaN or inf"),
        ("offset", float("inf"), "finite numbers", "NaN or inf"),
    ],
)
def test_a_scaler_that_cannot_scale_is_not_loaded(
    name: str, value: float, requirement: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ae = model()
    ae.scaler = Scaler.fit(data(), "standard")
    getattr(ae.scaler, name)[4] = value
    ae.save(tmp_path)
    file, fault = tmp_path / "model.safetensors", f"{what} in scaler.{name}: 1 of 12, the first at [4]"
    assert [record.getMessage() for record in caplog.records] == [
        f"save: model holds numbers that load refuses: {fault}"
    ]
    text = f"load: {file} must hold {requirement}; got {fault}: {MEND.format(str(file))}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.load(tmp_path)


# ---------------------------------------------------------------- files that cannot be loaded


def test_no_model_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", str(tmp_path)):
        text = f"load: path must be a folder with a saved model (model.safetensors); got {str(path)!r}"
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(text)}$"):
            fastae.load(path)


def foreign(folder: Path) -> str:
    """The reason of a refusal."""
    start = (
        f"load: {folder / 'model.safetensors'} must be a model that fastae saved; "
        "it is truncated, or was not written by fastae: "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(start)}") as error:
        fastae.load(folder)
    text = str(error.value)
    assert text.isprintable(), text  # in one line
    return text.removeprefix(start)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda whole: whole[:-1], "its header describes 1956 bytes, the file has 1955"),
        (lambda whole: whole + b"\0", "its header describes 1956 bytes, the file has 1957"),
        (lambda whole: b"", "8 + 0 bytes of header are announced, the file has 0"),
        (lambda whole: whole[:60], "8 + 864 bytes of header are announced, the file has 60"),
        (lambda whole: b"weights" * 9, "8 + 8607351304595531127 bytes of header are announced, the file has 63"),
        (lambda whole: bytes(8), "its header is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (lambda whole: b"\2" + bytes(7) + b"[]", "its header is no JSON object"),
        (
            lambda whole: b"\2" + bytes(7) + b"\xff\xff",
            "its header is no JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte)",
        ),
    ],
    ids=["cut", "longer", "empty", "header", "text", "zeros", "list", "bytes"],
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes().replace(b'"identity\\"', b'"sigmoid\\" ')))
    assert foreign(tmp_path) == reason


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        foreign(tmp_path)


def test_a_header_with_wrong_bytes_is_refused_or_loads(tmp_path: Path) -> None:
    ae = model()
    ae.scaler = Scaler.fit(data(), "unit")
    ae.save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header, draw, refused = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(header)
            damaged[place] = draw.choice([draw.randrange(256), damaged[place] ^ 1 << draw.randrange(8), *b'0"{}[],'])
        path.write_bytes(damaged)
        try:
            fastae.load(tmp_path)
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"load: {path} must "), text
            assert text.isprintable(), text
            refused += 1
    assert refused > 500


def rewrite(folder: Path, **changes: Any) -> None:
    """The saved model again, its description changed; None removes a key."""
    path = folder / "model.safetensors"
    description = json.loads((folder / "config.json").read_text()) | changes
    description = {key: value for key, value in description.items() if value is not ...}
    save_file(load_file(path), path, {"fastae": json.dumps(description)})


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "its metadata has no 'fastae'"),
        ({"other": "{}"}, "its metadata has no 'fastae'"),
        ({"fastae": ""}, "its metadata['fastae'] is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (
            {"fastae": "["},
            "its metadata['fastae'] is no JSON (Expecting value: line 1 column 2 (char 1))",
        ),
        ({"fastae": "[" * 100_000}, None),  # Python's words for it differ
        ({"fastae": "[]"}, "its metadata['fastae'] is no JSON object"),
        ({"fastae": "3"}, "its metadata['fastae'] is no JSON object"),
        ({"fastae": "{}"}, "its description has no 'format'"),
    ],
    ids=["none", "other", "empty", "bracket", "brackets", "list", "number", "object"],
)
def test_a_file_of_another_program_is_refused(
    metadata: dict[str, str] | None, reason: str | None, tmp_path: Path
) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata)
    assert foreign(tmp_path) == reason or reason is None


def raw(folder: Path, header: dict[str, Any], tail: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + tail)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": 3}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": {"dtype": "F32"}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"shape": ["2"]}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"shape": [2.0]}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"shape": [-2]}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, "'a' must have a dtype, a shape and data_offsets in the header"),
        ({"a": ENTRY | {"dtype": "I64"}}, "'a' is 'I64', a model's tensors are F64, F32, F16, BF16"),
        ({"a": ENTRY | {"shape": [3]}}, "'a', F32 [3], cannot take 8 bytes"),
        ({"a": ENTRY | {"shape": [10**15]}}, "'a', F32 [1000000000000000], cannot take 8 bytes"),
        ({"a": ENTRY, "b\n": ENTRY}, "'b\\n' begins at byte 0 of the tensors, not at 8"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "'a' begins at byte 8 of the tensors, not at 0"),
        ({"__metadata__": [], "a": ENTRY}, "its metadata has no 'fastae'"),
    ],
)
def test_a_malformed_header_is_refused(header: dict[str, Any], reason: str, tmp_path: Path) -> None:
    raw(tmp_path, header, bytes(8))
    assert foreign(tmp_path) == reason


def test_the_header_may_name_tensors_in_any_order(tmp_path: Path) -> None:
    ae = model()
    ae.save(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    raw(tmp_path, dict(reversed(json.loads(whole[8:start]).items())), whole[start:])
    for value, wanted in zip(fastae.load(tmp_path).parameters(), ae.parameters(), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("version", [2, "1.0", None])
def test_another_version(version: Any, tmp_path: Path) -> None:
    model().save(tmp_path)
    rewrite(tmp_path, version=version)
    text = f"load: {tmp_path / 'model.safetensors'} must have version 1; got {version!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.load(tmp_path)


@pytest.mark.parametrize("name", ["fastae.Other", 3, ["fastae.DenseAutoencoder"], None])
def test_another_format_is_refused_with_those_that_are_known(name: Any, tmp_path: Path) -> None:
    model().save(tmp_path)
    rewrite(tmp_path, format=name)
    file = tmp_path / "model.safetensors"
    text = f"load: {file} must have a format that this fastae knows ({KNOWN}); got {name!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": ...}, "its description has no 'format'"),
        ({"version": ...}, "its description has no 'version'"),
        ({"config": ...}, "its description has no 'config'"),
        ({"scaler": ...}, "its description has no 'scaler'"),
        ({"config": None}, "its description's 'config' is no JSON object"),
        (
            {"config": {}},
            "its config makes no model: DenseAutoencoder.__init__() missing 1 required positional argument: 'features'",
        ),
        (
            {"config": {"features": [12, 8, 3], "colour": "red"}},
            "its config makes no model: DenseAutoencoder.__init__() got an unexpected keyword argument 'colour'",
        ),
        (
            {"config": {"features": [12, 0]}},
            "its config makes no model: DenseAutoencoder: features must be two or more positive whole numbers, "
            "like [784, 128]; got [12, 0]",
        ),
        (
            {"config": {"features": [12, 9, 3]}},
            "encoder.0.weight is [8, 12], its config makes it [9, 12]; encoder.0.bias is [8], its config makes it [9]; "
            "encoder.1.weight is [3, 8], its config makes it [3, 9]; decoder.0.weight is [8, 3], its config makes it "
            "[9, 3]; and 2 more",
        ),
        (
            {"config": {"features": [12, 10**12, 3]}},
            "encoder.0.weight is [8, 12], its config makes it [1000000000000, 12]; encoder.0.bias is [8], its config "
            "makes it [1000000000000]; encoder.1.weight is [3, 8], its config makes it [3, 1000000000000]; "
            "decoder.0.weight is [8, 3], its config makes it [1000000000000, 3]; and 2 more",
        ),
        (
            {"config": {"features": [12, 8, 3], "tied": True}},
            "its config makes no 'decoder.0.weight'; its config makes no 'decoder.1.weight'",
        ),
        ({"scaler": "unit"}, "scaler.offset [12] is missing; scaler.scale [12] is missing"),
        ({"config": {"features": [4] * 9}}, "its config has 9 features, the file 8 tensors"),
    ],
)
def test_a_description_that_does_not_fit_its_tensors_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model().save(tmp_path)
    rewrite(tmp_path, **changes)
    assert foreign(tmp_path) == reason


def test_a_missing_tensor_and_one_too_many_are_named(tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, description = load_file(path), (tmp_path / "config.json").read_text()
    tensors["encoder.2.bias"] = tensors.pop("encoder.1.bias")
    save_file(tensors, path, {"fastae": description})
    assert foreign(tmp_path) == "encoder.1.bias [3] is missing; its config makes no 'encoder.2.bias'"


def test_weights_that_are_integers_are_named(tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | {"encoder.1.weight": torch.zeros(3, 8, dtype=torch.int32)}
    save_file(tensors, path, {"fastae": (tmp_path / "config.json").read_text()})
    assert foreign(tmp_path) == "'encoder.1.weight' is 'I32', a model's tensors are F64, F32, F16, BF16"


@pytest.mark.parametrize("kind", ["minmax", 3, []])
def test_a_scaler_of_a_kind_that_there_is_not_is_refused(kind: Any, tmp_path: Path) -> None:
    ae = model()
    ae.scaler = Scaler.fit(data(), "unit")
    ae.save(tmp_path)
    rewrite(tmp_path, scaler=kind)
    assert foreign(tmp_path).startswith(f"its scaler's kind must be one of none, unit, standard; got {kind!r}")


def test_twenty_thousand_layers_in_the_description_are_refused_unmade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model().save(tmp_path)
    made: list[type] = []
    monkeypatch.setattr(loading, "skeleton", lambda kind, config: made.append(kind))
    for key in ("features", "decoder_features"):
        config = model().config() | {key: [4] * 20_000}
        rewrite(tmp_path, config=config)
        assert foreign(tmp_path) == f"its config has 20000 {key}, the file 8 tensors"
    assert not made


def test_one_file_is_the_model_and_config_json_describes_it(tmp_path: Path) -> None:
    model(3).save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == model(3).config()
    for text in ("null", "[" * 1000, json.dumps(written | {"config": {"features": [4, 3]}})):  # never read
        (tmp_path / "config.json").write_text(text)
        assert torch.equal(fastae.load(tmp_path).encoder[0].weight, model(3).encoder[0].weight)
    (tmp_path / "config.json").unlink()
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, model(3).encoder[0].weight)


# ---------------------------------------------------------------- files of torch.save under the names of fastae 0.1

OLD = {
    "fastae.autoencoder.DenseAutoencoder": "fastae.models.dense",
    "fastae.linear_act.LinearAct": "fastae.nn.linear_act",
    "fastae.tied.TiedLinearAct": "fastae.nn.tied_linear_act",
    "fastae.scaling.Scaler": "fastae.data.scaling",
    "fastae.mse_loss.MSELoss": "fastae.nn.losses",
    "fastae.history.History": "fastae.train.history",
    "fastae._patched.PatchedLinear": "fastae.patching.fused_modules",
    "fastae._patched.PatchedSequential": "fastae.patching.fused_modules",
    "fastae._patched._new": "fastae.patching.fused_modules",
}


def as_then(text: bytes) -> bytes:
    """A pickle of today as fastae 0.1 would have written it."""
    for old, new in OLD.items():
        module, name = old.rsplit(".", 1)
        text = text.replace(f"c{new}\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    return text


def saved_then(thing: object, path: Path) -> None:
    """torch.save, with the names of then."""
    now = io.BytesIO()
    torch.save(thing, now)
    with zipfile.ZipFile(now) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry, as_then(content) if entry.filename.endswith("data.pkl") else content)


def of_each_class() -> dict[str, Any]:
    patched = nn.Sequential(nn.Linear(12, 3), nn.ReLU())
    fastae.patch(patched)
    ae = model(tied=True)
    ae.scaler = Scaler.fit(data(), "unit")
    del ae.likelihood, ae.trained  # there was one loss
    return {"model": ae, "history": fastae.History([1.0]), "loss": fastae.MSELoss(), "patched": patched}


def test_objects_pickled_under_their_old_names_come_back(tmp_path: Path) -> None:
    aliases.register()
    things = of_each_class()
    text = as_then(pickle.dumps(things, protocol=2))
    for old in OLD:
        assert "c{}\n{}\n".format(*old.rsplit(".", 1)).encode() in text, old
    again = pickle.loads(text)
    saved_then(things, tmp_path / "things.pt")
    for found in (again, torch.load(tmp_path / "things.pt", weights_only=False)):
        assert {key: type(thing) for key, thing in found.items()} == {k: type(v) for k, v in things.items()}
        np.testing.assert_array_equal(found["model"].score(data()), copy.deepcopy(things["model"]).score(data()))
        assert found["model"].decoder[0].source is found["model"].encoder[1]
        assert found["history"] == things["history"]
        x = torch.ones(2, 12)
        assert torch.equal(found["patched"](x), things["patched"](x))
        found["model"].save(tmp_path / "as fastae saves it")


def test_torch_load_alone_finds_the_old_names(tmp_path: Path) -> None:
    saved_then(of_each_class(), tmp_path / "things.pt")
    program = "import sys, torch; print(type(torch.load(sys.argv[1], weights_only=False)['model']))"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "things.pt"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "<class 'fastae.models.dense.DenseAutoencoder'>\n", done.stderr


def test_old_names_take_no_place_of_functions() -> None:
    aliases.register()
    for name in ("linear_act", "mse_loss"):
        module = importlib.import_module(f"fastae.{name}")
        assert module is not getattr(fastae, name)
        assert callable(getattr(fastae, name))
    aliases.register()
    assert importlib.import_module("fastae.mse_loss") is module


def test_an_old_module_has_only_what_was_in_it() -> None:
    aliases.register()
    module = importlib.import_module("fastae.tied")
    assert not hasattr(module, "__file__")
    text = "module 'fastae.tied', now 'fastae.nn.tied_linear_act', has no attribute 'LinearAct'"
    with pytest.raises(AttributeError, match=f"^{re.escape(text)}$"):
        _ = module.LinearAct


@pytest.mark.parametrize(("old", "new"), [(o, n) for o, (n, _) in aliases.MOVED.items()])
def test_every_old_name_leads_somewhere(old: str, new: str) -> None:
    aliases.register()
    for name in aliases.MOVED[old][1]:
        assert getattr(sys.modules[old], name) is getattr(importlib.import_module(new), name)
