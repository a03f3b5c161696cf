"""Which implementation runs: the torch twins, on a CPU with oneDNN's products, or the Triton kernels.

The choice is the process's, or a block's; each call is decided by its tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from fastae_kernels import onednn
from fastae_kernels.onednn import ONEDNN
from fastae_kernels.ops import Ops
from fastae_kernels.reference import TORCH
from torch import Tensor

from fastae.nn.arguments import nearest

BACKENDS = ("auto", "torch", "onednn", "triton")

# `auto` on a GPU: Triton up to this many in_features, ATen above, where an epilogue saves too little to pay for a GEMM
# slower than cuBLAS (2F / (K BW): under 1.5x at 1024 on an H100 and falling as 1/K). A model, not a measurement.
# fp32 is missing on purpose: without tensor cores the GEMM decides, and cuBLAS is ahead; fp64 exists for gradient
# checks.
AUTO_MAX_FEATURES = {torch.float16: 2048, torch.bfloat16: 2048}
_MOST = max(AUTO_MAX_FEATURES.values())
FUSION_PAYS = f"half precision, at most {_MOST} in_features: what fusion saves outweighs a slower product (a model)"
TOO_WIDE = f"more than {_MOST} in_features: a slower product outweighs what fusion saves (a model)"
LOSS_PAYS = "half precision: the kernel subtracts the target in its accumulator, ATen would multiply in fp32 for that"
NOT_HALF = "not half precision: the product decides, and ATen's is faster (a model)"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}{nearest(name, BACKENDS)}")
    return name


class _Block:
    """A `with use_backend(name)` that is being run."""

    def __init__(self, name: str) -> None:
        self.name = name


_process = _Block(os.environ.get("FASTAE_BACKEND", "auto"))  # its name is checked when it is asked for
_entered: ContextVar[_Block] = ContextVar("fastae.use_backend", default=_process)  # in this thread or task
# What torch.compile sees, which guards globals but knows no ContextVar: the block entered last, in whichever thread
_blocks = [_process]
_traced = _process.name


def _in_force() -> str:
    return _traced if torch.compiler.is_compiling() else _entered.get().name


def get_backend() -> str:
    """The backend in force: "auto", "torch", "onednn" or "triton"; ValueError if FASTAE_BACKEND is none of them."""
    return _checked(_in_force(), "FASTAE_BACKEND")


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process; inside a block of `use_backend`, for what is left of the block.

    "torch" runs the twins in plain PyTorch, "onednn" the twins on oneDNN's matrix products, "triton" the kernels.
    "auto" takes, on a CPU, "onednn" where it is faster (`fastae_kernels.onednn` says where) and "torch" elsewhere; on a
    GPU, Triton or ATen by dtype and width. Calls raise RuntimeError where the backend cannot run; meta tensors go to
    "torch" under each. The environment variable FASTAE_BACKEND sets the choice at import. Raises ValueError for any
    other name.
    """
    _entered.get().name = _checked(name, "set_backend: name")
    _trace()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the duration of a `with` block, in this thread (or task of asyncio) alone.

    A backward pass runs where its forward pass ran. What another thread compiles meanwhile by `torch.compile` takes
    this backend too.
    """
    block = _Block(_checked(name, "use_backend: name"))
    token = _entered.set(block)
    _blocks.append(block)
    _trace()
    try:
        yield
    finally:
        _blocks.remove(block)
        _trace()
        with suppress(ValueError):  # a generator may be closed in another context, which has not entered the block
            _entered.reset(token)


def _trace() -> None:
    global _traced
    _traced = _blocks[-1].name


class DeviceSpec(NamedTuple):
    """All that a decision looks at of a tensor, for a device that is not at hand; a GPU has its Triton driver there."""

    dtype: torch.dtype
    device: torch.device


def leaves_to_torch(x: Tensor) -> bool:
    """Whether a layer on `x` is PyTorch's own ops whatever its size: `auto` on a CPU in another dtype than fp32, whose
    products are oneDNN's either way. Asked first, for it takes a tenth of what `resolve` takes."""
    return x.dtype is not torch.float32 and x.is_cpu and _in_force() == "auto"


