"""The statistics of `fastae verify`, here on the twins: what is right is within the limit, what is wrong is not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastae_kernels.reference import TORCH
from torch import Tensor

from fastae.noise import Mask
from fastae.verify import laws, statistics
from fastae.verify.statistics import CHECKS, LIMIT, Drawn

pytestmark = pytest.mark.usefixtures("one_thread")


class Twin:
    """Stands for the compiled kernels; `spoil` changes what an op returns or has written."""

    def __init__(self, spoil: Any = None) -> None:
        self.spoil = spoil

    def __getattr__(self, op: str) -> Any:
        def call(*args: Any) -> Any:
            made = getattr(TORCH, op)(*args)
            return made if self.spoil is None else self.spoil(op, args, made)

        return call


def check(name: str, monkeypatch: pytest.MonkeyPatch, spoil: Any = None, seed: int = 7) -> dict[str, float]:
    monkeypatch.setattr(statistics, "ops", lambda _: Twin(spoil))
    return dict(CHECKS[name][1](Drawn(seed)))


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(name, monkeypatch)
    assert found
    assert all(abs(off) <= LIMIT for off in found.values()), found


def _out(op: str, args: Any) -> Tensor:
    assert op == "gather"
    out: Tensor = args[2]
    return out


def _scaled(op: str, args: Any, made: Any) -> Any:
    _out(op, args).mul_(1.03)
    return made


def _twice(op: str, args: Any, made: Any) -> Any:
    out = _out(op, args)
    out[1::2] = out[::2]
    return made


def _heavier(op: str, args: Any, made: Any) -> Any:
    out = _out(op, args)
    out[:10] = out[:10] * 1.7
    return made


def _again(op: str, args: Any, made: Any) -> Any:
    """The noise of step 3, whatever the step."""
    source, rows, out, corruption, clean = args
    key = corruption.key._replace(state=torch.tensor([int(corruption.key.state[0]), 3, 0]))
    TORCH.gather(source, rows, out, corruption._replace(key=key), clean)


def _first_half(op: str, args: Any, made: Any) -> Any:
    out = _out(op, args)
    own = torch.arange(len(out)).unsqueeze(1).expand_as(out)
    out[out != own] = (out[out != own] / 2).floor()
    return made


def _code(change: Any) -> Any:
    def spoil(op: str, args: Any, made: Any) -> Any:
        z, p, kl, saved = made
        return (*change(z, p, kl), saved)

    return spoil


WRONG = [
    ("gaussian", _scaled, "variance"),
    ("gaussian", _twice, "rows"),
    ("gaussian", _heavier, "fourth moment"),
    ("gaussian", _again, "steps"),
    ("mask", _again, "steps"),
    ("swap", _first_half, "where from"),
    ("drop", _scaled, "mean"),
    ("code", _code(lambda z, p, kl: (p[:, :32] + 0.01 * (z - p[:, :32]), p, kl)), "variance"),  # RecBole's
    ("code", _code(lambda z, p, kl: (z, p, kl * 1.001)), "KL"),
    ("code", _code(lambda z, p, kl: (z, p, 0 * kl)), "KL"),  # PyOD's
]


@pytest.mark.parametrize(("name", "spoil", "law"), WRONG, ids=[f"{name}, {law}" for name, _, law in WRONG])
def test_what_is_wrong(name: str, spoil: Any, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(check(name, monkeypatch, spoil)[law]) > LIMIT


def test_a_model_that_is_not_at_its_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser's matrix for another share of masked values."""
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: solve(a, b) * 1.1)
    found = dict(statistics.denoiser(Mask(0.3), 7))
    assert abs(found["gradient"]) > LIMIT


def test_shares_of_loaded_dice() -> None:
    def loaded() -> Iterator[float]:
        for q in (0.5, 0.52):
            hits = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < q
            yield abs(laws.share("share", hits, 0.5)[1])

    fair, unfair = loaded()
    assert fair < LIMIT < unfair


def test_counts_of_cells_that_are_not_alike() -> None:
    even = torch.multinomial(torch.ones(50), 10_000, True, generator=torch.Generator().manual_seed(0)).bincount()
    weights = torch.ones(50)
    weights[0] = 2.0
    odd = torch.multinomial(weights, 10_000, True, generator=torch.Generator().manual_seed(0)).bincount()
    assert abs(laws.uniform_counts("cells", even)[1]) < LIMIT < laws.uniform_counts("cells", odd)[1]


def test_a_distribution_with_the_right_moments_and_the_wrong_shape() -> None:
    u = torch.rand(400, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.sign(u - 0.5)
    assert abs(dict(laws.normal(signs))["distribution"]) > LIMIT
