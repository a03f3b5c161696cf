"""`fastae bench`: chooses cases, measures them, prints and writes the report, compares with an older one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastae.data.writers import write_atomically
from fastae.nn.arguments import nearest
from fastae_bench.cases import LEVELS, BenchCase, all_cases, cases_at, quick_cases
from fastae_bench.compare import compare, print_changes
from fastae_bench.growth import measure_growth
from fastae_bench.machine import describe
from fastae_bench.peak import measure_peak
from fastae_bench.plots import draw
from fastae_bench.report import growth_table, line, markdown, summary
from fastae_bench.results import Measured, Results, read_results
from fastae_bench.rounds import FULL, QUICK, Budget
from fastae_bench.sizes import BENCH_PRECISIONS, NETWORKS, Size

GROWTH = "growth"
BENCH_PARTS = (*LEVELS, GROWTH)


@dataclass(frozen=True)
class BenchOptions:
    """Options of the command line."""

    quick: bool = False
    only: tuple[str, ...] = ()  # of BENCH_PARTS; all, if empty
    networks: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    features: tuple[int, ...] = ()  # a network of one's own
    batches: tuple[int, ...] = ()
    rounds: int | None = None
    compile: bool = True
    device: str = "cpu"
    sittings: int | None = None

    def __post_init__(self) -> None:
        for option, values, valid in (
            ("--only", self.only, BENCH_PARTS),
            ("--network", self.networks, tuple(NETWORKS)),
            ("--precision", self.precisions, BENCH_PRECISIONS),
        ):
            for value in values:
                if value not in valid:
                    known = ", ".join(valid)
                    raise ValueError(f"{option} must be of {known}; got {value!r}{nearest(value, valid)}")
        if self.features and (len(self.features) < 2 or min(self.features) < 1):
            raise ValueError(f"--features must be two or more positive widths, e.g. 784,256,128; got {self.features}")
        if self.batches and min(self.batches) < 1:
            raise ValueError(f"--batch must be positive; got {min(self.batches)}")
        if self.batches and not self.features:
            raise ValueError("--batch needs --features, the network to measure at that batch")
        if self.features and self.networks:
            raise ValueError("--features is a network of your own; leave out --network")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1; got {self.rounds}")
        if self.sittings is not None and self.sittings < 1:
            raise ValueError(f"--sittings must be at least 1; got {self.sittings}")

    def cases(self) -> list[BenchCase]:
        levels = self.only or LEVELS
        precisions = self.precisions or BENCH_PRECISIONS
        if self.features:
            return cases_at([Size("own", self.features, batch) for batch in self.batches or (256,)], levels, precisions)
        return [
            case
            for case in (quick_cases() if self.quick else all_cases())
            if case.level in levels
            and case.precision in precisions
            and (not self.networks or case.size.network in self.networks)
            and (self.device == "cpu" or case.level != "startup")  # whose programs run on the CPU
        ]

    @property
    def growth(self) -> bool:
        return GROWTH in self.only if self.only else not (self.features or self.networks or self.precisions)

    @property
    def budget(self) -> Budget:
        budget = QUICK if self.quick else FULL
        rounds = self.rounds or budget.rounds
        sittings = min(self.sittings or budget.sittings, rounds)
        return replace(budget, rounds=rounds, sittings=sittings, compile=self.compile)


def bench(options: BenchOptions, report: Path | None = None, old: Path | None = None, new: Path | None = None) -> int:
    """Measure and print; write the report; compare. 0, or 1 if results differed or something got slower."""
    before = None if old is None else read_results(old)
    if new is not None:
        results = read_results(new)
    else:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
        cases = options.cases()
        if before is not None and not (options.only or options.features or options.networks or options.quick):
            known = {m.key for m in before.measured}  # without a choice of its own, what the older report has
            cases = [case for case in all_cases() if case.key in known]
            options = replace(options, only=LEVELS)
        if not cases and not options.growth:
            raise ValueError("--only, --network and --precision leave nothing to measure; leave one of them out")
        results = run(options, cases, print)
        print("\n" + summary(results))
        if report is not None:
            print(write_report(results, report))
    code = 1 if results.refused else 0
    if before is not None:
        changes, left_out = compare(before, results)
        if not changes:
            raise ValueError(f"{old} has no case that was measured now; nothing to compare")
        print_changes(changes, left_out)
        code = 1 if any(change.slower for change in changes) else code
    return code


def run(options: BenchOptions, cases: Sequence[BenchCase], say: Callable[[str], object]) -> Results:
    """Measure the cases, one line of text for each and every sitting."""
    started = time.monotonic()
    device = _device(options.device)
    machine = describe(device)
    for name in ("machine", "versions", "commit", "precision"):
        say(f"{name}: {machine[name]}")
    say("time of one call (10-90 % of rounds), then their time over ours: above 1, fastae is faster\n")
    used = tuple(dict.fromkeys(case.precision for case in cases)) or BENCH_PRECISIONS[:1]
    peak = measure_peak(device, used)
    results = Results(machine, _as_json(options), peak.flops_per_s, peak.bytes_per_s)
    budget = options.budget
    for case in cases:
        results.measured.append(Measured.of(case, case.measure(device, budget.of_a_sitting())))
        say(line(results.measured[-1]))
    unfinished = list(zip(cases, results.measured, strict=True))
    for sitting in range(2, budget.sittings + 1):
        unfinished = [(case, m) for case, m in unfinished if case.level != "startup" and not budget.is_enough(m.took)]
        if unfinished:
            say(f"\nsitting {sitting} of {budget.sittings}, with the rounds before it:")
        for case, measured in unfinished:
            measured.add(case.measure(device, budget.of_a_sitting()))
            say(line(measured))
    if options.growth:
        results.curves.extend(measure_growth(device, budget.of_a_sitting()))
        say("\n" + growth_table(results))
    results.seconds = time.monotonic() - started
    return results


def write_report(results: Results, folder: Path) -> str:
    """bench.md, bench.json and the plots; a line that says what was written."""
    plots, without = dict[str, bytes](), ""
    try:
        plots = draw(results)
    except ImportError as error:
        without = f"; no plots: {error}"
    text = markdown(results, list(plots)) + ("\nNo plots: matplotlib was not installed.\n" if without else "")
    files = {"bench.md": text.encode(), "bench.json": results.to_json().encode(), **plots}
    write_atomically({folder / name: data for name, data in files.items()})
    return f"left in {folder}: {', '.join(files)}{without}"


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU and a PyTorch built for it: torch.cuda.is_available() is false")
    return torch.device(name)


def _as_json(options: BenchOptions) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(options).items()}
