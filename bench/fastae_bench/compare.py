"""`--compare`: what got slower since an older report, beyond the noise of both."""

from __future__ import annotations

from dataclasses import dataclass

from fastae_bench.results import Measured, Results
from fastae_bench.spread import spread
from fastae_bench.variants import FASTAE

# Two runs of the same code differ by more than rounds in a row show: memory lies elsewhere, the machine has other
# neighbours. With the rounds in three sittings, any two of five whole runs on a machine with two cores had at
# most 2 of 261 ratios outside each other's ranges, and no case of 89 slower or faster by the rule below.
LEAST_CHANGE = 1.10
FEWEST_ROUNDS = 5  # of quantiles that mean something


@dataclass(frozen=True)
class Change:
    """A case in two reports: new time over old, and old ratio over new; above 1 is slower."""

    key: str
    time: float | None  # None between machines
    relative: float | None  # to the baseline in the same rounds; None without one
    slower: bool
    faster: bool


def compare(old: Results, new: Results) -> tuple[list[Change], list[str]]:
    """(changes of the cases in both, cases in only one).

    A case is slower if our time is longer beyond the noise, and so is our time relative to the first baseline of both
    reports, which took turns with us: a busy machine lengthens the one and not the other. Between two machines the
    relative time decides alone, without a baseline the time; between two machines and without one, nothing. Beyond the
    noise: the ranges from the 10 to the 90 % quantile do not overlap, the medians are 10 % apart, and both have five
    rounds.
    """
    before = {m.key: m for m in old.measured}
    after = {m.key: m for m in new.measured}
    same_machine = old.machine["machine"] == new.machine["machine"]
    changes = [_change(before[key], after[key], same_machine) for key in after if key in before]
    return changes, sorted(before.keys() ^ after.keys())


def _change(old: Measured, new: Measured, same_machine: bool) -> Change:
    tests = []
    time = relative = None
    if same_machine:
        time = new.ours.median / old.ours.median
        tests.append((old.took[FASTAE], new.took[FASTAE]))
    shared = next((name for name in ("tuned", "compiled", "idiom") if name in old.ratios and name in new.ratios), None)
    if shared is not None:
        relative = old.ratios[shared].median / new.ratios[shared].median
        tests.append((_relative_times(old, shared), _relative_times(new, shared)))
    slower = bool(tests) and all(_beyond_noise(a, b) for a, b in tests)
    faster = bool(tests) and all(_beyond_noise(b, a) for a, b in tests)
    return Change(new.key, time, relative, slower, faster)


def _relative_times(m: Measured, baseline: str) -> list[float]:
    return [a / b for a, b in zip(m.took[FASTAE], m.took[baseline], strict=True)]


def _beyond_noise(before: list[float], after: list[float]) -> bool:
    """Whether `after` is longer."""
    old, new = spread(before), spread(after)
    enough = min(len(before), len(after)) >= FEWEST_ROUNDS
    return enough and new.low > old.high and new.median > LEAST_CHANGE * old.median


def print_changes(changes: list[Change], left_out: list[str]) -> None:
    slower, faster = [c for c in changes if c.slower], [c for c in changes if c.faster]
    for title, listed in (("slower", slower), ("faster", faster)):
        for change in listed:
            time = "" if change.time is None else f"  time x {change.time:.2f}"
            relative = "" if change.relative is None else f"  relative to the baseline x {change.relative:.2f}"
            print(f"{title}: {change.key}{time}{relative}")
    if left_out:
        print(f"not compared, in one of the two only: {len(left_out)} cases, {left_out[0]} for one")
    print(f"{len(changes)} cases compared: {len(slower)} slower beyond noise, {len(faster)} faster")
