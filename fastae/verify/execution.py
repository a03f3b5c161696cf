"""The execution of `fastae verify`: the PTX that was compiled for each GPU, run on this CPU and held to fp64 truth.

`python -m fastae.verify.execution` writes its findings to standard output. A kernel's error may be at most twice that
of PyTorch in the same dtype, plus a floor; tf32 has the floor of its own ten bits.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastae_emulator.accuracy import FLOOR, Accuracy, compare
from fastae_emulator.driver import on_target
from fastae_emulator.launches import Executor
from fastae_emulator.poison import poisoned
from fastae_kernels.elementwise import ACTIVATIONS, LOSSES
from fastae_kernels.ops import Layer
from torch import Tensor

from fastae.models.dense import DenseAutoencoder
from fastae.verify.cases import OPS, TRAINED, Case, implementation
from fastae.verify.findings import Finding, announce, emit, named
from fastae.verify.inputs import EAGER, Draw
from fastae.verify.models import VERIFY_PRECISIONS, Precision, build, training_step, triton_in
from fastae.verify.workers import in_children, options

TARGETS = ("sm_80", "sm_90", "sm_100")
FLOOR_TF32 = 4 * 2.0**-10
# M, N, K: rows of 16 bytes, which are copied asynchronously, in more than one tile and step; and rows that are not
SHAPES = ((70, 64, 160), (37, 33, 45))
QUICK_ACTIVATIONS = ("relu", "gelu")
# widths and batch; the last has its rows split for the weight gradients
STEPS = (((48, 32, 16), 70), ((37, 20, 9), 33), ((32, 16, 16), 1100))


def cases(target: str, quick: bool, seed: int) -> Iterator[tuple[str, Case]]:
    """(precision, case). bf16 and fp32 with every activation on every target; the other precisions take turns."""
    turn = TARGETS.index(target)
    chosen = QUICK_ACTIVATIONS if quick else tuple(ACTIVATIONS)
    for name, op in OPS.items():
        combinations = [
            tuple(zip(op.options or {}, values, strict=True))
            for values in itertools.product(*(op.options or {}).values())
        ]
        everything = itertools.cycle(combinations)  # the first has all options
        for number, activation in enumerate(chosen if op.activated else ["identity"] * 3):
            if quick and (number + turn) % len(chosen):
                continue
            for place, precision in enumerate(VERIFY_PRECISIONS):
                rare = precision in ("float16", "tf32") or name in ("act_bwd", "loss")
                turns = number + place if name != "stack_encode" else number
                if (rare or name == "stack_encode") and ((quick and rare) or turns % 3 != turn):
                    continue
                shape = SHAPES[(number + place) % 2 if not quick else 0]
                dtype = VERIFY_PRECISIONS[precision].dtype
                yield precision, Case(name, dtype, shape, activation, next(everything), (), seed + number)
        for number, loss in enumerate(k for k in LOSSES if op.lossy and k != "mse"):
            if not quick or (number + turn) % 3 == 0:  # on one of the three targets
                for precision in ("bfloat16", "float32") if not quick else (("bfloat16", "float32")[number % 2],):
                    dtype = VERIFY_PRECISIONS[precision].dtype
                    yield precision, Case(name, dtype, SHAPES[0], "relu", next(everything), (), seed + number, loss)
        for number, (loss, parameter) in enumerate(TRAINED if op.lossy else ()):
            if not quick or (number + turn) % 3 == 0:
                for precision in ("bfloat16", "float32") if not quick else (("bfloat16", "float32")[number % 2],):
                    dtype, options = VERIFY_PRECISIONS[precision].dtype, next(everything)
                    yield precision, Case(
                        name, dtype, SHAPES[0], "identity", options, (), seed + number, loss, parameter
                    )  # fmt: skip
        if not quick and torch.float64 in op.dtypes:
            shape = SHAPES[turn % 2]
            yield "float64", Case(name, torch.float64, shape, "gelu" if op.activated else "identity", combinations[0])


def measure(case: Case, precision: str, target: str) -> Accuracy:
    """Compile and execute a case on poisoned memory; compare with PyTorch in the same dtype and in fp64."""
    launcher, twin = (implementation(backend, case.op) for backend in ("triton", "torch"))
    arguments = case.arguments("cpu")
    tf32 = precision == "tf32" and case.op not in ("act_bwd", "loss")  # which multiply no matrices
    same = twin(*(_operands_tf32(arguments) if tf32 else arguments))
    truth = twin(*[_double(a) for a in arguments])

    def run() -> Any:
        with poisoned() as poison:
            results = launcher(*arguments)
        return results, poison.unwritten()

    floor = FLOOR_TF32 if precision == "tf32" else FLOOR[case.dtype] if OPS[case.op].floor_of_x else None
    return _compared(run, _listed(same), _listed(truth), precision, target, floor)


def _compared(
    run: Callable[[], Any], same: Sequence[Any], truth: Sequence[Any], precision: str, target: str, floor: float | None
) -> Accuracy:
    kind = VERIFY_PRECISIONS.get(precision, Precision(torch.float64))
    try:
        with triton_in(kind), on_target(target, Executor(), machine_code=False):
            results, problem = run()
    except Exception as error:
        return Accuracy(float("inf"), 0.0, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    worst = Accuracy(0.0, 0.0, problem)
    for number, (result, theirs, true) in enumerate(zip(_listed(results), same, truth, strict=True)):
        if result is None or theirs is None or worst.problem:
            if result is not theirs and not worst.problem:
                worst = Accuracy(0.0, 0.0, f"result {number} is there, or PyTorch's is, and not the other")
            continue
        found = compare(result, theirs, true, floor)
        if found.problem:
            worst = Accuracy(found.figure, found.limit, f"result {number}: {found.problem}")
        elif found.figure * worst.limit >= worst.figure * found.limit:
            worst = found
    return worst


def _double(argument: Any) -> Any:
    if isinstance(argument, tuple):  # a Layer, a Criterion
        return type(argument)(*map(_double, argument))
    if isinstance(argument, list):
        return [_double(a) for a in argument]
    return argument.double() if isinstance(argument, Tensor) else argument


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(value)


def _eager(model: DenseAutoencoder, x: Tensor, wide: bool, precision: str) -> list[Tensor]:
    """Loss, every gradient, errors of the rows and code, as a user writes them in PyTorch."""
    linear = _linear_tf32 if precision == "tf32" and not wide else F.linear
    dtype = torch.float64 if wide else x.dtype
    layers = [*model.encoder, *model.decoder]
    parameters = [p.detach().to(dtype).requires_grad_() for p in model.parameters()]
    h = x = x.to(dtype)
    code = h
    for number, layer in enumerate(layers):
        h = EAGER[layer.activation](linear(h, parameters[2 * number], parameters[2 * number + 1]))
        code = h if number == len(model.encoder) - 1 else code
    error = h.to(torch.promote_types(dtype, torch.float32)) - x
    loss = error.square().mean()
    loss.backward()
    grads: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
    return [t.detach() for t in (loss, *grads, error.square().mean(1), code)]


class _ProductTf32(torch.autograd.Function):
    """a bT, both rounded to the ten bits of tf32, and so its gradients: what PyTorch does on a GPU, not on a CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _ten_bits(a) @ _ten_bits(b).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _ten_bits(grad) @ _ten_bits(b), _ten_bits(grad).T @ _ten_bits(a)


