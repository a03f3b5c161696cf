"""`python bench/startup.py`: what `import fastae` adds to `import torch`, with and without Triton installed."""

from __future__ import annotations

import statistics
import subprocess
import sys

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; "
MEASURE = "import time, torch; t = time.perf_counter(); import fastae; print(time.perf_counter() - t)"


def seconds(program: str, rounds: int = 7) -> float:
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)


if __name__ == "__main__":
    print(f"import fastae after import torch: {seconds(MEASURE):.3f} s")
    print(f"the same without Triton:          {seconds(WITHOUT_TRITON + MEASURE):.3f} s")
