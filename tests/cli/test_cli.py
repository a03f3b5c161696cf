"""The command line as a user meets it: every command, every input format, every error in one line with exit code 2."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastae
from fastae.cli import main as cli
from fastae.data import writers as outputs
from fastae.data.readers import read_array
from fastae.nn import backend
from fastae.train.fit import split_rows


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `fastae ARGS` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend._process, "name", "auto")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fastae", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (60, 16), dtype=np.uint8)


TRAIN = ("--features", "16,8,3", "--epochs", "2", "--batch-size", "16", "--quiet")


def trained(run, pixels, *options):
    np.save("d.npy", pixels)
    assert run("train", "d.npy", *TRAIN, *options)[0] == 0


def test_the_same_digits_in_every_format_give_the_same_model(run, tmp_path):
    images = (read_array("mnist5k")[:300] * 255).round().astype(np.uint8)
    assert images.max() == 255
    header = ",".join(f"pixel{i}" for i in range(784))
    np.save("d.npy", images)
    np.savez("d.npz", digits=images, other=images[:3])
    np.savetxt("d.csv", images, fmt="%d", delimiter=",")
    np.savetxt("h.csv", images, fmt="%d", delimiter=",", header=header, comments="")
    idx = struct.pack(">BBBBIII", 0, 0, 8, 3, 300, 28, 28) + images.tobytes()
    (tmp_path / "d-idx3-ubyte").write_bytes(idx)
    with gzip.open("d-idx3-ubyte.gz", "wb") as file:
        file.write(idx)
    weights = set()
    for source in ("d.npy", "d.npz", "d.csv", "h.csv", "d-idx3-ubyte", "d-idx3-ubyte.gz"):
        key = ("--key", "digits") if source.endswith("npz") else ()
        out = tmp_path / f"model-{source}"
        options = ("--features", "784,32,8", "--scale", "unit", "--epochs", "2", "--quiet", "--out", out)
        assert run("train", source, *key, *options) == (0, "", "")
        weights.add((out / "model.safetensors").read_bytes())
    assert len(weights) == 1


def test_train_prints_summary_progress_and_result_and_leaves_its_files(run, pixels, tmp_path):
    np.save("d.npy", pixels)
    code, out, err = run("train", "d.npy", "--features", "16,8,3", "--epochs", "3", "--batch-size", "16")
    assert code == 0
    assert "16 -> 8" in out
    assert "3 epochs: loss" in out
    assert err.count("epoch ") == 3
    assert "rows/s" in err
    left = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert left == ["config.json", "history.json", "loss.png", "model.safetensors", "reconstructions.png"]
    assert len(json.loads((tmp_path / "model/history.json").read_text())["val_loss"]) == 3


def test_scaling_is_measured_on_training_rows_saved_and_applied_again(run, pixels):
    trained(run, pixels, "--scale", "standard", "--validation-split", "0.5")
    model = fastae.load("model")
    assert model.scaler.kind == "standard"
    rows, held_out = split_rows(60, 0.5, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(model.scaler.offset, pixels[rows.numpy()].mean(0), rtol=1e-6)
    assert not np.allclose(model.scaler.offset, pixels[held_out.numpy()].mean(0))
    scaled = model.scaler.transform(pixels.astype(np.float32))
    assert run("encode", "model", "d.npy", "--out", "code.npy")[0] == 0
    np.testing.assert_array_equal(np.load("code.npy"), model.encode(scaled))
    assert run("score", "model", "d.npy", "--out", "score.csv")[0] == 0
    np.testing.assert_array_equal(np.loadtxt("score.csv", dtype=np.float32), model.score(scaled))
    _, out, _ = run("score", "model", "d.npy")
    np.testing.assert_array_equal(np.array(out.split(), np.float32), model.score(scaled))
    assert run("reconstruct", "model", "d.npy", "--out", "x.npy")[0] == 0
    np.testing.assert_array_equal(np.load("x.npy"), model.scaler.inverse_transform(model(scaled)))


def test_options_reach_the_model(run, pixels):
    trained(
        run, pixels, "--activation", "gelu", "--code-activation", "tanh", "--output-activation", "sigmoid", "--tied",
        "--optimizer", "adamw", "--weight-decay", "0.1", "--precision", "bfloat16", "--patience", "1",
    )  # fmt: skip
    assert fastae.load("model").config() == {
        "features": [16, 8, 3], "activation": "gelu", "code_activation": "tanh", "output_activation": "sigmoid",
        "decoder_features": None, "tied": True,
    }  # fmt: skip
    trained(run, pixels, "--decoder-features", "3,5,16", "--out", "other", "--validation", "d.npy")
    assert fastae.load("other").decoder_features == [3, 5, 16]


@pytest.mark.parametrize("code", [(), ("--code", "5")])
@pytest.mark.parametrize("image", [(1, 8, 6), (3, 4, 4), (2, 6, 4)])
def test_a_convolutional_autoencoder(run, tmp_path, image, code):
    x = np.random.default_rng(0).random((40, *image), dtype=np.float32)
    np.save("x.npy", x)
    options = ("--image", ",".join(map(str, image)), "--channels", "4,3", "--epochs", "2", "--batch-size", "16", *code)
    assert run("train", "x.npy", *options, "--quiet")[0] == 0
    ae, rows = fastae.load("model"), x.reshape(40, -1)
    assert ae.config() == {"image": list(image), "channels": [4, 3], "code": 5 if code else None}
    drawn = image[0] != 2  # neither grey nor in colours
    assert (tmp_path / "model/reconstructions.png").exists() == drawn
    for name, function in (("encode", ae.encode), ("reconstruct", ae), ("score", ae.score)):
        assert run(name, "model", "x.npy", "--out", f"{name}.npy")[0] == 0
        np.testing.assert_array_equal(np.load(f"{name}.npy"), function(rows))
    _, out, err = run("info", "model")
    assert "Conv2d" in out
    assert "likelihood bernoulli" in out
    assert err == ""
    assert (
        run("train", "x.npy", *options, "--likelihood", "mse", "--scale", "standard", "--quiet", "--out", "m")[0] == 0
    )
    assert fastae.load("m").likelihood == fastae.likelihoods.MSE()


def test_info(run, pixels):
    trained(run, pixels, "--scale", "unit")
    code, out, err = run("info", "model")
    assert (code, err) == (0, "")
    assert "compression ratio 5.33 to 1" in out
    assert "scaled to 'unit'" in out


def test_checkpoint_and_resume_give_the_bits_of_one_run(run, pixels, tmp_path):
    trained(run, pixels, "--epochs", "4", "--out", "whole")
    trained(run, pixels, "--epochs", "2", "--checkpoint", "c", "--out", "half")
    trained(run, pixels, "--epochs", "4", "--checkpoint", "c", "--resume", "--out", "resumed")
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


def test_interrupted_training_saves_the_model_and_exits_with_130(run, pixels, monkeypatch):
    losses = []
    original = fastae.DenseAutoencoder.loss

    def loss(model, x, target=None):
        losses.append(1)
        if len(losses) == 6:
            raise KeyboardInterrupt
        return original(model, x, target)

    monkeypatch.setattr(fastae.DenseAutoencoder, "loss", loss)
    np.save("d.npy", pixels)
    assert run("train", "d.npy", *TRAIN)[0] == 130
    fastae.load("model")
    history = json.loads(Path("model/history.json").read_text())
    assert (len(history["loss"]), history["stopped"]) == (1, "interrupted")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train d.npy --features 15,3", "d.npy must have 15 features, as the model has; got 16"),
        ("train d.npy --features 16,x", "--features must be whole numbers with commas between"),
        ("train d.npy --features 16", "features must be two or more positive whole numbers"),
        ("train d.npy --features 16,3 --activation relo", "did you mean 'relu'?"),
        ("train d.npy --features 16,3 --backend tritn", "did you mean 'triton'?"),
        ("train d.npy --features 16,3 --scale standrd", "did you mean 'standard'?"),
        ("train d.npy --features 16,3 --batch-size 9 --optimizer adm", "did you mean 'adam'?"),
        ("train d.npy --features 16,3 --batch-size 9 --lr 1e30", "the loss must stay finite; got"),
        ("train d.npy --features 16,3 --device cpux", "--device must be one that works here; got 'cpux'"),
        ("train d.npy --features 16,3 --resume", "--resume needs --checkpoint FOLDER"),
        ("train d.npy --features 16,3 --epochs many", "'many' is not a valid integer"),
        ("train d.npy", "give --features, or --image with --channels: one of the two"),
        ("train d.npy --features 16,3 --image 1,4,4", "give --features, or --image with --channels: one of the two"),
        ("train d.npy --features 16,3 --code 2", "--code goes with --image, not with --features"),
        ("train d.npy --image 1,4,4 --channels 2 --tied", "--tied goes with --features, not with --image"),
        ("train d.npy --image 1,4,4", "--image needs --channels, e.g. 32,32"),
        ("train d.npy --image 4,4 --channels 2", "--image must be three positive whole numbers, like (1, 28, 28)"),
        ("train d.npy --image 1,4,4 --channels 2,2,2", "--channels must be at most 2 for an image of 4 x 4, of which"),
        ("train d.npy --image 1,4,5 --channels 2", "d.npy must have 20 features, as the model has; got 16"),
        ("train nan.npy --features 16,3", "nan.npy must be finite; got 1 NaN and 1 inf, the first at row 7, column 3"),
        ("train text.csv --features 2,1", "got 'high' at row 3, column 2"),
        ("train empty.csv --features 2,1", "empty"),
        ("train d.npz --key wrong --features 16,3", "key"),
        ("train mnist5 --features 784,3", "did you mean 'mnist5k'?"),
        ("train complex.npy --features 16,3", "complex"),
        ("train file/x.npy --features 16,3", "file"),
        ("train d.npy --features 16,3 --out file/model", "file"),
        ("trian d.npy", "No such command 'trian'"),
        ("info nothing", "path must be a folder with a saved model"),
        ("encode model d.npy --out code.txt", "--out must end in .npy or .csv; got 'code.txt'"),
        ("encode model d.npy --out small.npy", "--out: small.npy exists; add --force to overwrite it"),
        ("encode model d.npy --out d.npy", "--out must be another file than DATA; got d.npy"),
        ("encode model d.npy", "Missing option '--out'"),
        ("score model small.npy", "small.npy must have 16 features, as the model has; got 2"),
        ("score truncated d.npy", "it is truncated, or was not written by fastae"),
        ("score foreign d.npy", "it is truncated, or was not written by fastae"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(run, pixels, tmp_path, arguments, message):
    trained(run, pixels)
    bad = pixels.astype(np.float32)
    bad[7, 3], bad[9, 0] = np.nan, np.inf
    np.save("nan.npy", bad)
    np.save("small.npy", bad[:5, :2])
    np.save("complex.npy", pixels.astype(complex))
    np.savez("d.npz", digits=pixels)
    (tmp_path / "text.csv").write_text("a,b\n1,2\n3,high\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "file").touch()
    for name in ("truncated", "foreign"):
        shutil.copytree("model", name)
    (tmp_path / "truncated/model.safetensors").write_bytes((tmp_path / "model/model.safetensors").read_bytes()[:-9])
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign/model.safetensors")
    if arguments.startswith("train") and "--out" not in arguments:
        arguments += " --out new"
    code, _, err = run(*arguments.split())
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err
    assert err.startswith("fastae: ")
    assert "Traceback" not in err
    assert not (tmp_path / "new/config.json").exists()


def test_existing_model_is_kept_without_force_and_replaced_with_it(run, pixels, tmp_path):
    trained(run, pixels)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    code, _, err = run("train", "d.npy", *TRAIN, "--seed", "1")
    assert code == 2
    assert "--out: model exists; choose another folder, or add --force" in err
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert run("train", "d.npy", *TRAIN, "--seed", "1", "--force")[0] == 0
    assert (tmp_path / "model/model.safetensors").read_bytes() != before


def test_a_full_disk_leaves_the_old_model(run, pixels, tmp_path, monkeypatch):
    trained(run, pixels)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.os, "fsync", full)
    code, _, err = run("train", "d.npy", *TRAIN, "--seed", "1", "--force")
    assert (code, err.count("\n")) == (2, 1)
    assert "No space left on device" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_failure_while_encoding_keeps_the_older_result(run, pixels, tmp_path):
    trained(run, pixels)
    assert run("encode", "model", "d.npy", "--out", "code.npy")[0] == 0
    before = (tmp_path / "code.npy").read_bytes()
    bad = pixels.astype(np.float32)
    bad[50] = np.nan
    np.save("bad.npy", bad)
    assert run("encode", "model", "bad.npy", "--out", "code.npy", "--force")[0] == 2
    assert (tmp_path / "code.npy").read_bytes() == before
    assert not list(tmp_path.glob(".*part"))


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_before_training(run, pixels, tmp_path):
    np.save("d.npy", pixels)
    (tmp_path / "locked").mkdir(mode=0o555)
    code, _, err = run("train", "d.npy", *TRAIN, "--out", "locked/model")
    assert code == 2
    assert "Permission denied" in err


def test_the_module_and_the_help(tmp_path):
    program = subprocess.run(
        [sys.executable, "-m", "fastae", "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert all(command in program.stdout for command in ("train", "encode", "reconstruct", "score", "info"))
