"""Three-way accuracy: a result may be at most twice as far from fp64 truth as PyTorch in its dtype, plus a floor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Four units in the last place: where PyTorch happens to be exact (one-term sums, powers of two) an equally good kernel
# still rounds the product, the bias, the activation and the store once each, at most eps / 2 apiece relative to the
# largest value: 2 eps. Twice that for PyTorch's own roundings, as the rule of two has it.
# In fp64 PyTorch is its own truth and so always exact: its error does not show how hard the numbers are. Sums
# of up to 2049 terms in another order differ by some sqrt(2049) eps / 2 = 23 eps on either side, and a derivative from
# a saturated y loses a digit more: 64 eps. It exists for gradient checks, which ask for 1e-5.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
FLOOR[torch.float64] = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Accuracy:
    """Error of a result and its limit: of the two norms, the one that comes closer to its limit."""

    figure: float
    limit: float
    problem: str  # what is wrong; empty if nothing is


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative distance from the truth where that is finite: in the Frobenius norm, and largest over largest."""
    finite = truth.isfinite()
    reference = truth[finite]
    difference = result.double()[finite] - reference
    if not reference.numel():
        return 0.0, 0.0
    norm, largest = reference.norm().item(), reference.abs().max().item()
    if largest == 0:
        return (0.0, 0.0) if not difference.any() else (float("inf"), float("inf"))
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def compare(result: Tensor, same_dtype: Tensor, truth: Tensor, floor: float | None = None) -> Accuracy:
    """Apply the three-way rule (see `check`) and return the figures."""
    for problem in _mismatches(result, same_dtype, truth):
        return Accuracy(float("inf"), 0.0, problem)
    floor = FLOOR[result.dtype] if floor is None else floor
    worst = Accuracy(0.0, floor, "")
    for name, mine, theirs in zip(("Frobenius", "max"), errors(result, truth), errors(same_dtype, truth), strict=True):
        limit = 2 * theirs + floor
        problem = "" if mine <= limit else f"{name} error {mine:.2e}; PyTorch {theirs:.2e}, floor {floor:.2e}"
        if problem or (not worst.problem and mine * worst.limit > worst.figure * limit):
            worst = Accuracy(mine, limit, problem)
        if problem:
            break
    return worst


def _mismatches(result: Tensor, same_dtype: Tensor, truth: Tensor) -> Iterable[str]:
    if truth.dtype != torch.float64:
        yield f"the truth must be float64; got {truth.dtype}"
    if result.dtype != same_dtype.dtype:
        yield f"the result is {result.dtype}, PyTorch's {same_dtype.dtype}"
    if not result.shape == same_dtype.shape == truth.shape:
        yield f"the result is {list(result.shape)}, PyTorch's {list(same_dtype.shape)}, the truth {list(truth.shape)}"
        return
    odd = _odd_places(result) != _odd_places(same_dtype)
    if odd.any():
        where = [int(i) for i in odd.nonzero()[0]]
        yield f"NaN or inf at other places than PyTorch's: {int(odd.sum())} of {odd.numel()}, the first at {where}"


def _odd_places(t: Tensor) -> Tensor:
    """Classify elements: 0 where finite; 1, 2, 3 for NaN, inf, -inf."""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


def check(result: Tensor, same_dtype: Tensor, truth: Tensor, floor: float | None = None) -> None:
    """Check a kernel's result by the three-way rule.

    `same_dtype` is PyTorch's result from the same inputs in their own dtype, `truth` its result in fp64. The
    error of the result, in the Frobenius norm and at its largest, may be at most twice that of `same_dtype` plus a
    floor (four units in the last place; `floor` sets another). NaN and inf must be where PyTorch has them.
    Raises AssertionError.
    """
    problem = compare(result, same_dtype, truth, floor).problem
    if problem:
        raise AssertionError(problem)


def check_all(results: Iterable[Tensor | None], same_dtype: Iterable[Tensor | None], truths: Iterable[Tensor | None],
              floor: float | None = None) -> None:  # fmt: skip
    """Check each of several results; None must be where PyTorch has None."""
    for number, (result, same, truth) in enumerate(zip(results, same_dtype, truths, strict=True)):
        if result is None or same is None or truth is None:
            if result is not same:
                raise AssertionError(f"result {number} is {'missing' if result is None else 'there'}, PyTorch's is not")
            continue
        check(result, same, truth, floor)
