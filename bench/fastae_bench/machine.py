"""Header of a report: the machine, the versions, the commit, how it was called."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastae
from fastae.analysis.machine import processor


def describe(device: torch.device) -> dict[str, str]:
    """Name -> value, all of them text."""
    cores = f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    name = f"{processor()}, {cores}, {torch.get_num_threads()} threads"
    if device.type != "cpu":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    versions = {package: _version(package) for package in ("torch", "triton", "numpy")}
    return {
        "machine": f"{name}, {platform.system()} {platform.release()}",
        "device": device.type,
        "versions": f"fastae {fastae.__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{package} {number}" for package, number in versions.items()),
        "commit": commit(),
        "precision": f"float32 products at {torch.get_float32_matmul_precision()!r} precision, bfloat16 under autocast",
        "backend": fastae.get_backend(),
        "command": shlex.join(["fastae", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of the checkout that fastae runs from, and whether files have changed since; or that there is none."""
    folder = Path(fastae.__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        tracked = _git(folder, "ls-files", "__init__.py")  # an installed package may lie in someone else's checkout
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "..")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
    return f"{head}{' with local changes' if changed else ''}" if tracked else "not a checkout"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
