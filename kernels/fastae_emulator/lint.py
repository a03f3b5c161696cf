"""Lint rules for kernel source: faults that numbers do not show, or show only at sizes that no test uses.

`lint_kernels(files)` reads a package of kernels, `python -m fastae_emulator.lint FILE...` prints what it finds. Rules:

- other: a masked load names its `other=`, and `mask` and `other` by name. The interpreter reads 0 there, a GPU garbage.
- block-pointer: no block pointers (removed from Triton in 2026).
- grid: programs are numbered along axis 0 alone; the other axes stop at 65,535.
- int32: a stride or a dimension is multiplied by an int64, or the product is no part of an address.
- scalar: a number passed to a kernel is cast before it meets a tile; a Python float becomes fp64 under torch.compile.
- sync: launchers and autograd code never wait for the device.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastae_emulator.offsets import Offsets

_SYNCS = ("item", "tolist", "synchronize", "cpu", "numpy", "nonzero", "is_nonzero", "equal", "allclose")


@dataclass(frozen=True)
class LintProblem:
    rule: str
    function: str  # the kernel or launcher
    where: str  # "linear_act.py:40"
    message: str

    def __str__(self) -> str:
        return f"{self.where}, {self.function}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Function:
    """Function of a file, jit or not."""

    file: Path
    node: ast.FunctionDef

    @property
    def is_jit(self) -> bool:
        return any(ast.unparse(d).split("(")[0].split(".")[-1] == "jit" for d in self.node.decorator_list)


def functions(files: Iterable[Path]) -> list[Function]:
    """Every function of these files, methods and nested ones too."""
    found = []
    for file in files:
        tree = ast.parse(file.read_text(), str(file))
        found += [Function(file, node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return found


def lint_kernels(files: Iterable[Path]) -> list[LintProblem]:
    """Apply all rules to jit functions and launchers. Files that call each other's jit functions go in together."""
    every = functions(files)
    jits = [f for f in every if f.is_jit]
    problems = [p for f in jits for p in _jit_rules(f)]
    problems += [p for f in every if not f.is_jit for p in (*_grids(f), *_syncs(f))]
    called = {_last(call.func) for f in jits for call in _calls(f.node)}
    offsets = Offsets({f.node.name: f.node for f in jits})
    for f in jits:
        if f.node.name not in called and offsets.is_kernel(f.node.name):  # helpers are seen with its arguments
            for rule, helper, line, message in offsets.kernel(f.node.name):
                file = next(g.file for g in jits if g.node.name == helper)
                problems.append(LintProblem(rule, f.node.name, f"{file.name}:{line}", message))
    return list(dict.fromkeys(problems))


def lint_host(files: Iterable[Path]) -> list[LintProblem]:
    """Apply the rules of code around kernels: autograd functions and their helpers."""
    return [p for f in functions(files) for p in _syncs(f)]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Call))


def _last(function: ast.expr) -> str:
    return ast.unparse(function).rsplit(".", 1)[-1]


def _problem(rule: str, function: Function, node: ast.expr, message: str) -> LintProblem:
    return LintProblem(rule, function.node.name, f"{function.file.name}:{node.lineno}", message)


def _jit_rules(f: Function) -> Iterator[LintProblem]:
    for call in _calls(f.node):
        name, words = _last(call.func), {k.arg for k in call.keywords}
        if name == "load" and len(call.args) > 1:
            yield _problem("other", f, call, "mask and other of a load by name")
        elif name == "load" and "mask" in words and "other" not in words:
            yield _problem("other", f, call, "a masked load without other=: a GPU leaves garbage there")
        elif name in ("make_block_ptr", "advance"):
            yield _problem("block-pointer", f, call, f"{name}: use offsets and masks")
        elif name in ("program_id", "num_programs"):
            axis = [ast.unparse(a) for a in call.args] + [ast.unparse(k.value) for k in call.keywords]
            if axis != ["0"]:
                yield _problem("grid", f, call, f"{name}({', '.join(axis)}): only axis 0 goes beyond 65,535 programs")


def _grids(f: Function) -> Iterator[LintProblem]:
    """Find launches over more than one axis: `kernel[a, b](...)`."""
    for call in _calls(f.node):
        if isinstance(call.func, ast.Subscript) and isinstance(call.func.slice, ast.Tuple):
            axes = call.func.slice.elts
            if len(axes) > 1 and any(ast.unparse(axis) != "1" for axis in axes[1:]):
                yield _problem("grid", f, call, f"{ast.unparse(call.func)}: programs along axis 0 alone")


def _syncs(f: Function) -> Iterator[LintProblem]:
    on_cpu = {id(call) for branch in _cpu_branches(f.node) for call in _calls(branch)}
    for call in _calls(f.node):
        name = ast.unparse(call.func)
        torch_only = _last(call.func) in ("equal", "allclose") and not name.startswith("torch.")
        if _last(call.func) in _SYNCS and "." in name and not torch_only and id(call) not in on_cpu:
            yield _problem("sync", f, call, f"{name}() waits for the device")


def _cpu_branches(node: ast.AST) -> Iterator[ast.AST]:
    """Bodies of `if t.device.type == "cpu":`, where there is nothing to wait for."""
    for branch in ast.walk(node):
        if isinstance(branch, ast.If | ast.IfExp) and ast.unparse(branch.test).endswith(".device.type == 'cpu'"):
            yield from branch.body if isinstance(branch, ast.If) else [branch.body]


def main() -> int:
    problems = lint_kernels([Path(name) for name in sys.argv[1:]])
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
