"""Cost of ops: the kernels that ATen runs, counted as they are called, and those of Triton, from their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fastae_kernels.splits import split_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "_linear_pointwise")
OVERWRITES = ("copy_", "_foreach_copy_")


@dataclass(frozen=True)
class Kernel:
    """One launch: FLOPs of matrix products, and distinct bytes read and written, each tensor once."""

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype  # of what is multiplied


@dataclass
class OpCounter(TorchDispatchMode):
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


def triton_kernel(op: str, args: Sequence[Any], result: Any) -> tuple[Kernel, list[tuple[Tensor, Tensor]]]:
    """The launch of a Triton op, and the pairs (partial results in fp32 [R, ...], result) it leaves to be summed."""
    x, made, parts = args[0], _tensors(result), list[tuple[Tensor, Tensor]]()
    flops = 0
    if op in ("linear_act_fwd", "linear_dgrad_act", "linear_dgrad_sample"):
        flops = 2 * x.shape[0] * args[1].numel()  # of x [M, K] and w [N, K]
    if op == "linear_sample":
        flops = 2 * x.shape[0] * args[1].w.numel()
    if op == "linear_wgrad":  # of dp [M, N] and x [M, K]
        (M, N), K = x.shape, args[1].shape[1]
        flops, splits = 2 * M * N * K, split_rows(M, N, K)[0]
        if splits > 1 or made[0].shape != (N, K):
            shapes = ((splits, N, K), (splits, N))
            parts = [(x.new_empty(shape, dtype=torch.float32), t) for shape, t in zip(shapes, made, strict=False)]
    elif op in ("linear_act_loss", "decoder_loss"):  # a number for each tile: too few bytes to ask the tile
        flops = 2 * x.shape[0] * args[1].w.numel() * (2 if op == "decoder_loss" else 1)
        parts = [(made[0].new_empty(1), made[0])]
    elif op == "act_bwd":
        parts = [(t.new_empty(1, *t.shape, dtype=torch.float32), t) for t in made[1:]]
    later = {_place(dst): src for src, dst in parts}
    written = {_place(t): later.get(_place(t), t) for t in made}
    read = {_place(t): t for t in _tensors(args) if _place(t) not in written}  # `out` is among the arguments
    moved = sum(distinct_bytes(t) for t in (*read.values(), *written.values()))
    return Kernel(op, flops, moved, x.dtype), parts


def sum_kernel(pairs: Sequence[tuple[Tensor, Tensor]]) -> Kernel:
    """One launch that adds up what others have left."""
    moved = sum(distinct_bytes(t) for pair in pairs for t in pair)
    return Kernel("sum_partials", 0, moved, pairs[0][1].dtype)


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
