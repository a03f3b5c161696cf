"""Rows that `fit` trains on: checked, on the model's device, with their targets and weights; their split in two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastae.data.arrays import check_all_finite, check_rows, refuse_masked, to_tensor
from fastae.nn.log_likelihood import check_support

Array = NDArray[Any] | Tensor


class Rows(NamedTuple):
    """x [rows, features]; what to reconstruct of it [rows, out_features], x itself if None; a factor of each row's loss
    [rows], 1 if None."""

    x: Tensor
    target: Tensor | None = None
    weight: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """function of each of the three that there is."""
        return Rows(function(self.x), *(None if t is None else function(t) for t in self[1:]))

    def to(self, dtype: torch.dtype) -> Rows:
        """Rows and targets in that dtype; weights stay as they are."""
        return self._replace(x=self.x.to(dtype), target=None if self.target is None else self.target.to(dtype))

    def split(self, most: int) -> list[Rows]:
        """Blocks of at most so many rows, none of no rows."""
        if not len(self.x):
            return []
        parts = [[None] * -(-len(self.x) // most) if t is None else t.split(most) for t in self]
        return [Rows(*block) for block in zip(*parts, strict=True)]


def checked(x: Array, width: int, like: Tensor, name: str, loss: str | None) -> Tensor:
    """x [rows, width] as a tensor like `like`: finite, of at least one row, in the support of the `loss`, if given."""
    check_rows(x, width, name)
    if len(x) == 0:
        raise ValueError(f"{name} must have at least one row; got {list(x.shape)}")
    check_all_finite(x, name)
    data = to_tensor(x, like).detach()
    check_all_finite(data, f"{name} as {str(like.dtype)[6:]}")  # 1e39 is finite in float64 alone
    if loss is not None:
        check_support(loss, data, name)
    return data


def checked_rows(x: Array, target: Array | None, widths: tuple[int, int], like: Tensor, name: str, loss: str) -> Rows:
    """`Rows` without weights, from x [rows, widths[0]] and its target [rows, widths[1]], which `loss` is taken of."""
    rows = checked(x, widths[0], like, name, loss if target is None else None)
    if target is None:
        if widths[0] != widths[1]:
            raise ValueError(f"fit: target must be given for an output that is {widths[1]} wide; got None")
        return Rows(rows)
    of = "fit: target" if name == "fit: x" else f"{name}: target"
    wanted = checked(target, widths[1], like, of, loss)
    if len(wanted) != len(rows):
        raise ValueError(f"{of} must have as many rows as x, {len(rows)}; got {len(wanted)}")
    return Rows(rows, wanted)


def checked_weight(weight: Array, rows: int, like: Tensor) -> Tensor:
    """sample_weight [rows] as a tensor on like's device, fp32 or, for fp64, fp64."""
    name = "fit: sample_weight"
    refuse_masked(weight, name)
    given = torch.as_tensor(weight)
    if given.is_complex() or given.shape != (rows,):
        raise ValueError(f"{name} must be [{rows}] real numbers, one a row; got {list(given.shape)} {given.dtype}")
    made = given.detach().to(like.device, torch.promote_types(like.dtype, torch.float32))
    low, high = (float(end) for end in torch.aminmax(made))
    if not (low >= 0 and high < float("inf")):
        bad = int((~(made >= 0) | made.isinf()).byte().argmax())
        raise ValueError(f"{name} must be 0 or positive numbers; got {made[bad].item()} at row {bad}")
    return made


def scaled(train: Rows, validation: Rows) -> tuple[Rows, Rows]:
    """Both with the weights divided by the mean of the training rows', which has to be above 0."""
    if train.weight is None:
        return train, validation
    mean = train.weight.double().mean()
    if not float(mean) > 0:
        raise ValueError("fit: sample_weight must be above 0 for a training row; all are 0")
    held_out = validation.weight
    if held_out is not None and len(held_out) and not bool(held_out.any()):
        raise ValueError(
            "fit: sample_weight must be above 0 for a validation row; all are 0: validation_data= gives others"
        )
    divided = [None if w is None else (w / mean).to(w.dtype) for w in (train.weight, held_out)]
    return train._replace(weight=divided[0]), validation._replace(weight=divided[1])


def split_rows(rows: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(training rows, validation rows): indices, the second a random `fraction` of them, each in rising order."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fit: validation_split must be at least 0 and below 1; got {fraction}")
    held_out = round(rows * fraction)
    if fraction > 0 and not 0 < held_out < rows:
        raise ValueError(
            f"fit: validation_split must leave rows on both sides; got {fraction} of {rows} rows (0 for no validation)"
        )
    order = torch.randperm(rows, generator=generator) if held_out else torch.arange(rows)
    return order[held_out:].sort().values, order[:held_out].sort().values
