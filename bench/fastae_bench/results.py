"""Measurements and the figures that follow from them; as JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastae_bench.cases import BenchCase
from fastae_bench.rounds import Times
from fastae_bench.spread import Spread, growth, ratio, spread
from fastae_bench.variants import FASTAE, MATMUL_ONLY

FORMAT = 1  # of the JSON file
# Well-tuned PyTorch baselines
STRONG_BASELINES = ("tuned", "compiled", "reduce-overhead", "max-autotune", "graphed")


@dataclass(frozen=True)
class Measured:
    """A case and its times."""

    level: str
    what: str
    network: str
    features: list[int]
    batch: int
    precision: str
    key: str
    rows: int  # that one call takes through the network
    flops: int | None
    moved: int | None  # bytes
    seconds: dict[str, dict[str, list[float]]]  # clock -> variant -> rounds
    refused: dict[str, str]
    missing: dict[str, str]

    @classmethod
    def of(cls, case: BenchCase, times: Times) -> Measured:
        size, cost = case.size, case.cost
        return cls(
            case.level, case.what, size.network, list(size.features), size.batch, case.precision, case.key, case.rows,
            cost and cost.flops, cost and cost.moved, times.seconds, times.refused, times.missing,
        )  # fmt: skip

    def add(self, times: Times) -> None:
        """The rounds of a later sitting; a variant without them has no figures any more."""
        self.refused.update(times.refused)
        self.missing.update(times.missing)
        for clock, variants in self.seconds.items():
            for variant in list(variants):
                if variant in times.seconds[clock]:
                    variants[variant] += times.seconds[clock][variant]
                else:
                    del variants[variant]

    @property
    def label(self) -> str:
        return "-".join(map(str, self.features))

    @property
    def took(self) -> dict[str, list[float]]:
        """By the first clock: the one that ratios are made of."""
        return next(iter(self.seconds.values()))

    @property
    def ours(self) -> Spread:
        """Seconds per call."""
        return spread(self.took[FASTAE])

    @property
    def ratios(self) -> dict[str, Spread]:
        """Their time over ours, by variant; none for a variant whose results differ from ours."""
        return {
            name: ratio(times, self.took[FASTAE])
            for name, times in self.took.items()
            if name not in (FASTAE, MATMUL_ONLY) and name not in self.refused
        }

    @property
    def against_best(self) -> tuple[float, str] | None:
        """(ratio, variant) of the best that PyTorch can do here; the idiom counts only where it is all there is."""
        ratios = self.ratios
        best = [(ratios[name].median, name) for name in STRONG_BASELINES if name in ratios]
        return min(best, default=None)

    @property
    def products(self) -> float | None:
        """The share of our time that the bare matrix products take."""
        return ratio(self.took[MATMUL_ONLY], self.took[FASTAE]).median if MATMUL_ONLY in self.took else None

    def variant_seconds(self, variant: str) -> float:
        """The median of a variant, per call."""
        return spread(self.took[variant]).median

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.ours.median if self.flops else None


@dataclass(frozen=True)
class Curve:
    """Seconds per call and peak MiB of a variant along an axis; `peak_mib` is empty where it cannot be measured."""

    axis: str
    what: str
    side: str  # the variant's name; the key of reports on disk
    x: list[int]
    seconds: list[list[float]]  # rounds of every point
    peak_mib: list[float]

    @property
    def medians(self) -> list[float]:
        return [spread(rounds).median for rounds in self.seconds]

    def exponents(self) -> dict[str, str]:
        """Of time and memory, as text with the standard error."""
        figures = {"time": self.medians, "peak memory": self.peak_mib}
        return {name: _exponent(self.x, y) if len(y) >= 3 and min(y) > 0 else "-" for name, y in figures.items()}


def _exponent(x: Sequence[int], y: Sequence[float]) -> str:
    exponent, error = growth(x, y)
    return f"{round(exponent, 2) + 0.0:.2f} ± {error:.2f}"  # + 0.0: no -0.00


@dataclass
class Results:
    """A run of the benchmark."""

    machine: dict[str, str]
    options: dict[str, Any]
    flops_per_s: dict[str, float]  # the peak, by precision
    bytes_per_s: float
    measured: list[Measured] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    seconds: float = 0.0  # of the whole run

    @property
    def refused(self) -> list[tuple[str, str, str]]:
        """(case, variant, how its results differ)."""
        return [(m.key, variant, why) for m in self.measured for variant, why in m.refused.items()]

    def peak_share(self, m: Measured) -> float | None:
        """The share of the machine's own rate of products at this precision."""
        rate, peak = m.flops_per_s, self.flops_per_s.get(m.precision)
        return rate / peak if rate and peak else None

    def copy_share(self, m: Measured) -> float | None:
        """The bytes that have to be moved, per second, as a share of the copy's; above 1 where caches serve them."""
        return m.moved / m.ours.median / self.bytes_per_s if m.moved else None

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_results(path: Path) -> Results:
    """Raises ValueError for a file that `fastae bench` did not write."""
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        parts: Mapping[str, Any] = {
            "measured": [Measured(**m) for m in document.pop("measured")],
            "curves": [Curve(**c) for c in document.pop("curves")],
        }
        return Results(**document, **parts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the bench.json of a fastae bench --report; got something else ({error})"
        ) from None
