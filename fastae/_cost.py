"""What ops cost: the kernels that ATen runs, counted as they are called, and those of Triton, from their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "_linear_pointwise")
OVERWRITES = ("copy_", "_foreach_copy_")
SUM = "sum_together"


@dataclass(frozen=True)
class Kernel:
    """One launch: FLOPs of matrix products, and distinct bytes read and written, each tensor once."""

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype  # of what is multiplied


@dataclass
class Counted(TorchDispatchMode):
    """The ops that ATen runs inside, views left out. Works on tensors without memory: nothing need be computed."""

    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        name = schema.name.split("::")[1]
        result = _shaped(func, args) if name == "_linear_pointwise" else func(*args, **kwargs)
        outputs = {argument.name for argument in schema.arguments if argument.is_out}
        unread = name in OVERWRITES or kwargs.get("beta") == 0  # the first argument
        inputs = args[1:] if unread else args
        given = _tensors((inputs, {k: v for k, v in kwargs.items() if k not in outputs}))
        made = _tensors(result) or (_tensors(args[:1]) if schema.is_mutable else [])
        memory = {t.untyped_storage()._cdata for t in given}
        if not made or (all(t.untyped_storage()._cdata in memory for t in made) and not schema.is_mutable):
            return result
        if name.startswith(("empty", "new_empty")):
            return result
        multiplied = [t for t in given if t.dim() == 2]
        flops = 2 * made[0].numel() * multiplied[0].shape[1] if name in PRODUCTS else 0
        moved = sum(distinct_bytes(t) for t in (*given, *made))
        self.kernels.append(Kernel(name, flops, moved, (multiplied or made)[0].dtype))
        return result


def _shaped(func: Any, args: Sequence[Any]) -> Any:
    """oneDNN's product; its form with a second operand has no implementation on tensors without memory."""
    x, w = args[0], args[2 if func._overloadname == "binary" else 1]
    return x.new_empty(len(x), len(w)) if x.is_meta or type(x) is not Tensor else func(*args)


def triton_kernels(op: str, args: Sequence[Any], result: Any) -> list[Kernel]:
    """The launches of a Triton op: its own, and the sums of what its programs leave in fp32."""
    x, made = args[0], _tensors(result)
    dtype, sums, splits = x.dtype, list[Tensor](), 0
    flops = 0 if op == "act_bwd" else 2 * x.shape[0] * args[1].numel()  # of x [M, K] and w [N, K]
    if op == "linear_wgrad":  # of dp [M, N] and x [M, K]
        from fastae_kernels.linear_act import split_rows_of

        flops = 2 * x.numel() * args[1].shape[1]
        splits, _ = split_rows_of(x.shape[0], x.shape[1], args[1].shape[1])
        sums = made if splits > 1 else []
    elif op in ("linear_act_mse", "decoder_mse"):
        sums, flops = made[:1], flops * (2 if op == "decoder_mse" else 1)
    elif op == "act_bwd":
        sums = made[1:]
    read, written = ({_place(t): t for t in tensors} for tensors in (_tensors(args), made))
    moved = sum(distinct_bytes(t) for place, t in read.items() if place not in written)  # `out` is among the arguments
    moved += sum(splits * t.numel() * 4 if splits > 1 else distinct_bytes(t) for t in made)
    own = Kernel(op, flops, moved, dtype)
    # What a loss or a bias gradient is summed from is small: a number for each tile.
    return [own, *(Kernel(SUM, 0, splits * t.numel() * 4 + distinct_bytes(t), t.dtype) for t in sums)]


def _place(t: Tensor) -> tuple[int, int]:
    return t.untyped_storage()._cdata, int(t.storage_offset())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def distinct_bytes(t: Tensor) -> int:
    """Of memory that a tensor covers; an expanded one covers less than it has elements."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.itemsize
