"""Width of the addresses of a kernel, from an abstract interpretation of its source with kinds in place of numbers.

A stride or a dimension is any int32, and a product of two of them does not fit: one factor must be int64 before the
multiplication. Kinds follow from the naming convention: `x_ptr` is a pointer, `stride_xm` and a parameter
of one or two capitals (M, N, K) stretch an address, a `tl.constexpr` is known to the compiler.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

CONST, INDEX, STRIDE, SCALAR, WIDE, POINTER, VALUE = "const", "index", "stride", "scalar", "wide", "pointer", "value"


@dataclass(frozen=True)
class Risk:
    """Product in int32 that may have overflowed."""

    function: str
    line: int
    text: str


Kind: TypeAlias = "str | Risk | tuple[Kind, ...]"
Names: TypeAlias = "dict[str, Kind]"
Report: TypeAlias = tuple[str, str, int, str]  # rule, function, line, message


def _parameter(argument: ast.arg) -> Kind:
    name = argument.arg
    if argument.annotation is not None and "constexpr" in ast.unparse(argument.annotation):
        return CONST
    if re.search(r"ptrs?$", name):
        return POINTER
    if name.startswith("stride") or re.fullmatch(r"[A-Z]{1,2}", name):
        return STRIDE
    return SCALAR


def _join(kinds: Sequence[Kind]) -> Kind:
    """Join the kinds that a value may have: the least that is known of it."""
    risks = [k for k in kinds if isinstance(k, Risk)]
    if risks:
        return risks[0]
    flat = {k for k in kinds if isinstance(k, str)} - {CONST}
    if len(flat) < 2:
        return flat.pop() if flat else CONST
    return next((k for k in (POINTER, VALUE, STRIDE) if k in flat), INDEX)


class Offsets:
    """Kinds of the values in the jit functions of a package, by name."""

    def __init__(self, functions: dict[str, ast.FunctionDef]) -> None:
        self.functions = functions
        self.reports: dict[Report, None] = {}
        self.stack: list[str] = []

    def is_kernel(self, name: str) -> bool:
        """Whether the function takes pointers, as those called by launchers do."""
        return any(_parameter(a) == POINTER for a in _parameters(self.functions[name]))

    def kernel(self, name: str) -> list[Report]:
        """List the problems of a kernel and the helpers it calls."""
        self.reports = {}
        node = self.functions[name]
        self._run(node, {a.arg: _parameter(a) for a in _parameters(node)})
        return list(self.reports)

    def _run(self, node: ast.FunctionDef, names: Names) -> Kind:
        if node.name in self.stack[-8:]:  # one that halves its tile and calls itself
            return VALUE
        self.stack.append(node.name)
        returned: list[Kind] = []
        self._block(node.body, names, returned)
        self.stack.pop()
        tuples = [k for k in returned if isinstance(k, tuple)]
        if tuples:
            return tuple(_join([t[i] for t in tuples if i < len(t)]) for i in range(len(tuples[0])))
        return _join(returned) if returned else VALUE

    def _report(self, rule: str, line: int, message: str, function: str | None = None) -> None:
        self.reports[rule, function or self.stack[-1], line, message] = None

    # ------------------------------------------------------------ statements

    def _block(self, body: Sequence[ast.stmt], names: Names, returned: list[Kind]) -> None:
        for statement in body:
            self._statement(statement, names, returned)

    def _statement(self, s: ast.stmt, names: Names, returned: list[Kind]) -> None:
        if isinstance(s, ast.Assign):
            kind = self._kind(s.value, names)
            for target in s.targets:
                self._assign(target, kind, names)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            kind = self._kind(s.value, names)
            self._assign(s.target, CONST if "constexpr" in ast.unparse(s.annotation) else kind, names)
        elif isinstance(s, ast.AugAssign):
            self._assign(s.target, self._binary(s.op, s.target, s.value, s, names), names)
        elif isinstance(s, ast.If):
            self._kind(s.test, names)
            first, second = dict(names), dict(names)
            self._block(s.body, first, returned)
            self._block(s.orelse, second, returned)
            for name in first | second:
                both = [side[name] for side in (first, second) if name in side]
                names[name] = both[0] if isinstance(both[0], tuple) else _join(both)
        elif isinstance(s, ast.For):
            fixed = isinstance(s.iter, ast.Call) and ast.unparse(s.iter.func).endswith("static_range")
            kind = self._kind(s.iter, names)
            self._assign(s.target, CONST if fixed else _join([INDEX, kind]) if kind != WIDE else WIDE, names)
            for _ in range(2):  # kinds that one pass changes are seen by the next
                self._block(s.body, names, returned)
        elif isinstance(s, ast.While):
            for _ in range(2):
                self._block(s.body, names, returned)
        elif isinstance(s, ast.Return) and s.value is not None:
            returned.append(self._kind(s.value, names))
        elif isinstance(s, ast.Expr):
            self._kind(s.value, names)

    def _assign(self, target: ast.expr, kind: Kind, names: Names) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = kind
        elif isinstance(target, ast.Tuple):
            kinds = kind if isinstance(kind, tuple) else (kind,) * len(target.elts)
            for part, own in zip(target.elts, kinds, strict=False):
                self._assign(part, own, names)

    # ------------------------------------------------------------ expressions

    def _kind(self, e: ast.expr, names: Names) -> Kind:
        if isinstance(e, ast.Name):
            return names.get(e.id, CONST)
        if isinstance(e, ast.BinOp):
            return self._binary(e.op, e.left, e.right, e, names)
        if isinstance(e, ast.Call):
            return self._call(e, names)
        if isinstance(e, ast.Tuple):
            return tuple(self._kind(part, names) for part in e.elts)
        if isinstance(e, ast.UnaryOp):
            return self._kind(e.operand, names)
        if isinstance(e, ast.IfExp):
            return _join([self._kind(e.body, names), self._kind(e.orelse, names)])
        if isinstance(e, ast.Subscript):
            whole = self._kind(e.value, names)
            if not isinstance(whole, tuple):
                return whole
            at = e.slice.value if isinstance(e.slice, ast.Constant) else None
            return whole[at] if isinstance(at, int) else _join(whole)
        if isinstance(e, ast.Compare | ast.BoolOp):
            for part in ast.iter_child_nodes(e):
                if isinstance(part, ast.expr):
                    self._kind(part, names)
            return VALUE
        return CONST  # a number, a dtype, x.shape

    def _binary(self, op: ast.operator, left: ast.expr, right: ast.expr, at: ast.stmt | ast.expr, names: Names) -> Kind:
        kinds = [self._kind(left, names), self._kind(right, names)]
        for kind in kinds:
            if isinstance(kind, Risk):
                return kind
        if VALUE in kinds:
            if SCALAR in kinds:
                scalar = ast.unparse((left, right)[kinds.index(SCALAR)])
                self._report("scalar", at.lineno, f"{scalar}: cast a number of the caller's before it meets a tile")
            return VALUE
        if POINTER in kinds:
            return POINTER
        if isinstance(op, ast.Mult):
            if WIDE in kinds:
                return WIDE
            if STRIDE in kinds:
                return Risk(self.stack[-1], at.lineno, ast.unparse(at))
            return _join(kinds)
        if isinstance(op, ast.Add | ast.Sub):
            return WIDE if WIDE in kinds else _join(kinds)
        if isinstance(op, ast.Div):
            return SCALAR if SCALAR in kinds else VALUE if kinds != [CONST, CONST] else CONST
        return WIDE if kinds[0] == WIDE else _join([INDEX, *kinds[:1]])

    def _call(self, e: ast.Call, names: Names) -> Kind:
        name = ast.unparse(e.func).rsplit(".", 1)[-1]
        kinds = [self._kind(a, names) for a in e.args]
        words = {k.arg: self._kind(k.value, names) for k in e.keywords if k.arg}
        if name in self.functions and isinstance(e.func, ast.Name):
            return self._helper(self.functions[name], kinds, words)
        if name in ("load", "store") or name.startswith("atomic_"):
            if kinds and isinstance(kinds[0], Risk):
                message = f"{kinds[0].text}: an int32 product in an address; .to(tl.int64) first"
                self._report("int32", kinds[0].line, message, kinds[0].function)
            return VALUE
        own = [self._kind(e.func.value, names)] if isinstance(e.func, ast.Attribute) else []
        if name in ("to", "cast", "full"):
            return _cast([*own, *kinds] if name == "to" else kinds, ast.unparse(e))
        if name in ("arange", "program_id", "num_programs", "cdiv"):
            return INDEX
        if name in ("minimum", "maximum", "min", "max", "range", "static_range"):
            return _join(kinds)
        if name == "where":
            return _join(kinds[1:])
        first = next((k for k in (*own, *kinds) if k != CONST), VALUE)  # reshaped, broadcast, summed, ...
        return first if isinstance(first, Risk) or first in (INDEX, WIDE, POINTER) else VALUE

    def _helper(self, node: ast.FunctionDef, kinds: list[Kind], words: dict[str, Kind]) -> Kind:
        parameters = _parameters(node)
        names: Names = {a.arg: CONST for a in parameters}
        names |= {a.arg: kind for a, kind in zip(parameters, kinds, strict=False)} | words
        for a in parameters:
            if _parameter(a) in (POINTER, CONST):
                names[a.arg] = _parameter(a)
        return self._run(node, names)


def _cast(kinds: list[Kind], text: str) -> Kind:
    """Kind after a cast: a product that has overflowed stays wrong in int64."""
    for kind in kinds:
        if isinstance(kind, Risk):
            return kind
    return WIDE if "int64" in text else INDEX if "int32" in text else VALUE


def _parameters(node: ast.FunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
