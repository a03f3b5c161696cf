"""save and load: every bit, an old model that survives a failed write, and the text of every error."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastae
from fastae import DenseAutoencoder, Scaler


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


def test_loading_draws_no_random_numbers_and_saving_none(tmp_path: Path) -> None:
    ae = model()
    before = torch.get_rng_state()
    ae.save(tmp_path)
    fastae.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_holds_two_files_and_no_pickle(tmp_path: Path) -> None:
    ae = model()
    ae.save(tmp_path)
    assert sorted(content(tmp_path)) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["version"], config["config"]) == ("fastae.DenseAutoencoder", 1, ae.config())


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
        assert part.parent == path.parent  # one file system
        return replace(part, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
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


# ---------------------------------------------------------------- what cannot be loaded


def test_no_model_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", str(tmp_path)):
        text = f"load: path must be a folder with a saved model (model.safetensors); got {str(path)!r}"
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(text)}$"):
            fastae.load(path)


def refused(folder: Path) -> None:
    text = f"load: {folder / 'model.safetensors'} must be a model that fastae saved; it is truncated or foreign ("
    with pytest.raises(ValueError, match=f"^{re.escape(text)}.+\\)$"):
        fastae.load(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "text", "header"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    model().save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    damaged = {"cut": whole[:-1], "empty": b"", "longer": whole + b"\0", "text": b"weights", "header": whole[:60]}
    path.write_bytes(damaged[damage])
    refused(tmp_path)


def rewrite(folder: Path, **changes: Any) -> None:
    """The saved model again, its description changed."""
    path = folder / "model.safetensors"
    description = json.loads((folder / "config.json").read_text()) | changes
    save_file(load_file(path), path, {"fastae": json.dumps(description)})


@pytest.mark.parametrize(
    "metadata", [None, {"other": "{}"}, *({"fastae": text} for text in ("", "{", "[]", "3", "{}"))]
)
def test_a_file_of_another_program_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", metadata)
    refused(tmp_path)


@pytest.mark.parametrize("version", [2, "1.0", None])
def test_another_version(version: Any, tmp_path: Path) -> None:
    model().save(tmp_path)
    rewrite(tmp_path, version=version)
    text = f"load: {tmp_path / 'model.safetensors'} must have version 1; got {version!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        fastae.load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "another"},
        {"config": {}},
        {"config": None},
        {"config": {"features": [12, 8, 3], "colour": "red"}},
        {"config": {"features": [12, 9, 3]}},
        {"config": {"features": [12, 3]}},
        {"config": {"features": [12, 8, 3], "tied": True}},
        {"config": {"features": [12, 0]}},
        {"scaler": "unit"},
        {"scaler": 3},
    ],
)
def test_a_description_that_does_not_fit_its_tensors_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    model().save(tmp_path)
    rewrite(tmp_path, **changes)
    refused(tmp_path)


def test_one_file_is_the_model_and_config_json_describes_it(tmp_path: Path) -> None:
    model(3).save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"] == model(3).config()
    (tmp_path / "config.json").unlink()
    assert torch.equal(fastae.load(tmp_path).encoder[0].weight, model(3).encoder[0].weight)
