"""One library in a process of its own: `child.py VARIANT PROBLEM` answers commands, one line of JSON each."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from peers.problem import PeerProblem
from peers.variants import VARIANTS, Variant

SCORINGS = 5


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def baseline_mib() -> float:
    """Resident MiB now; from here on the peak counts anew (man proc_pid_clear_refs)."""
    if not STATUS.exists():
        return peak_mib()
    CLEAR.write_text("5")
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """The most memory this process has had resident since `baseline_mib`; without /proc, since it began."""
    return _status_mib("VmHWM") if STATUS.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mib(name: str) -> float:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")) / 1024


def round_of(variant: Variant, seed: int, epochs: int) -> dict[str, Any]:
    """Train from the seed's weights and score: the seconds of each, and what came out."""
    variant.prepare(seed, epochs)
    started = time.perf_counter()
    rows = variant.fit()
    fit_s = time.perf_counter() - started
    score_s = []
    for _ in range(SCORINGS):
        started = time.perf_counter()
        errors = variant.score()
        score_s.append(time.perf_counter() - started)
    loss = float(np.square(variant.reconstruct().astype(np.float64) - variant.x).mean())
    return {
        "rows": rows, "fit_s": fit_s, "scored": len(variant.x), "score_s": float(np.median(score_s)), "loss": loss,
        "mean_score": float(np.asarray(errors, dtype=np.float64).mean()), "peak_mib": peak_mib(),
    }  # fmt: skip


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    name, problem = sys.argv[1], PeerProblem(**json.loads(sys.argv[2]))
    problem = PeerProblem(**{**asdict(problem), "features": tuple(problem.features)})
    variant = VARIANTS[name](problem, problem.data())
    print(json.dumps({"versions": variant.versions(), "baseline_mib": baseline_mib()}), file=answers)
    for line in sys.stdin:
        print(json.dumps(round_of(variant, **json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
