"""The peer table, from each library's rounds: medians, ratios round by round, no ratio between unlike results."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from peers.problem import PeerProblem
from peers.variants import VARIANTS

# Relative difference of the final losses from fastae's, in the median over the rounds, above which no ratio is printed.
# Initial weights, epochs and optimizer are the same; the order of the batches alone moves a loss by up to 4 %.
TOLERANCE = 0.05
NONE = "-"
SCORE_TOLERANCE = 0.02  # of the mean score from the loss that its own reconstructions have


NOTES = f"""\
*rows/s*: the rows of all epochs over the seconds of the whole `fit` call, and the rows over those of one call that
gives every row's mean squared error; medians. *faster*: fastae's rows/s over theirs, round by round, the median with
its quartiles; above 1 fastae is faster. *loss*: the mean squared error of the reconstructions of all rows after
training, in fp64, from what the model gives back. No ratio is printed where it is more than {TOLERANCE:.0%} from
fastae's. *peak*: the most memory that was resident, each library in a process of its own; *added*: beyond what it was
with the library imported and the rows loaded. The libraries take turns, a whole `fit` at a time.

The same for all: rows, widths, relu, initial weights, epochs, batch size, shuffling, Adam (1e-3, no weight decay).
Apart from what a row says, each is used as its own manual does. scikit-learn's loss is half a sum over the features,
not their mean; Adam does not see a factor.
"""


@dataclass
class Result:
    """A library's rounds of a problem, as `child.py` answers them."""

    side: str  # the variant's name; the key of reports on disk
    problem: str
    versions: dict[str, str]
    baseline_mib: float  # resident with the library imported and the rows loaded
    rounds: list[dict[str, Any]]

    def median(self, key: str) -> float:
        return statistics.median(r[key] for r in self.rounds)

    def rate(self, rows: str, seconds: str) -> list[float]:
        """Rows/s of each round."""
        return [r[rows] / r[seconds] for r in self.rounds]

    @property
    def training(self) -> list[float]:
        return self.rate("rows", "fit_s")

    @property
    def scoring(self) -> list[float]:
        return self.rate("scored", "score_s")

    @property
    def peak_mib(self) -> float:
        return max(r["peak_mib"] for r in self.rounds)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile) of ours / theirs, round by round."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) == 1:
        return pairs[0], pairs[0], pairs[0]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return low, middle, high


def refused(ours: Result, theirs: Result) -> str | None:
    """Why their results and ours are not the same work, or None."""
    differences = [b["loss"] / a["loss"] - 1 for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
    off = statistics.median(differences)
    if not abs(off) <= TOLERANCE:  # NaN too
        return f"final loss {off:+.0%} from fastae's"
    return None


def refused_score(theirs: Result) -> str | None:
    """Why their scores are not the errors of their reconstructions, or None."""
    off = max(abs(r["mean_score"] / r["loss"] - 1) for r in theirs.rounds)
    return None if off <= SCORE_TOLERANCE else f"scores {off:.0%} from the loss"


def markdown(entries: dict[str, Any]) -> str:
    lines = ["# fastae beside what people train autoencoders with today", ""]
    for entry in entries["problems"].values():
        lines += _section(entry)
    return "\n".join([*lines, NOTES])


def _section(entry: dict[str, Any]) -> list[str]:
    problem = PeerProblem(**{**entry["problem"], "features": tuple(entry["problem"]["features"])})
    results = [Result(**result) for result in entry["results"]]
    ours = results[0]
    lines = [
        f"## {'-'.join(map(str, problem.widths))}, batch {problem.batch}, {problem.precision}",
        "",
        f"{problem.rows:,} rows, {problem.epochs} epochs, {entry['rounds']} rounds. {entry['machine']}, "
        f"load average {entry['load']} at the start. Commit {entry['commit']}, `{entry['command']}`.",
        "",
        "| library | training rows/s | fastae is faster | scoring rows/s | fastae is faster | final loss | peak, MiB "
        "| added |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        version = result.versions[VARIANTS[result.side].packages[0]]
        cells = [f"{result.side} {version}", f"{statistics.median(result.training):,.0f}", NONE,
                 f"{statistics.median(result.scoring):,.0f}", NONE]  # fmt: skip
        why, why_score = refused(ours, result), refused_score(result)
        if result is not ours:
            cells[2] = f"no ratio: {why}" if why else _spread(ours.training, result.training)
            why_score = why or why_score or refused_score(ours)
            cells[4] = f"no ratio: {why_score}" if why_score else _spread(ours.scoring, result.scoring)
        added = result.peak_mib - result.baseline_mib
        lines.append(f"| {' | '.join(cells)} | {result.median('loss'):.5f} | {result.peak_mib:,.0f} | {added:,.0f} |")
        if VARIANTS[result.side].differs:
            notes.append(f"{result.side} differs: {VARIANTS[result.side].differs}.")
    if "note" in entry:
        notes.append(entry["note"])
    versions = {name: version for result in results for name, version in result.versions.items()}
    notes.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return [*lines, "", *notes, ""]


def _spread(ours: list[float], theirs: list[float]) -> str:
    low, middle, high = ratio(ours, theirs)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
