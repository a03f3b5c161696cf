"""Any shapes, strides, dtypes, options, gradients: the functions against PyTorch's in fp64, by the three-way rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, EAGER
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastae
from fastae.likelihoods import MAE, MSE, Huber

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
BACKENDS = st.sampled_from(["auto", "torch", "onednn", "triton"])
SIZES = st.integers(0, 40)
LOSSES = st.sampled_from([MSE(), MAE(), Huber(0.5)])


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, grad: bool | None = None) -> Tensor:
    """A leaf of that shape in awkward memory, whose neighbours are NaN."""
    kind = draw(st.sampled_from(["plain", "transposed", "columns", "rows", "offset", "expanded", "reversed"]))
    seed = draw(st.integers(0, 1000))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if kind == "expanded" and len(shape) > 1 and shape[0] > 1:
        view = values[:1].expand(shape)
    elif kind == "transposed" and len(shape) > 1:
        view = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif kind == "columns":
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 3), float("nan"), dtype=dtype)
        view = wide[..., 1 : 2 * shape[-1] + 1 : 2] if shape[-1] else wide[..., :0]
        view.copy_(values)
    elif kind == "rows":
        tall = torch.full((3 * shape[0] + 1, *shape[1:]), float("nan"), dtype=dtype)
        view = tall[1::3][: shape[0]]
        view.copy_(values)
    elif kind == "offset":
        flat = torch.full((values.numel() + 7,), float("nan"), dtype=dtype)
        view = flat[3 : 3 + values.numel()].view(shape)
        view.copy_(values)
    else:
        view = values
    wants = draw(st.booleans()) if grad is None else grad
    return view.detach().requires_grad_(wants)


def outcome(call: Callable[..., Tensor], leaves: list[Tensor | None]) -> list[Tensor]:
    """The result and all gradients, the upstream one a fixed wave."""
    y = call(*leaves)
    found = [y.detach()]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    if wanted:
        upstream = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).sin().reshape(y.shape).to(y.dtype)
        found += torch.autograd.grad(y, wanted, upstream)
    return found


def check(mine: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: list[Tensor | None]) -> None:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    truth = outcome(theirs, [wide(t) for t in leaves])
    found, usual = outcome(mine, leaves), outcome(theirs, leaves)
    assert len(found) == len(truth)
    for a, b, true in zip(found, usual, truth, strict=True):
        assert a.shape == b.shape
        near(a, b, true, a.dtype)


def near(mine: Tensor, theirs: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 0.0) -> None:
    """The three-way rule for what was computed in `dtype`, with a floor for sums that cancel; fp64 is its own truth but
    for the order of a sum."""
    assert torch.equal(mine.isnan(), truth.isnan())
    if mine.dtype == torch.float64:
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11, equal_nan=True)
    elif not truth.isnan().any():
        errors = [float((t.double() - truth).norm()) for t in (mine, theirs)]
        floor = 16 * torch.finfo(dtype).eps * (float(truth.norm()) + 1) + slack * float(truth.norm())
        assert errors[0] <= 2 * errors[1] + floor, errors


@given(st.data())
def test_linear_act(data: st.DataObject) -> None:
    dtype, activation = data.draw(DTYPES), data.draw(st.sampled_from(ACTIVATIONS))
    lead = [*data.draw(st.lists(st.integers(0, 5), max_size=2)), data.draw(SIZES)]
    k, n = data.draw(SIZES), data.draw(SIZES)
    x = data.draw(tensors((*lead, k), dtype))
    w = data.draw(tensors((n, k), dtype))
    b = data.draw(tensors((n,), dtype)) if data.draw(st.booleans()) else None

    def theirs(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return EAGER[activation](F.linear(x, w, b))

    if activation == "logit":  # its slope is 1e6 at the clamped ends: what is fuzzed there is rounding
        x, w, b = (
            None if t is None else (t.detach().abs().clamp(0.1, 0.9) / size).requires_grad_(t.requires_grad)
            for t, size in ((x, 1), (w, 2 * max(k, 1)), (b, 4))
        )
    with fastae.use_backend(data.draw(BACKENDS)):
        check(lambda *t: fastae.linear_act(*t, activation), theirs, [x, w, b])


@given(st.data())
def test_mse_loss(data: st.DataObject) -> None:
    dtype = data.draw(DTYPES)
    shape = tuple(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    y, t = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    with fastae.use_backend(data.draw(BACKENDS)):
        check(lambda a, b: fastae.mse_loss(a, b, reduction), lambda a, b: F.mse_loss(a, b, reduction=reduction), [y, t])


@given(st.data())
def test_linear_act_loss(data: st.DataObject) -> None:
    dtype = data.draw(DTYPES)
    activation = data.draw(st.sampled_from([a for a in ACTIVATIONS if a != "logit"]))
    loss, reduction = data.draw(LOSSES), data.draw(st.sampled_from(["mean", "sum", "none"]))
    m, k, n = (data.draw(st.integers(1, 40)) for _ in range(3))
    x, w = data.draw(tensors((m, k), dtype)), data.draw(tensors((n, k), dtype))
    b = data.draw(tensors((n,), dtype)) if data.draw(st.booleans()) else None
    target = data.draw(tensors((m, n), dtype, grad=False))
    weight = data.draw(tensors((m,), dtype, grad=False)).abs() if data.draw(st.booleans()) else None

    def theirs(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y, t = EAGER[activation](F.linear(x, w, b)), target.to(x.dtype)
        if y.dtype.itemsize == 2:
            y, t = y.float(), t.float()
        huber = F.huber_loss(y, t, reduction="none", delta=0.5)
        terms = {"mse": (y - t).square(), "mae": (y - t).abs(), "huber": huber}
        errors = terms[loss.name] if weight is None else terms[loss.name] * weight.to(y.dtype)[:, None]
        return {"mean": errors.mean(), "sum": errors.sum(), "none": errors.mean(1)}[reduction]

    with fastae.use_backend(data.draw(BACKENDS)):
        found = outcome(lambda *p: fastae.linear_act_loss(*p, target, activation, loss, reduction, weight), [x, w, b])
    wide = [None if p is None else p.detach().double().requires_grad_(p.requires_grad) for p in (x, w, b)]
    truth, usual = outcome(theirs, wide), outcome(theirs, [x, w, b])
    for a, c, true in zip(found, usual, truth, strict=True):
        # near a kink of the loss or the activation a rounded y has another sign: a few terms of the sum
        smooth = loss.name == "mse" and activation not in ("relu", "leaky_relu", "elu")
        near(a, c, true, dtype, 0.0 if smooth or dtype.itemsize > 2 else 0.2)
