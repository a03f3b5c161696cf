"""Losses as parts: they print, compare and hash as they were made, and are spelled in one line."""

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError

import pytest

from fastae.likelihoods import MAE, MSE, PARTS, Gaussian, Huber, Likelihood, NegativeBinomial, parsed, spelled

NAMES = ", ".join(PARTS)
EACH = (
    MSE(), MAE(), Huber(), Huber(0.3), Huber(2.5), Huber(1e-30), Gaussian(), Gaussian(2), Gaussian("learned"),
    Gaussian("per_feature"), NegativeBinomial(), NegativeBinomial(theta=10),
)  # fmt: skip


def test_repr_gives_back_the_constructor_call() -> None:
    assert [repr(part) for part in EACH] == [
        "MSE()", "MAE()", "Huber(delta=1.0)", "Huber(delta=0.3)", "Huber(delta=2.5)", "Huber(delta=1e-30)",
        "Gaussian(scale=1.0)", "Gaussian(scale=2.0)", "Gaussian(scale='learned')", "Gaussian(scale='per_feature')",
        "NegativeBinomial(theta=1.0)", "NegativeBinomial(theta=10.0)",
    ]  # fmt: skip
    for part in EACH:
        assert eval(repr(part), {type(part).__name__: type(part)}) == part


def test_equality_and_hash() -> None:
    assert len(set(EACH)) == len({spelled(part) for part in EACH}) == len(EACH)
    assert MSE() == MSE() != MAE()
    assert Huber() == Huber(1) == Huber(1.0) == Huber(delta=1.0) != Huber(2)
    assert hash(Huber(1)) == hash(Huber(1.0))
    assert {Huber(2): "found"}[Huber(2.0)] == "found"


def test_frozen_copied_and_pickled() -> None:
    for part in EACH:
        assert copy.deepcopy(part) == pickle.loads(pickle.dumps(part)) == part
    with pytest.raises(FrozenInstanceError):
        Huber().delta = 2.0  # type: ignore[misc]
    assert type(Huber(2).delta) is float


@pytest.mark.parametrize("part", EACH, ids=spelled)
def test_spelled_and_parsed(part: Likelihood) -> None:
    assert parsed(spelled(part)) == part
    assert parsed(spelled(part)).setting == part.setting
    assert PARTS[part.name] is type(part)


def test_spelling() -> None:
    assert [spelled(part) for part in EACH[:4]] == ["mse", "mae", "huber", "huber:delta=0.3"]
    assert parsed("huber:delta=2") == Huber(2.0)
    assert parsed("huber:") == parsed("huber:delta=1") == Huber()
    assert [part.setting for part in EACH[:4]] == [0.0, 0.0, 1.0, 0.3]
    assert [spelled(part) for part in EACH[6:]] == [
        "gaussian", "gaussian:scale=2.0", "gaussian:scale=learned", "gaussian:scale=per_feature", "nb", "nb:theta=10.0",
    ]  # fmt: skip
    assert [part.setting for part in EACH[6:]] == [0.0, 2 * math.log(2), 0.0, 0.0, 0.0, 0.0]
    assert parsed("gaussian:scale=1") == Gaussian()
    assert [part.parameter and part.parameter.name for part in EACH[6:]] == [
        None, None, "log_variance", "log_variance", "log_theta", "log_theta",
    ]  # fmt: skip


@pytest.mark.parametrize("delta", [0, 0.0, -1, -0.5, math.inf, -math.inf, math.nan, "1", None, 1j, [1.0]], ids=repr)
def test_delta_must_be_a_positive_number(delta: object) -> None:
    text = f"Huber: delta must be a positive number; got {delta!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Huber(delta)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("hubr", f"likelihood must be one of {NAMES}; got 'hubr'"),
        ("", f"likelihood must be one of {NAMES}; got ''"),
        ("Huber", f"likelihood must be one of {NAMES}; got 'Huber'"),
        ("huber:gamma=1", "likelihood: huber has delta; got 'gamma'"),
        ("huber:delta=1,gamma=2", "likelihood: huber has delta; got 'gamma'"),
        ("mse:delta=1", "likelihood: mse has no options; got 'delta'"),
        ("huber:delta", "likelihood: delta must be a number; got ''"),
        ("huber:delta=one", "likelihood: delta must be a number; got 'one'"),
        ("huber:delta=0", "Huber: delta must be a positive number; got 0.0"),
        ("huber:delta=inf", "Huber: delta must be a positive number; got inf"),
        ("huber:delta=nan", "Huber: delta must be a positive number; got nan"),
    ],
)
def test_what_cannot_be_parsed(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        parsed(text)
