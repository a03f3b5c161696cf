"""The variants of a case take turns; what they compute is compared before anything is timed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from fastae_bench.clocks import Clock
from fastae_bench.variants import FASTAE, Variant, difference


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    The rounds of a case are measured in several sittings, minutes apart, each of which makes the variants anew: where a
    process's memory lies and how near the cores of a virtual machine are to each other stay as they are for a while,
    so rounds in a row agree with each other better than with those of the next run.
    """

    rounds: int = 12
    fewest: int = 5  # rounds of a slow case
    slice_s: float = 0.03  # a variant's turn lasts at least this long, or one call
    limit_s: float = 6.0  # of a case: slow cases get fewer rounds, but `fewest`
    processes: int = 5  # of each variant, for start-up, which has one sitting: each round is a new process
    points: int = 5  # of each curve of growth
    sittings: int = 3
    compile: bool = True
    compile_cold: bool = True  # in start-up, where nothing is in a cache yet

    def of_a_sitting(self) -> Budget:
        """Its share of a case; a slow case is done after two."""
        parts = self.sittings
        return replace(
            self, sittings=1, rounds=math.ceil(self.rounds / parts), fewest=math.ceil(self.fewest / min(parts, 2)),
            limit_s=self.limit_s / parts,
        )  # fmt: skip

    def is_enough(self, took: Mapping[str, list[float]]) -> bool:
        """Whether a case has had its time; took: variant -> seconds of a call, which is all of a slow case's turn."""
        return min(map(len, took.values())) >= self.fewest and sum(map(sum, took.values())) >= self.limit_s


FULL = Budget()
QUICK = Budget(
    rounds=8, fewest=3, slice_s=0.02, limit_s=2.0, processes=1, points=3, sittings=2, compile_cold=False
)  # fmt: skip


@dataclass
class Times:
    """Seconds per call of each variant in each round, by clock; and why a variant has none."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # clock -> variant -> rounds
    refused: dict[str, str] = field(default_factory=dict)  # variant -> how its results differ from ours
    missing: dict[str, str] = field(default_factory=dict)  # variant -> why it does not run here


# What torch.compile raises where it cannot work: no C++ compiler, no Python headers, an unsupported version.
OPTIONAL_VARIANTS = ("compiled", "reduce-overhead", "max-autotune")


def measure(
    names: Sequence[str],
    make: Callable[[str], Variant],
    tolerance: float,
    clocks: Mapping[str, Clock],
    budget: Budget,
) -> Times:
    """Make the variants, compare the results of each with ours, and time those that agree."""
    times, variants = Times(), list[Variant]()
    ours: Mapping[str, Tensor] = {}
    for name in names:
        try:
            variant = make(name)
            results = variant.results() if variant.results else None
        except Exception as error:
            if name not in OPTIONAL_VARIANTS:
                raise
            times.missing[name] = why_missing(error)
            continue
        if name == FASTAE:
            assert results is not None
            ours = results
        elif results is not None and (differs := difference(ours, results, tolerance)):
            times.refused[name] = differs
            continue
        variants.append(variant)
    for name, clock in clocks.items():
        times.seconds[name] = take_turns(variants, clock, budget)
    return times


def why_missing(error: Exception) -> str:
    """The beginning of an error that keeps an optional variant from running."""
    return " ".join([f"{type(error).__name__}:", *str(error).split()])[:200]


def take_turns(variants: Sequence[Variant], clock: Clock, budget: Budget) -> dict[str, list[float]]:
    """Seconds per call of each variant in each round. Every round begins with another variant."""
    with no_garbage_collection():
        calls = [enough_calls(variant, clock, budget.slice_s) for variant in variants]
        took = {variant.name: list[float]() for variant in variants}
        rounds = budget.rounds
        done = 0
        while done < rounds:
            turn = 0.0
            for index in range(len(variants)):
                which = (done + index) % len(variants)
                seconds = clock(variants[which].run, calls[which])
                took[variants[which].name].append(seconds)
                turn += seconds * calls[which]
            done += 1
            if done == 1:
                rounds = min(budget.rounds, max(budget.fewest, math.floor(budget.limit_s / turn)))
    return took


def enough_calls(variant: Variant, clock: Clock, slice_s: float) -> int:
    """How many calls last a slice. Finding it warms the variant up: a first call counts only where it is long."""
    if clock(variant.run, 1) > 4 * slice_s > 0:
        return 1
    calls = 1
    while True:
        took = clock(variant.run, calls) * calls
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
