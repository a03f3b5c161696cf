"""From nothing to a first result, in fresh processes that take turns; the clock starts when torch is imported."""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import fastae_kernels
import torch

import fastae
from fastae.analysis.plain import PlainAutoencoder
from fastae.models.dense import DenseAutoencoder
from fastae_bench.rounds import OPTIONAL_VARIANTS, Budget, Times
from fastae_bench.sizes import Size
from fastae_bench.variants import FASTAE, difference

CPU_VARIANTS = CUDA_VARIANTS = (FASTAE, "tuned", "compiled")

_BEGIN = """
import json, sys, time, torch
features, batch, folder = json.loads(sys.argv[1])
widths = features + features[-2::-1]
torch.manual_seed(0)
x = torch.rand(batch, features[0])
started = time.perf_counter()
"""
_PLAIN = """
from torch import nn
layers = []
for i, (k, n) in enumerate(zip(widths, widths[1:])):
    layers += [nn.Linear(k, n), nn.ReLU()] if i not in (len(features) - 2, len(widths) - 2) else [nn.Linear(k, n)]
model = nn.Sequential(*layers)
"""
_STEP = """
optimizer = torch.optim.Adam(model.parameters(), fused=True)
loss = loss_of(x)
loss.backward()
optimizer.step()
result = loss.item()
"""
_END = """
print(json.dumps([time.perf_counter() - started, result]))
"""

# what -> variant -> program
PROGRAMS = {
    "import": {FASTAE: "import fastae\nresult = 0.0"},
    "first step": {
        FASTAE: """
import fastae
model = fastae.DenseAutoencoder(features)
step = fastae.TrainStep(model, torch.optim.Adam(model.parameters(), fused=True), batch)
result = step(x).item()
""",
        "tuned": _PLAIN + "loss_of = lambda x: nn.functional.mse_loss(model(x), x)" + _STEP,
        "compiled": _PLAIN + "loss_of = torch.compile(lambda x: nn.functional.mse_loss(model(x), x))" + _STEP,
    },
    "load": {
        FASTAE: "import fastae\nresult = fastae.load(folder + '/fastae').encode(x).double().sum().item()",
        "tuned": _PLAIN
        + """
model.load_state_dict(torch.load(folder + '/plain.pt', weights_only=True))
with torch.inference_mode():
    result = model[: 2 * len(features) - 3](x).double().sum().item()
""",
    },
}


def measure_startup(what: str, names: Sequence[str], size: Size, tolerance: float, budget: Budget) -> Times:
    """Seconds of each program in each round; what it computes is compared in all rounds."""
    programs = {name: PROGRAMS[what][name] for name in names if name in PROGRAMS[what]}
    if not budget.compile_cold:
        programs.pop("compiled", None)
    times = Times({"wall": {name: [] for name in programs}})
    for package in (fastae, fastae_kernels):  # as pip does when it installs one; what lies in a cache is left alone
        compileall.compile_dir(package.__path__[0], quiet=2)
    with tempfile.TemporaryDirectory() as folder:
        _save(size, folder)
        for index in range(min(budget.rounds, budget.processes)):
            results = {}
            for name in list(programs):
                try:
                    seconds, results[name] = _run(programs[name], size, f"{folder}/cache{index}", folder)
                except RuntimeError as error:
                    if name not in OPTIONAL_VARIANTS:
                        raise
                    times.missing[name] = str(error)
                    del programs[name], times.seconds["wall"][name]
                    continue
                times.seconds["wall"][name].append(seconds)
            ours = {"result": torch.tensor(results[FASTAE])}
            for name in results.keys() - {FASTAE}:
                if differs := difference(ours, {"result": torch.tensor(results[name])}, tolerance):
                    times.refused[name] = differs
                    del programs[name], times.seconds["wall"][name]
    return times


def _save(size: Size, folder: str) -> None:
    """One model as fastae saves it, and as a state_dict of `nn.Sequential`."""
    torch.manual_seed(0)
    model = DenseAutoencoder(size.features)
    model.save(f"{folder}/fastae")
    plain = PlainAutoencoder(model)
    torch.save(torch.nn.Sequential(*plain.encoder, *plain.decoder).state_dict(), f"{folder}/plain.pt")


def _run(program: str, size: Size, cache: str, folder: str) -> tuple[float, float]:
    """(seconds, result); a cache for what is compiled that nobody has used before."""
    arguments = [sys.executable, "-c", _BEGIN + program + _END, json.dumps([size.features, size.batch, folder])]
    own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"a start-up program failed: {last}")
    seconds, result = json.loads(done.stdout.splitlines()[-1])
    return seconds, result
