"""Error of the readers for a file that cannot be read."""

from __future__ import annotations

from pathlib import Path


def unreadable(path: Path, requirement: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"{path}: must be {requirement}; got {reason}")
