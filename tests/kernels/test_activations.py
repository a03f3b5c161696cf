"""The activation pairs: the tables agree, the helpers hold their precision over all of their range."""

import pytest
import torch
import triton
import triton.language as tl
from cases import ACTIVATIONS, DTYPES, EAGER, normal, short, uniform
from fastae_kernels.elementwise import ACTIVATIONS as TABLE
from fastae_kernels.jit import activations
from torch import Tensor

_expm1, _log1p_unit, _sigmoid = activations._expm1, activations._log1p_unit, activations._sigmoid


@triton.jit
def _apply_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, FUNCTION(x), mask=offs < n)


@triton.jit
def _apply_backward_kernel(dy_ptr, s_ptr, dp_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + offs, mask=offs < n, other=0.0)
    s = tl.load(s_ptr + offs, mask=offs < n, other=0.0)
    tl.store(dp_ptr + offs, FUNCTION(dy, s), mask=offs < n)


def apply(function: object, x: Tensor) -> Tensor:
    y = torch.full_like(x, float("nan"))
    _apply_kernel[triton.cdiv(x.numel(), 1024),](x, y, x.numel(), FUNCTION=function, BLOCK=1024)
    return y


def worst(result: Tensor, truth: Tensor) -> float:
    """The largest relative error, in units of eps; where the truth is 0 the result must be."""
    assert (result[truth == 0] == 0).all()
    error = (result.double() - truth).abs() / truth.abs().clamp_min(torch.finfo(torch.float64).tiny)
    return error[truth != 0].max().item() / torch.finfo(result.dtype).eps


def powers(dtype: torch.dtype, low: int, high: int) -> Tensor:
    """Numbers evenly spread over the exponents 2^low .. 2^high."""
    return (
        (torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (high - low) + low)
        .exp2()
        .to(dtype)
    )


def test_tables_have_the_same_names() -> None:
    assert list(activations.PAIRS) == list(TABLE) == list(EAGER)
    for name, (forward, backward) in activations.PAIRS.items():
        assert (forward.__name__, backward.__name__) == (f"{name}_fwd", f"{name}_bwd")
    assert {a.saves for a in TABLE.values()} == {"y", "p", None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_expm1(dtype: torch.dtype) -> None:
    """exp is good to 2 eps, in numpy and in CUDA; where the series ends, at 0.35, that is 2 * 1.42 / 0.42 = 6.8 eps."""
    tiny = powers(dtype, -60 if dtype == torch.float32 else -300, 6)
    near = torch.linspace(-0.7, 0.7, 3001, dtype=dtype)
    far = torch.linspace(-120, 80, 2001, dtype=dtype)
    for x in (-tiny, tiny.clamp_max(80), near, far, torch.tensor([0.35, -0.35, 0.0], dtype=dtype)):
        assert worst(apply(_expm1, x), torch.expm1(x.double())) <= 6.8
    ends = apply(_expm1, torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype))
    torch.testing.assert_close(ends, torch.tensor([float("inf"), -1, float("nan")], dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_log1p_unit(dtype: torch.dtype) -> None:
    tiny = powers(dtype, -100 if dtype == torch.float32 else -900, 0).clamp_max(1)
    for u in (tiny, torch.linspace(0, 1, 3001, dtype=dtype)):
        assert worst(apply(_log1p_unit, u), torch.log1p(u.double())) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_sigmoid(dtype: torch.dtype) -> None:
    """exp of a large argument carries the argument's own rounding, so a few eps at any size."""
    x = torch.linspace(-80, 80, 5001, dtype=dtype)
    assert worst(apply(_sigmoid, x), torch.sigmoid(x.double())) <= 4


@pytest.mark.parametrize("name", ["tanh", "softplus", "elu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_forward_keeps_relative_precision(name: str, dtype: torch.dtype) -> None:
    """Near 0 and in the tails alike: an absolute error would hide there behind larger numbers."""
    size = powers(dtype, -60, 6)
    for x in (size, -size):
        assert worst(apply(activations.PAIRS[name][0], x), EAGER[name](x.double())) <= 8


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_hold_out_to_the_tails(name: str) -> None:
    """Error of f' in fp32 against fp64 autograd over p in [-15, 15] (logit: inside (0, 1)), absolute where f' < 1.

    Not in fp64: PyTorch's own derivative of gelu_tanh is off by 20 eps there, so there is no truth to hold it to.
    """
    dtype = torch.float32
    p = torch.linspace(-15, 15, 4002, dtype=dtype)
    if name == "logit":
        p = torch.linspace(1e-3, 1 - 1e-3, 4001, dtype=dtype)
    wide = p.double().requires_grad_()
    (truth,) = torch.autograd.grad(EAGER[name](wide).sum(), wide)
    saved = EAGER[name](p.double()).to(dtype) if TABLE[name].saves == "y" else p
    result, one = torch.full_like(p, float("nan")), torch.ones_like(p)
    function = activations.PAIRS[name][1]
    _apply_backward_kernel[triton.cdiv(p.numel(), 1024),](one, saved, result, p.numel(), FUNCTION=function, BLOCK=1024)
    error = ((result.double() - truth).abs() / truth.abs().clamp_min(1)).max().item()
    assert error <= 8 * torch.finfo(dtype).eps


# ---------------------------------------------------------------- the twins


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_pytorch_keeps(name: str) -> None:
    """`eager_saves`, which decides where PyTorch's own ops are as lean: beside x and w, the output or p."""
    x, w, kept = normal(5, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_(), set[int]()
    p = torch.nn.functional.linear(x, w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.add(t.data_ptr()), t)[1], lambda t: t):
        y = EAGER[name](p)
    pointers = {p.data_ptr(): "p", y.data_ptr(): "y"}
    assert {pointers[pointer] for pointer in kept} == ({TABLE[name].eager_saves} - {None})


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_twins_differentiable_and_in_place_are_one_function(name: str, dtype: torch.dtype) -> None:
    p = uniform(40, 30, low=-0.2, high=1.2, dtype=dtype) if name == "logit" else 5 * normal(40, 30, dtype=dtype)
    dy = normal(40, 30, dtype=dtype, seed=1)
    activation = TABLE[name]
    leaf = p.clone().requires_grad_()
    wanted = activation.differentiable(leaf)
    assert wanted.dtype == dtype
    apart, in_place = torch.full_like(p, float("nan")), p.clone()
    activation.forward(p, apart)
    activation.forward(in_place, in_place)
    assert torch.equal(apart, wanted.detach())
    assert torch.equal(in_place, apart)

    saved = {"y": apart, "p": p, None: dy}[activation.saves]
    apart, in_place, kept = torch.full_like(p, float("nan")), dy.clone(), saved.clone()
    activation.backward(dy, saved, apart)
    activation.backward(in_place, saved, in_place)
    assert torch.equal(in_place, apart)
    assert torch.equal(saved, kept)
    (grad,) = torch.autograd.grad(wanted, leaf, dy)
    eps = torch.finfo(dtype).eps  # written from a rounded y here and from p there
    torch.testing.assert_close(apart, grad, rtol=8 * eps, atol=8 * eps)
