"""Shared by the parts that compile: their options, and a process for each target."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from fastae_emulator.driver import TARGETS


def options(module: str, about: str | None, targets: tuple[str, ...]) -> argparse.Namespace:
    """The command line of a part; `target` becomes a list."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KERNEL")
    parser.add_argument("--target", default=",".join(targets), help="some of %(default)s, with commas between")
    given = parser.parse_args()
    given.target = given.target.split(",")
    for name in given.target:
        if name not in TARGETS:
            parser.error(f"target must be one of {', '.join(targets)}; got {name!r}")
    given.target = [name for name in given.target if name in targets]
    return given


def one_of(targets: list[str]) -> list[str]:
    """In a quick run of the traffic one target stands for the others."""
    return ["sm_90"] if "sm_90" in targets else targets[:1]


def in_children(module: str, given: argparse.Namespace) -> int:
    """Run the part for each target in a process of its own, as many at a time as there are cores; pass on what they
    write. The exit code of the worst."""
    arguments = ["--seed", str(given.seed), *["--quick"] * given.quick]
    arguments += [] if given.only is None else ["--only", given.only]
    writing = Lock()

    def child(target: str) -> int:
        command = [sys.executable, "-m", module, *arguments, "--target", target]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                with writing:
                    sys.stdout.write(line)
                    sys.stdout.flush()
        return process.returncode

    with ThreadPoolExecutor(max(1, min(len(given.target), os.cpu_count() or 1))) as pool:
        return max(pool.map(child, given.target), key=abs, default=0)
