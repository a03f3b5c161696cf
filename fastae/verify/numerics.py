"""The numerics of `fastae verify`: every launcher against fp64 truth and PyTorch, in the interpreter or on a GPU.

`python -m fastae.verify.numerics` under TRITON_INTERPRET=1 writes its findings to standard output.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fastae_emulator.accuracy import FLOOR, Accuracy, compare
from fastae_emulator.poison import poisoned
from torch import Tensor

from fastae.verify import source
from fastae.verify.cases import OPS, Case, drawn, grid, implementation
from fastae.verify.findings import Finding, announce, emit, named

FRESH = {True: 6, False: 60}  # cases drawn for each op, quick or not
REPEATS = 3


def _map(function: Callable[[Tensor], Tensor], argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, tuple):  # a Layer, a Criterion
        return type(argument)(*(_map(function, a) for a in argument))
    return [_map(function, a) for a in argument] if isinstance(argument, list) else argument


def _tensors(value: Any) -> list[Tensor | None]:
    return [value] if isinstance(value, Tensor) else list(value)


def measure(case: Case, device: str = "cpu") -> Accuracy:
    """Run a case on poisoned memory and compare it with its twin, in the same dtype and in fp64."""
    launcher, twin = (implementation(backend, case.op) for backend in ("triton", "torch"))
    arguments = case.arguments(device)
    before = [_map(torch.clone, a) for a in arguments]
    same = _tensors(twin(*arguments))
    truth = _tensors(twin(*[_map(Tensor.double, a) for a in arguments]))
    try:
        with poisoned() as poison:
            results = _tensors(launcher(*arguments))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Accuracy(float("inf"), 0.0, f"{type(error).__name__}: {lines[-1] if lines else 'no message'}")
    worst = Accuracy(0.0, float("inf"), poison.unwritten() or _changed(before, arguments))
    # An fp32 result of rows that are rounded to the dtype of x on their way has the floor of that
    floor = FLOOR[case.dtype] if OPS[case.op].floor_of_x else None
    for number, (result, theirs, true) in enumerate(zip(results, same, truth, strict=True)):
        if worst.problem:
            break
        if result is None or theirs is None or true is None:
            missing = "" if result is theirs else "there, or PyTorch's is, and not the other"
            found = Accuracy(0.0, float("inf"), missing)
        else:
            found = compare(result, theirs, true, floor)
        if found.problem:
            worst = Accuracy(found.figure, found.limit, f"result {number}: {found.problem}")
        elif found.figure * worst.limit > worst.figure * found.limit or worst.limit == float("inf"):
            worst = found
    return worst


def _changed(before: Sequence[Any], after: Sequence[Any]) -> str:
    """Whether a launcher wrote to its arguments."""
    for number, pair in enumerate(zip(before, after, strict=True)):
        old, new = ([t for t in _flat(side) if isinstance(t, Tensor)] for side in pair)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(old, new, strict=True)):
            return f"argument {number} was changed"
    return ""


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _bits(t: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and 0 is not -0."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


def _cases(name: str, quick: bool, seed: int) -> Iterator[Case]:
    yield from grid(name, quick)
    yield from drawn(name, seed, FRESH[quick])


def _finding(case: Case, target: str, figure: str, limit: str, problem: str, again: str) -> Finding:
    detail = f"{problem}; again: fastae verify --numerics {again} --only {case.op}" if problem else ""
    dtype = str(case.dtype).removeprefix("torch.")
    activation = case.activation if OPS[case.op].activated else ""
    return Finding("numerics", case.op, dtype, case.describe(), activation, target, figure, limit, not problem, detail)


def run(quick: bool, seed: int, only: str | None = None, device: str = "cpu") -> None:
    """Emit a finding for each case of each op, and for each kernel that is linted."""
    source.run(only)
    target = "interpreter" if device == "cpu" else device
    again = f"{'--quick ' * quick}--seed {seed}" + ("" if device == "cpu" else f" --device {device}")
    for name in (name for name in OPS if named(name, only)):
        captured: set[torch.dtype] = set()
        for case in _cases(name, quick, seed):
            if device != "cpu" and any("far apart" in view for _, view in case.views):
                continue  # the interpreter shows it, in 8 GiB of addresses that here would be memory
            announce(name, f"{case.dtype}, {case.activation}, {case.describe()}")
            found = measure(case, device)
            limit = found.limit if found.limit < float("inf") else 0.0
            emit(_finding(case, target, f"{found.figure:.1e}", f"{limit:.1e}", found.problem, again))
            if device != "cpu" and not found.problem:
                _on_the_gpu(case, device, again, case.dtype not in captured and case.shape[0] > 1)
                captured |= {case.dtype} if case.shape[0] > 1 else set()


def _on_the_gpu(case: Case, device: str, again: str, capture: bool) -> None:
    """The same bits every time, and the same ones from a captured graph."""
    launcher, arguments = implementation("triton", case.op), case.arguments(device)

    def bits() -> list[Tensor]:
        return [_bits(t) for t in _tensors(launcher(*arguments)) if t is not None]

    first = bits()
    same = [all(map(torch.equal, first, bits())) for _ in range(REPEATS - 1)]
    problem = "" if all(same) else f"{same.count(False)} of {REPEATS} runs gave other bits"
    emit(_finding(case, device, f"{1 + sum(same)} of {REPEATS} alike", "bitwise", problem, again))
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [t for t in _tensors(launcher(*arguments)) if t is not None]
        for t in outputs:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        equal = all(torch.equal(a, _bits(b)) for a, b in zip(first, outputs, strict=True))
        problem = "" if equal else "a captured CUDA graph gave other bits"
        emit(_finding(case, device, "graph replayed", "bitwise", problem, again))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastae.verify.numerics", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KERNEL")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    # The interpreter computes with numpy, which warns where hardware quietly gives inf or NaN.
    warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
    torch.set_num_threads(1)
    run(options.quick, options.seed, options.only, options.device)


if __name__ == "__main__":
    main()
