"""The statistics of the benchmarks, against numbers worked out by hand."""

import math
import random

import pytest
from fastae_bench.spread import growth, ratio, spread


def test_median_and_tenths() -> None:
    assert spread([3.0, 1.0, 2.0]) == pytest.approx((1.2, 2.0, 2.8))
    assert spread([float(i) for i in range(11)]) == pytest.approx((1.0, 5.0, 9.0))
    assert spread([4.0]) == (4.0, 4.0, 4.0)


def test_one_bad_round_does_not_move_the_median() -> None:
    assert spread([1.0] * 14 + [1000.0]).median == 1.0


def test_no_rounds() -> None:
    with pytest.raises(ValueError, match="values must hold one number or more; got none"):
        spread([])


def test_ratios_are_made_round_by_round() -> None:
    """The machine is ten times slower in half of the rounds: the ratio does not notice, a ratio of medians would."""
    ours = [1.0, 10.0, 1.0, 10.0, 1.0]
    theirs = [2.0, 20.0, 2.0, 20.0, 20.0]
    assert ratio(theirs, ours).median == 2.0
    assert spread(theirs).median / spread(ours).median == 20.0


def test_a_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.0, 2.5])
def test_the_exponent_of_a_power_law_is_found_exactly(exponent: float) -> None:
    x = [1, 3, 10, 100, 777]
    found = growth(x, [5 * v**exponent for v in x])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-7)


def test_the_standard_error_is_that_of_the_slope() -> None:
    """Over many draws, the error bars of one standard error hold about two thirds of the slopes (t, 18 degrees)."""
    draw = random.Random(0)
    x = [2**i for i in range(20)]
    held = 0
    for _ in range(400):
        found = growth(x, [v**1.5 * math.exp(draw.gauss(0, 0.3)) for v in x])
        held += abs(found.exponent - 1.5) < found.error
    assert 0.60 < held / 400 < 0.74


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 0, 3])])
def test_growth_needs_three_positive_points(x: list[int], y: list[float]) -> None:
    with pytest.raises(ValueError, match="three or more positive numbers"):
        growth(x, y)
