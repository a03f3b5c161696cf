"""The README's code runs as it stands, and the demo does what the README says."""

import json
import re
import sys
from pathlib import Path

import pytest

from fastae.cli import demo

ROOT = Path(__file__).parents[2]


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    assert len([line for line in blocks[0].splitlines() if line.strip()]) == 12
    namespace = {}
    exec(blocks[0], namespace)
    assert capsys.readouterr().out.rstrip().endswith("True")  # the loaded model gives the same codes
    for block in blocks[1:]:
        exec(block, namespace)


def test_the_demo_trains_both_sides_to_the_same_loss_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo"), "--epochs", "2"])
    demo.main()
    out = capsys.readouterr().out
    rows = re.findall(r"^ *(fastae|plain PyTorch) +([\d.]+) +([\d.]+)% +([\d.]+) s", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["fastae", "plain PyTorch"]
    assert float(rows[0][1]) == pytest.approx(float(rows[1][1]), rel=0.02)
    assert "784 -> 256" in out
    left = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert left == ["config.json", "history.json", "loss.png", "model.safetensors", "reconstructions.png"]
    history = json.loads((tmp_path / "demo/history.json").read_text())
    assert history["val_loss"][-1] == pytest.approx(float(rows[0][1]), abs=1e-6)
