"""Three-way accuracy: a result may be at most twice as far from fp64 truth as PyTorch in its dtype, plus a floor."""

import torch
from torch import Tensor

# Four units in the last place: where PyTorch happens to be exact (one-term sums, powers of two) an equally good kernel
# still rounds the product, the bias, the activation and the store once each, at most eps / 2 apiece relative to the
# largest value: 2 eps. Twice that for PyTorch's own roundings, as the rule of two has it.
# In fp64 PyTorch is its own truth and so always exact: nothing on the other side tells how hard the numbers are. Sums
# of up to 2049 terms in another order differ by some sqrt(2049) eps / 2 = 23 eps on either side, and a derivative from
# a saturated y loses a digit more: 64 eps. It exists for gradient checks, which ask for 1e-5.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
FLOOR[torch.float64] = 64 * torch.finfo(torch.float64).eps


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


def _odd_places(t: Tensor) -> Tensor:
    """0 where finite; 1, 2, 3 for NaN, inf, -inf."""
    return t.isnan() * 1 + t.isposinf() * 2 + t.isneginf() * 3


def check(result: Tensor, same_dtype: Tensor, truth: Tensor, floor: float | None = None) -> None:
    """Fails unless `result` is as near `truth` (fp64) as the rule asks, with NaN and inf where PyTorch has them."""
    assert truth.dtype == torch.float64
    assert result.dtype == same_dtype.dtype
    assert result.shape == same_dtype.shape == truth.shape
    assert torch.equal(_odd_places(result), _odd_places(same_dtype)), "NaN or inf at other places than PyTorch's"
    floor = FLOOR[result.dtype] if floor is None else floor
    for name, mine, theirs in zip(("Frobenius", "max"), errors(result, truth), errors(same_dtype, truth), strict=True):
        assert mine <= 2 * theirs + floor, f"{name} error {mine:.2e}; PyTorch {theirs:.2e}, floor {floor:.2e}"


def check_all(results: object, same_dtype: object, truths: object) -> None:
    """`check` on each of several; None must stand where PyTorch has None."""
    for result, same, truth in zip(results, same_dtype, truths, strict=True):  # type: ignore[call-overload]
        assert (result is None) == (same is None)
        if result is not None:
            check(result, same, truth)
