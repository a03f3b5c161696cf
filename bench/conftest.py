"""`pytest bench`: the cases of `fastae bench` for pytest-benchmark, every variant of a case a row of its group.

pytest-benchmark runs one function after the other. Here the variants of a case take turns first
(`fastae_bench.rounds`); then each is given its own measured times, through the timer that pytest-benchmark reads.
"""

from functools import cache

import pytest
import torch
from fastae_bench.cases import BenchCase, all_cases, quick_cases
from fastae_bench.results import Measured
from fastae_bench.rounds import FULL, QUICK
from fastae_bench.variants import FASTAE, MATMUL_ONLY

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every size, more rounds: fifteen minutes instead of two")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "default")  # torch.compile warns of what concerns PyTorch alone


def pytest_generate_tests(metafunc):
    """One test of `turns` for each variant of each case."""
    full = metafunc.config.getoption("full")
    cases = all_cases() if full else quick_cases()
    budget = FULL if full else QUICK
    metafunc.parametrize(
        ("case", "variant"),
        [
            pytest.param(
                case, variant, id=f"{case.key}-{variant}", marks=pytest.mark.benchmark(group=group(case), timer=replay)
            )
            for case in cases
            for variant in case.names(DEVICE, budget)
            if variant != MATMUL_ONLY
        ],
    )


def group(case: BenchCase) -> str:
    """Sorts by network, then batch as a number."""
    return f"{case.what}: {case.size.network} {case.size.label} x {case.size.batch:>5}, {case.precision}"


class Replay:
    """A timer that stands still but for `advance`, which moves it by the next of the measured times."""

    def __init__(self):
        self.now, self.times = 0.0, iter(())

    def __call__(self):
        return self.now

    def advance(self):
        self.now += next(self.times)


replay = Replay()


@cache
def measured(case: BenchCase, full: bool) -> Measured:
    return Measured.of(case, case.measure(DEVICE, FULL if full else QUICK))


@pytest.fixture
def turns(case, variant, request, benchmark):
    """Call it to hand the variant's times to pytest-benchmark; the ratio to ours stands in the JSON's extra_info."""

    def hand_over():
        found = measured(case, request.config.getoption("full"))
        if variant in found.refused:
            pytest.fail(f"no ratio: {variant} computes something else than {FASTAE}: {found.refused[variant]}")
        if variant not in found.took:
            pytest.skip(found.missing.get(variant, f"{variant} has no {case.what}"))
        replay.times = iter(found.took[variant])
        benchmark.extra_info["rows per call"] = found.rows
        if variant in found.ratios:
            benchmark.extra_info["their time / fastae's (10 %, median, 90 %)"] = list(found.ratios[variant])
        benchmark.pedantic(replay.advance, rounds=len(found.took[variant]))

    return hand_over
