"""The machine a figure belongs to."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    models = info.read_text().split("model name")[1:2] if info.exists() else []
    named = models[0].splitlines()[0].split(":", 1)[1].strip() if models else ""
    return named or platform.processor() or platform.machine()
