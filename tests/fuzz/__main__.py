"""`make fuzz MINUTES=20`: the tests of this folder with fresh examples, over and over, until the minutes are over.

Stops at the first failure; the seed and the example that it prints repeat it.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    until = time.monotonic() + 60 * float(sys.argv[1] if len(sys.argv) > 1 else 20)
    rounds = 0
    while True:
        seed = str(secrets.randbelow(2**32))
        command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-x", f"--hypothesis-seed={seed}"]
        environment = os.environ | {"FASTAE_FUZZ": "1", "OMP_NUM_THREADS": "1"}
        code = subprocess.run([*command, "-n", "auto", "--maxprocesses", "8"], env=environment, check=False).returncode
        rounds += 1
        print(f"fuzz: round {rounds}, seed {seed}: {'found something' if code else 'nothing found'}", flush=True)
        if code or time.monotonic() >= until:
            return code


if __name__ == "__main__":
    sys.exit(main())
