"""Attacks on the command line: each is refused in one line that names the option, and nothing is lost."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastae
from fastae.cli import main as cli
from fastae.data import writers
from fastae.nn import backend

T = "train d.npy --features 4,3,2 --epochs 3 --quiet"


def rows(count: int = 200, width: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(count, 3)) @ rng.normal(size=(3, width))).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a line of the shell in a folder with d.npy: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend._process, "name", "auto")
    np.save("d.npy", rows())

    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastae", *line.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def process(*arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastae", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, env=environment, preexec_fn=_as_from_a_terminal, **pipes)


def _as_from_a_terminal() -> None:
    """A shell's background job, which CI may be, ignores SIGINT, and so would what it starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------- refused, and nothing lost

ATTACKS = {
    "another scaling": ("{T} --checkpoint ck --resume --epochs 6 --out b --scale unit",
                        "--scale must be 'standard', as in the checkpoint; got 'unit'"),
    "another run's checkpoint": ("{T} --checkpoint ck --out b", "--checkpoint: ck/checkpoint.safetensors exists; add"),
    "fewer epochs": ("{T} --checkpoint ck --resume --epochs 2 --scale standard --out b",
                     "--epochs must be at least 3, as many as the checkpoint has; got 2"),
    "a folder with other files": ("{T} --out .", "--out: . exists; choose another folder, or add --force"),
    "a model": ("{T} --out m", "--out: m exists; choose another folder, or add --force"),
    "a file": ("{T} --out d.npy", "--out must be a folder; d.npy is a file"),
    "below a file": ("{T} --out d.npy/m", "--out must be where files can be written; got d.npy/m (File exists)"),
    "a file for a folder": ("score m d.npy --out m", "--out must be a file; m is a folder"),
    "the data": ("score m d.npy --out d.npy --force", "--out must be another file than DATA; got d.npy"),
    "a link to the data": ("encode m d.npy --out link.npy --force", "--out must be another file than DATA"),
    "split below 0": ("{T} --out b --validation-split -0.1", "--validation-split must be at least 0 and below 1"),
    "split nan": ("{T} --out b --validation-split nan", "--validation-split must be at least 0 and below 1; got nan"),
    "two validations": ("{T} --out b --validation d.npy --validation-split 0.5",
                        "--validation and --validation-split exclude each other"),
    "patience without rows": ("train nosuch.npy --features 4,2 --out b --patience 3 --validation-split 0",
                              "--patience needs rows to validate on: --validation-split above 0 or --validation"),
    "patience": ("{T} --out b --patience 0", "--patience must be at least 1; got 0"),
    "batch": ("{T} --out b --batch-size 0", "--batch-size must be at least 1; got 0"),
    "lr": ("{T} --out b --lr -1", "--lr must be a positive number; got -1.0"),
    "weight decay": ("{T} --out b --weight-decay -1", "--weight-decay must be 0 or a positive number; got -1.0"),
    "seed": ("{T} --out b --seed 99999999999999999999", "--seed must be a whole number of 64 bits; got 9999"),
    "backend": ("{T} --out b --backend tritn", "--backend must be one of auto, torch, onednn, triton; got 'tritn'"),
    "scale": ("{T} --out b --scale stdrd", "--scale must be one of none, unit, standard; got 'stdrd'; did you mean"),
    "precision": ("{T} --out b --precision float16", "'float16' is not one of 'float32', 'bfloat16'"),
    "activation": ("{T} --out b --activation relo", "--activation must be one of identity, relu,"),
    "no such file": ("train nosuch.npy --features 4,2 --out b", "DATA must be a file or one of mnist5k, digits; got"),
    "beyond float32": ("score m huge.npy", "huge.npy must be numbers of at most 3.4e+38, the largest of float32; got "
                       "1e+39 at row 5, column 2"),
    "key of a csv": ("train d.csv --key a --features 4,2 --out b", "--key must be left out unless the file is a .npz"),
    "wide": ("train d.npy --features 4,999999999999 --out b", "there is not enough memory: 16,000.0 GB are needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTACKS)
def test_refused_in_one_line_and_nothing_lost(run: Any, tmp_path: Path, case: str) -> None:
    assert run(f"{T} --out m --checkpoint ck --scale standard")[0] == 0
    huge = rows().astype(np.float64)
    huge[5, 2] = 1e39
    np.save("huge.npy", huge)
    np.savetxt("d.csv", rows(), delimiter=",")
    (tmp_path / "link.npy").symlink_to("d.npy")
    before = content(tmp_path)
    line, message = ATTACKS[case]
    code, _, err = run(line.format(T=T))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("fastae: ")
    assert message in err
    assert content(tmp_path) == before
    assert not (tmp_path / "b").exists()


def test_what_others_take_is_taken(run: Any, tmp_path: Path) -> None:
    np.savez("d.npz", a=rows(), b=rows(3))
    Path("d.npz").rename("D.NPZ")
    np.save("few.npy", rows(20))
    assert run("train D.NPZ --key a --features 4,2 --epochs 1 --quiet --out npz") == (0, "", "")
    assert run("train few.npy --features 4,2 --epochs 1 --quiet --out few") == (0, "", "")
    assert run(f"{T} --validation D.NPZ --key a --out both")[0] == 2  # a key, and DATA is no .npz
    assert run("train D.NPZ --key a --validation d.npy --features 4,2 --epochs 1 --quiet --out other") == (0, "", "")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").touch()
    assert run(f"{T} --out empty") == (0, "", "")
    assert run(f"{T} --checkpoint one --out one") == (0, "", "")
    assert run(f"{T} --epochs 4 --checkpoint one --resume --force --out one") == (0, "", "")
    fastae.load("one")


def test_a_link_stays_a_link(run: Any, tmp_path: Path) -> None:
    assert run(f"{T} --out m") == (0, "", "")
    (tmp_path / "there").mkdir()
    np.save("there/s.npy", np.zeros(3))
    (tmp_path / "link.npy").symlink_to("there/s.npy")
    (tmp_path / "model").symlink_to("there/new")
    assert run("score m d.npy --out link.npy --force")[0] == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert len(np.load("there/s.npy")) == 200
    assert run(f"{T} --out model")[0] == 0
    assert (tmp_path / "model").is_symlink()
    fastae.load("there/new")


def test_large_values_are_worth_a_word(run: Any) -> None:
    np.save("large.npy", rows().astype(np.float64) * 1e9)
    hint = "--scale standard or unit trains better"
    assert hint in run("train large.npy --features 4,2 --epochs 1 --out a")[1]
    assert hint not in run("train large.npy --features 4,2 --epochs 1 --out b --scale standard")[1]
    assert hint not in run("train d.npy --features 4,2 --epochs 1 --out c")[1]


def test_the_closing_line_tells_of_the_model_that_was_saved(run: Any) -> None:
    np.save("few.npy", np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32))
    code, out, _ = run("train few.npy --features 16,64,12 --epochs 400 --lr 0.01 --patience 5 --out m")
    history = json.loads(Path("m/history.json").read_text())
    best = history["best_epoch"]
    assert code == 0
    assert best == len(history["loss"]) - 5
    told = f"best epoch {best}: val_loss {history['val_loss'][best - 1]:.6g}"
    assert out.splitlines()[-1] == f"{best + 5} epochs (early stopping); {told}; saved m"
    assert told in run("info m")[1]


# ---------------------------------------------------------------- interruptions and races


def test_ctrl_c_before_the_first_epoch_keeps_the_older_model(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    assert run(f"{T} --out m") == (0, "", "")
    before = content(tmp_path)

    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastae.TrainStep, "__call__", pressed)
    code, out, err = run(f"{T} --out m --force")
    assert (code, out) == (130, "")
    assert err == "interrupted before the first epoch ended; nothing was saved\n"
    assert content(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_training_and_save(number: signal.Signals, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", rows(2000))
    out = str(tmp_path / "m")
    options = "--features", "4,2", "--epochs", "1000000", "--out", out, "--checkpoint", str(tmp_path / "ck")
    training = process("train", str(tmp_path / "d.npy"), *options)
    while not (tmp_path / "ck/checkpoint.safetensors").exists():
        assert training.poll() is None
        time.sleep(0.05)
    training.send_signal(number)
    try:
        stdout, _ = training.communicate(timeout=60)
    finally:
        training.kill()
    assert training.returncode == 128 + number
    assert "(interrupted)" in stdout
    assert json.loads((tmp_path / "m/history.json").read_text())["stopped"] == "interrupted"
    fastae.load(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "d.npy", "m"]


def test_a_folder_made_meanwhile_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    path = tmp_path / "m"
    text = rf"{path} was made by another process meanwhile; the result is in {path}-1"

    def write() -> None:
        with writers.new_folder(path, False, "b") as folder:
            (folder / "b").write_text("mine")
            path.mkdir()
            (path / "b").write_text("theirs")

    with pytest.raises(FileExistsError, match=text):
        write()
    assert content(tmp_path) == {"m/b": b"theirs", "m-1/b": b"mine"}


def test_two_writers_leave_the_whole_folder_of_one(tmp_path: Path) -> None:
    path = tmp_path / "m"

    def write(text: str) -> None:
        for _ in range(100):
            with writers.new_folder(path, True, "b") as folder:
                for name in ("a", "b", "c"):
                    (folder / name).write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(content(path).values())) == 1
    assert sorted(content(tmp_path)) == ["m/a", "m/b", "m/c"]


def test_a_config_that_says_something_else_is_told(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert run(f"{T} --out m") == (0, "", "")
    with caplog.at_level(logging.WARNING):
        fastae.load("m")
        assert not caplog.messages
        text = Path("m/config.json").read_text()
        for other in (text.replace("relu", "tanh"), "null", "[" * 100_000, "", text.replace('"features"', '"x"')):
            Path("m/config.json").write_text(other)
            assert fastae.load("m").activation == "relu"
        Path("m/config.json").unlink()
        fastae.load("m")
    texts = [f"load: {Path('m/config.json')} says something else than model.safetensors, which is what was loaded"] * 5
    assert caplog.messages == texts


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize(
    ("encoding", "line"), [("ascii", f"{T} --out modèle2"), ("cp1252", "info modèle"), ("ascii", "explain modèle")]
)
def test_any_encoding_of_the_terminal(encoding: str, line: str, run: Any) -> None:
    assert run(f"{T} --out modèle") == (0, "", "")
    done = process(*line.replace("--quiet", "").split(), PYTHONIOENCODING=encoding)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert len(out.splitlines()) > 5


def test_a_wrong_environment_variable_is_one_line(tmp_path: Path, run: Any) -> None:
    assert run(f"{T} --out m") == (0, "", "")
    wrong = process("score", "m", "d.npy", FASTAE_BACKEND="bogus")
    _, err = wrong.communicate(timeout=120)
    assert wrong.returncode == 2
    assert re.fullmatch(r"fastae: FASTAE_BACKEND must be one of auto, torch, onednn, triton; got 'bogus'\n", err)


def test_bare_fastae_prints_help_and_the_version_needs_no_torch(run: Any) -> None:
    code, out, err = run("")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")
    assert out.count("\n") > 15
    code = (
        "import sys; sys.argv = ['fastae', '--version']\n"
        "from fastae.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"fastae, version {fastae.__version__}\nFalse False\n"


def test_a_model_is_loaded_in_a_process_that_has_named_nothing_else(run: Any) -> None:
    assert run(f"{T} --out m") == (0, "", "")
    code = "import fastae; print(type(fastae.load('m')).__name__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "DenseAutoencoder\n"
