"""The sides of a case take turns; what they compute is compared before anything is timed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from fastae_bench.clocks import Clock
from fastae_bench.sides import OURS, Side, difference


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    The rounds of a case are measured in several sittings, minutes apart, each of which makes the sides anew: where a
    process's memory lies and how near the cores of a virtual machine are to each other stay as they are for a while,
    so rounds in a row agree with each other better than with those of the next run.
    """

    rounds: int = 12
    fewest: int = 5  # rounds of a slow case
    slice_s: float = 0.03  # a side's turn lasts at least this long, or one call
    budget_s: float = 6.0  # of a case: slow cases get fewer rounds, but `fewest`
    processes: int = 5  # of each side, for start-up, which has one sitting: each round is a new process
    points: int = 5  # of each curve of growth
    sittings: int = 3
    compile: bool = True
    compile_cold: bool = True  # in start-up, where nothing is in a cache yet

    def of_a_sitting(self) -> Effort:
        """Its share of a case; a slow case is done after two."""
        parts = self.sittings
        return replace(
            self, sittings=1, rounds=math.ceil(self.rounds / parts), fewest=math.ceil(self.fewest / min(parts, 2)),
            budget_s=self.budget_s / parts,
        )  # fmt: skip

    def is_enough(self, took: Mapping[str, list[float]]) -> bool:
        """Whether a case has had its time; took: side -> seconds of a call, which is all of a slow case's turn."""
        return min(map(len, took.values())) >= self.fewest and sum(map(sum, took.values())) >= self.budget_s


FULL = Effort()
QUICK = Effort(
    rounds=8, fewest=3, slice_s=0.02, budget_s=2.0, processes=1, points=3, sittings=2, compile_cold=False
)  # fmt: skip


@dataclass
class Times:
    """Seconds per call of each side in each round, by clock; and why a side has none."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # clock -> side -> rounds
    refused: dict[str, str] = field(default_factory=dict)  # side -> how its results differ from ours
    missing: dict[str, str] = field(default_factory=dict)  # side -> why it does not run here


# What torch.compile raises where it cannot work: no C++ compiler, no Python headers, an unsupported version.
OPTIONAL_SIDES = ("compiled", "reduce-overhead", "max-autotune")


def measure(
    names: Sequence[str],
    make: Callable[[str], Side],
    tolerance: float,
    clocks: Mapping[str, Clock],
    effort: Effort,
) -> Times:
    """Make the sides, compare the results of each with ours, and time those that agree."""
    times, sides = Times(), list[Side]()
    ours: Mapping[str, Tensor] = {}
    for name in names:
        try:
            side = make(name)
            results = side.results() if side.results else None
        except Exception as error:
            if name not in OPTIONAL_SIDES:
                raise
            times.missing[name] = why_missing(error)
            continue
        if name == OURS:
            assert results is not None
            ours = results
        elif results is not None and (differs := difference(ours, results, tolerance)):
            times.refused[name] = differs
            continue
        sides.append(side)
    for name, clock in clocks.items():
        times.seconds[name] = take_turns(sides, clock, effort)
    return times


def why_missing(error: Exception) -> str:
    """The beginning of an error that keeps an optional side from running."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:200]


def take_turns(sides: Sequence[Side], clock: Clock, effort: Effort) -> dict[str, list[float]]:
    """Seconds per call of each side in each round. Every round begins with another side."""
    with no_garbage_collection():
        calls = [enough_calls(side, clock, effort.slice_s) for side in sides]
        took = {side.name: list[float]() for side in sides}
        rounds = effort.rounds
        done = 0
        while done < rounds:
            turn = 0.0
            for index in range(len(sides)):
                which = (done + index) % len(sides)
                seconds = clock(sides[which].run, calls[which])
                took[sides[which].name].append(seconds)
                turn += seconds * calls[which]
            done += 1
            if done == 1:
                rounds = min(effort.rounds, max(effort.fewest, math.floor(effort.budget_s / turn)))
    return took


def enough_calls(side: Side, clock: Clock, slice_s: float) -> int:
    """How many calls last a slice. Finding it warms the side up: a first call counts only where it is long."""
    if clock(side.run, 1) > 4 * slice_s > 0:
        return 1
    calls = 1
    while True:
        took = clock(side.run, calls) * calls
        if took >= slice_s / 2:
            return max(1, round(calls * slice_s / took))
        calls = math.ceil(calls * min(10.0, slice_s / max(took, 1e-7)))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's collector does not run in the middle of a turn."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
