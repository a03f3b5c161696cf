"""`torchrun -m fastae train`: the loss of one process, one writer, and a killed worker that costs an epoch at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastae.cli import main as cli

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EPOCHS, STEPS = 6, 4  # 60 training rows of 16

# `fastae` with one process that dies by SIGKILL in the middle of its fourth epoch, the first time; every step is noted.
DYING = """
import os, signal, sys
from pathlib import Path
from fastae.cli import main as cli
from fastae.engine.train_step import TrainStep

victim, notes = sys.argv.pop(1), Path(sys.argv.pop(1))
rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
call, taken = TrainStep.__call__, 0

def step(self, *args):
    global taken
    taken += 1
    if (rank, restart) == (victim, "0") and taken == 3 * 4 + 2:  # the second step
        os.kill(os.getpid(), signal.SIGKILL)
    loss = call(self, *args)
    (notes / f"rank{rank}.restart{restart}").write_text(str(taken))
    return loss

TrainStep.__call__ = step
cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds rows.npy and `one`, which a process alone has trained on them."""
    folder = tmp_path_factory.mktemp("torchrun")
    rng = np.random.default_rng(0)
    np.save(folder / "rows.npy", (rng.normal(size=(80, 3)) @ rng.normal(size=(3, 16))).astype(np.float32))
    assert CliRunner().invoke(cli.cli, train(folder / "one")).exit_code == 0
    return folder


def run(folder: Path, *command: str) -> tuple[int, str]:
    """The exit code of `command` in `folder`, and what it wrote to stdout and stderr."""
    options = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 300, "check": False}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return done.returncode, done.stdout


def train(out: Path, *options: str) -> list[str]:
    common = ["--features", "16,8,3", "--epochs", str(EPOCHS), "--batch-size", "16", "--validation-split", "0.25"]
    return ["train", f"{out.parent}/rows.npy", *common, "--lr", "0.01", "--patience", "9", "--out", f"{out}", *options]


def losses(model: Path) -> tuple[list[float], list[float]]:
    history = json.loads((model / "history.json").read_text())
    return history["loss"], history["val_loss"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_give_the_loss_of_one_and_rank_0_prints_and_writes(folder: Path) -> None:
    code, told = run(folder, *TORCHRUN, "-m", "fastae", *train(folder / "two"))
    assert code == 0, told
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=1e-5)
    assert told.count("compression ratio") == told.count("; saved ") == told.count("epoch 6/6") == 1
    assert names(folder / "two") == names(folder / "one")


@pytest.mark.parametrize("victim", ["0", pytest.param("1", marks=pytest.mark.integrations)])  # 15 s each
def test_a_killed_worker_costs_no_more_than_the_epoch_under_way(victim: str, folder: Path) -> None:
    (folder / "dying.py").write_text(DYING)
    out, kept, notes = (folder / f"{name}{victim}" for name in ("killed", "kept", "notes"))
    notes.mkdir()
    command = [*TORCHRUN, "--max-restarts", "1", "dying.py", victim, str(notes)]
    code, told = run(folder, *command, *train(out, "--checkpoint", str(kept)))
    assert code == 0, told
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)
    taken = {path.name: int(path.read_text()) for path in notes.iterdir()}
    assert taken[f"rank{victim}.restart0"] == 3 * STEPS + 1
    assert taken["rank0.restart1"] == taken["rank1.restart1"] == (EPOCHS - 3) * STEPS  # three epochs were kept
    assert names(kept) == ["checkpoint.safetensors"]
