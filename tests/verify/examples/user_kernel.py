"""A kernel of your own, verified without a GPU: run with `pytest tests/verify/examples/user_kernel.py --noconftest`."""

import pytest
import torch
import triton
import triton.language as tl

from fastae.verify import Executor, check, on_target, poisoned


@triton.jit
def _softplus_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    y = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < N)


def softplus(x):
    y = torch.empty_like(x)
    _softplus_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), BLOCK=256)
    return y


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softplus(target, dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    with poisoned(complete=True), on_target(target, Executor()):
        y = softplus(x)
    check(y, torch.nn.functional.softplus(x), torch.nn.functional.softplus(x.double()))