def leaves_losses_to_torch(x: Tensor) -> bool:
    """Whether a loss of `x` is PyTorch's own op: on a CPU unless another backend is set."""
    return x.is_cpu and _in_force() in ("auto", "torch")


def resolve(x: Tensor | DeviceSpec, width: int = 0, multiply_adds: int = 0, loss: bool = False) -> str:
    """Choose the backend of a call on `x`: "torch", "onednn" or "triton".

    Under `torch.compile` it is the backend in force, "auto" included: each call of the compiled code decides, as a
    decision made here would hold for this number of rows alone.

    Args:
        x: the input, or its device and dtype.
        width: terms of each sum of the product.
        multiply_adds: of the product.
        loss: whether the loss is taken of the product.
    """
    if torch.compiler.is_compiling():
        return get_backend()
    return decide(x, width, multiply_adds, loss)[0]


def decide(x: Tensor | DeviceSpec, width: int, multiply_adds: int, loss: bool = False) -> tuple[str, str]:
    """Choose the backend as `resolve` does; the reason as well."""
    name = get_backend()
    if name == "torch":
        return "torch", "the backend is set to torch"
    if x.device.type == "meta":
        return "torch", "the meta device holds no numbers"
    if name == "auto":
        if x.device.type == "cpu":
            reason = onednn.unsupported_reason(x.dtype, multiply_adds)
            return ("torch", reason) if reason else ("onednn", onednn.WHY[x.dtype])
        if x.dtype not in AUTO_MAX_FEATURES:
            return "torch", NOT_HALF
        wide = width > AUTO_MAX_FEATURES[x.dtype]
        if wide and not loss:
            return "torch", TOO_WIDE
        reason = _why_not_triton(x)
        return ("torch", reason) if reason else ("triton", LOSS_PAYS if wide else FUSION_PAYS)
    reason = _why_not_triton(x) if name == "triton" else _why_not_onednn(x)
    if reason:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}; or call fastae.set_backend('auto')")
    return name, f"the backend is set to {name}"


@cache
def ops(backend: str) -> Ops:
    """The implementation of every op: PyTorch, oneDNN, the kernels, or for "auto" one that chooses at each call."""
    if backend == "triton":
        return import_module("fastae_kernels.jit.backend").TRITON
    return {"torch": TORCH, "onednn": ONEDNN, "auto": cast(Ops, _Auto())}[backend]


class _Auto:
    """The ops, each on the implementation that `auto` takes for its arguments."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(_chosen, name)


def _chosen(name: str, *args: Any, **options: Any) -> Any:
    first, second = args[0], args[1]
    width, multiply_adds = 0, 0
    if name in ("linear_wgrad", "linear_dgrad_act"):  # dp [M, N], x [M, K] or w [N, K]
        width, multiply_adds = second.shape[1], first.numel() * second.shape[1]
    elif name == "linear_act_fwd":  # x [M, K], w [N, K]
        width, multiply_adds = second.shape[1], first.numel() * second.shape[0]
    elif name == "linear_act_loss":  # x [M, K], (w [N, K], b, activation)
        width, multiply_adds = second.w.shape[1], first.numel() * second.w.shape[0]
    return getattr(ops(resolve(first, width, multiply_adds, name == "linear_act_loss")), name)(*args, **options)


def _why_not_onednn(x: Tensor | DeviceSpec) -> str | None:
    if x.device.type != "cpu":
        return f"oneDNN runs on CPU tensors, this one is on {x.device}; move it there"
    return None if onednn.available() else "this build of PyTorch has no oneDNN (torch.backends.mkldnn)"


def _why_not_triton(x: Tensor | DeviceSpec) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton (Linux)"
    if isinstance(x, DeviceSpec):
        return None if x.device.type == "cuda" else f"Triton needs a GPU, not {x.device}"
    from fastae_kernels.jit.launch import unsupported_reason

    return unsupported_reason(x)
