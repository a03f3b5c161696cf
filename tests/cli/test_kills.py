"""`fastae train` killed at any moment, two of them at once, a full disk: nothing lost, nothing torn, the same bits.

FASTAE_KILLS=100 for as many kills; a few by default.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastae
from fastae.train.checkpoint import Checkpoint

pytestmark = pytest.mark.thorough
KILLS = int(os.environ.get("FASTAE_KILLS", "2"))


def start(folder: Path, *options: str, largest: int | None = None) -> subprocess.Popen[str]:
    """`fastae train` on d.npy in the folder; `largest`: bytes of the largest file that it can write."""
    command = [sys.executable, "-m", "fastae", "train", "d.npy", "--features", "64,48,8", "--quiet", *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}

    def limited() -> None:
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "d.npy", np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32))
    return tmp_path


def whole(model: Path) -> dict[str, Any]:
    """What a model's folder says of itself, after looking at every file in it."""
    fastae.load(model)
    described = json.loads((model / "config.json").read_text())
    with (model / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        assert json.loads(json.loads(file.read(length))["__metadata__"]["fastae"]) == described
    history = json.loads((model / "history.json").read_text())
    assert described["trained"]["epochs"] == len(history["loss"])
    return described


def test_killed_at_random_moments(folder: Path) -> None:
    options = "--epochs", "300", "--out"
    assert finished(start(folder, *options, "once")) == (0, "")
    wanted = (folder / "once/model.safetensors").read_bytes()
    draw = random.Random(0)
    kills, runs, epochs = 0, 0, 0
    while kills < KILLS:
        runs += 1
        out = f"m{runs}"
        while True:  # until one run has come to its end
            training = start(folder, *options, out, "--checkpoint", "ck", "--resume")
            while training.poll() is None and kills < KILLS and not (folder / "ck/checkpoint.safetensors").exists():
                time.sleep(0.01)
            if kills < KILLS:
                time.sleep(draw.uniform(0, 6))
            if kills == KILLS or training.poll() is not None:
                assert finished(training) == (0, "")
                break
            training.send_signal(signal.SIGKILL)
            finished(training)
            kills += 1
            done = Checkpoint(folder / "ck", resume=True).epochs
            assert done >= epochs, "epochs were lost"
            epochs = done
            if (folder / out).exists():
                whole(folder / out)
                break
        whole(folder / out)
        assert (folder / out / "model.safetensors").read_bytes() == wanted
        (folder / "ck/checkpoint.safetensors").unlink(missing_ok=True)
        epochs = 0
    names = {path.name for path in folder.iterdir() if ".part." not in path.name}
    assert names == {"d.npy", "once", "ck", *(f"m{i + 1}" for i in range(runs))}


def test_two_at_once_leave_the_whole_model_of_one(folder: Path) -> None:
    for force in (False, True):
        both = [start(folder, "--epochs", "3", "--seed", seed, "--out", "m", *["--force"] * force) for seed in "12"]
        results = [finished(process) for process in both]
        assert whole(folder / "m")["trained"]["seed"] in (1, 2)
        if force:
            assert results == [(0, "")] * 2
        else:  # the one that came second says where its result is
            second = next(r for r in results if r[0])
            assert sorted(r[0] for r in results) == [0, 2]
            assert "was made by another process meanwhile; the result is in" in second[1] or "exists" in second[1]
            if (folder / "m-1").exists():
                whole(folder / "m-1")
                assert second[1].count("\n") == 1


def test_a_disk_that_is_full_keeps_what_was_there(folder: Path) -> None:
    options = "--epochs", "2", "--out", "m", "--checkpoint", "ck", "--force"
    for largest in (0, 5_000, 40_000):  # nothing; config and history; a model, no checkpoint
        assert finished(start(folder, *options)) == (0, "")
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        code, err = finished(
            start(
                folder, "--epochs", "3", "--seed", "1", "--out", "m", "--checkpoint", "ck", "--force", largest=largest
            )
        )
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("fastae: ")
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
