"""Training scripts of four shapes, as they stand and with one line changed: the same losses."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "harnesses"
MODEL = re.compile(r"^model = .*$", re.MULTILINE)
PATCHED = r"\g<0>; print(__import__('fastae').patch(model))"
OWN = "model = __import__('fastae').DenseAutoencoder([64, 32, 8])"  # the same initial weights, drawn in the same order

pytestmark = pytest.mark.integrations


@functools.cache
def told(script: str) -> str:
    """What the script prints, run on its own: a package it needs and does not find is an error like any other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    found = [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss ")]
    assert len(found) == 5
    return found


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("plain_loop", PATCHED), ("lightning_module", PATCHED), ("accelerate_loop", PATCHED),
        ("skorch_regressor", PATCHED),
        ("plain_loop", OWN), ("accelerate_loop", OWN), ("skorch_regressor", OWN),
    ],
    ids=lambda value: {PATCHED: "patched", OWN: "DenseAutoencoder"}.get(value, value),
)  # fmt: skip
def test_one_changed_line_leaves_the_losses(name: str, changed: str) -> None:
    script = (SCRIPTS / f"{name}.py").read_text()
    other, count = MODEL.subn(changed, script)
    assert count == 1
    assert sum(a != b for a, b in zip(script.splitlines(), other.splitlines(), strict=True)) == 1
    wanted = losses(told(script))
    assert wanted[-1] < 0.6 * wanted[0]
    assert losses(told(other)) == pytest.approx(wanted, rel=1e-5)
    if changed == PATCHED:  # that the losses agree says nothing if nothing was replaced
        assert "replaced 2\n" in told(other)
        assert told(other).count("activation='relu'") == 2
