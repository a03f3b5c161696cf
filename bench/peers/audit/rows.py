"""A comparison with a closed form: what was wanted, what was found, and the verdict."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

SPREADS = 4.0  # standard errors that a sampled figure may be off


@dataclass
class Row:
    """One figure of one library.

    error: the standard error of `found` where it was sampled; allowed: how far from `wanted` is right, beyond that
    error. bound: only a figure above `wanted` is off ("at most"). cause: what the library's source says.
    """

    library: str
    quantity: str
    wanted: float
    found: float
    allowed: float
    unit: str = ""
    error: float = 0.0
    relative: bool = False  # the deviation is shown as a share of `wanted`
    bound: bool = False
    meant: bool = False  # that it differs is what the function is for: no verdict
    cause: str = ""

    @property
    def deviation(self) -> float:
        return self.found - self.wanted

    @property
    def verdict(self) -> str:
        return "right" if self.right else "as meant" if self.meant else "off"

    @property
    def right(self) -> bool:
        off = self.deviation if self.bound else abs(self.deviation)
        return off <= self.allowed + SPREADS * self.error  # NaN is off


@dataclass
class Section:
    """Rows of one question, with a line on how they were found and notes below the table."""

    rows: list[Row] = field(default_factory=list)
    how: str = ""
    notes: list[str] = field(default_factory=list)


def named(package: str) -> str:
    """ "pyod 3.6.7", as the tables have it."""
    return f"{package} {version(package)}"


def where(thing: Any, text: str) -> str:
    """ "pyod/models/vae.py:62": the line of the installed source of a function or class that holds the text.

    Raises ValueError if it is not there, so that no page quotes a line of another version.
    """
    lines, first = inspect.getsourcelines(thing)
    for number, line in enumerate(lines, start=max(first, 1)):
        if text in line:
            path = Path(inspect.getsourcefile(thing) or "")
            parts = path.parts
            start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 2
            return f"`{'/'.join(parts[start:])}:{number}`"
    raise ValueError(f"where: {text!r} is not in the source of {thing!r}; the installed version says something else")


def moments(values: Any) -> dict[str, tuple[float, float]]:
    """name -> (figure, standard error) of mean and standard deviation of independent draws."""
    import numpy as np

    x = np.asarray(values, dtype=np.float64).ravel()
    mean, std = float(x.mean()), float(x.std())
    fourth = float(((x - mean) ** 4).mean())
    spread = math.sqrt(max(fourth - std**4, 0.0) / len(x)) / (2 * std) if std else 0.0
    return {"mean": (mean, std / math.sqrt(len(x))), "std": (std, spread)}


Audit = Callable[[], Section]