def _operands_tf32(arguments: Sequence[Any]) -> list[Any]:
    """The arguments of an op as mma reads what it multiplies, the first two, matrices or lists of them: without the
    low 13 bits (PTX ISA 8.6). A p near the kink of relu then has the same sign on both sides."""

    def read(t: Tensor) -> Tensor:
        return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    def multiplied(a: Any) -> Any:
        if isinstance(a, Layer):
            return a._replace(w=read(a.w))
        return [read(t) for t in a] if isinstance(a, list) else read(a)

    return [*map(multiplied, arguments[:2]), *arguments[2:]]


def _linear_tf32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    product: Tensor = _ProductTf32.apply(x, w)
    return product + b


def _ten_bits(t: Tensor) -> Tensor:
    """To nearest, ties away from 0, as cvt.rna.tf32.f32 (PTX ISA 8.6)."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def step_finding(
    features: tuple[int, ...], batch: int, activation: str, precision: str, target: str, seed: int
) -> Finding:
    """A whole training step, then the scores and codes of the same weights."""
    kind, draw = VERIFY_PRECISIONS[precision], Draw(seed)
    torch.manual_seed(seed)
    model = build(features, kind, activation)
    x = draw.normal(batch, features[0], dtype=kind.dtype)
    same, truth = _eager(model, x, False, precision), _eager(model, x, True, precision)

    def run() -> Any:
        with torch.no_grad():
            score, code = model.score(x), model.encode(x)
        loss = training_step(model, batch)(x)
        return [loss, *[p.grad for p in model.parameters()], score, code], ""

    # An fp32 loss or error of hidden rows that are rounded to x's dtype on their way; PyTorch rounds x̂ as well.
    floor = FLOOR_TF32 if precision == "tf32" else FLOOR[kind.dtype]
    found = _compared(run, same, truth, precision, target, floor)
    widths = "-".join(map(str, features))
    return _finding("training step", precision, f"{widths} x {batch}", activation, target, found, seed)


def _finding(op: str, precision: str, shape: str, activation: str, target: str, found: Accuracy, seed: int) -> Finding:
    detail = f"{found.problem}; again: fastae verify --execute --seed {seed}" if found.problem else ""
    figure, limit = f"{found.figure:.1e}", f"{found.limit:.1e}"
    return Finding("execute", op, precision, shape, activation, target, figure, limit, not found.problem, detail)


def run(target: str, quick: bool, seed: int, only: str | None) -> None:
    """Emit a finding for each case of each op, and for each whole training step."""
    for precision, case in cases(target, quick, seed):
        if named(case.op, only):
            announce(case.op, f"{target}, {precision}, {case.activation}, {case.describe()}")
            found = measure(case, precision, target)
            activation = case.activation if OPS[case.op].activated else ""
            emit(_finding(case.op, precision, case.describe(), activation, target, found, seed))
    if only is not None:
        return
    for number, (features, batch) in enumerate(STEPS[:1] if quick else STEPS):
        for place, precision in enumerate(("bfloat16",) if quick else VERIFY_PRECISIONS):
            activation = ("relu", "gelu", "tanh", "silu")[(number + place) % 4]
            announce("training step", f"{target}, {precision}, {activation}, batch {batch}")
            emit(step_finding(features, batch, activation, precision, target, seed))


def main() -> None:
    given = options("fastae.verify.execution", __doc__, TARGETS)
    if len(given.target) != 1:
        sys.exit(in_children("fastae.verify.execution", given))
    torch.set_num_threads(1)
    run(given.target[0], given.quick, given.seed, given.only)


if __name__ == "__main__":
    main()
