"""A module's forward as a graph, or why it has none that could stand for it.

`torch.fx` records what one run does. Whatever a later run might do otherwise must be known: what the code reads is
noted, to be compared before each use, and code whose effects a recording would lose is refused.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, get_testing_overrides

from fastae.patching.recognise import PASS_THROUGH


class NotTraceable(Exception):  # noqa: N818 (it reports a finding, not a failure)
    """Why a recording could not stand for the forward."""


# ---------------------------------------------------------------- what the code may do

_BUILTINS = ("enumerate", "float", "getattr", "int", "len", "list", "dict", "range", "reversed", "sum", "tuple", "zip")
_REFUSED = {
    "IMPORT": "imports",
    "WITH": "enters a `with` block",
    "LOAD_SPECIAL": "enters a `with` block",
    "SETUP_FINALLY": "catches exceptions",
    "PUSH_EXC_INFO": "catches exceptions",
    "STORE_ATTR": "assigns to an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "assigns to a global",
    "DELETE_GLOBAL": "deletes a global",
    "STORE_SUBSCR": "assigns to an element",
    "DELETE_SUBSCR": "deletes an element",
    "YIELD": "is a generator",
    "SUPER": "calls super()",
}
_AUGMENTED = tuple(f"{sign}=" for sign in ("+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^", "<<", ">>"))


@cache
def _torch_functions() -> frozenset[Any]:
    """The functions of torch that a recording can see: those that look at the types of their arguments."""
    return frozenset({*get_testing_overrides(), *PASS_THROUGH})


def check_code(function: Any, seen: set[Any] | None = None, entry: bool = False) -> None:
    """NotTraceable if running the function has effects, or depends on things, that a recording would lose.

    `entry`: it is the forward itself, of whose arguments it is known which are tensors and which have their defaults.
    """
    seen = set() if seen is None else seen
    function = function.__func__ if isinstance(function, MethodType) else function
    if function in seen:
        return
    seen.add(function)
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise NotTraceable(f"{name} is decorated or not a Python function")
    if not all(map(_is_constant, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))):
        raise NotTraceable(f"{name} has a default that is not a plain value")
    if function.__code__.co_freevars:
        raise NotTraceable(f"{name} uses {function.__code__.co_freevars[0]} from around it")
    codes = [list(dis.get_instructions(code)) for code in _codes(function.__code__)]
    for instructions in codes:
        for at, instruction in enumerate(instructions):
            if _compares_identity(instruction) and not (entry and _of_argument(instructions, at, function.__code__)):
                raise NotTraceable(f"{name} compares with `is`")
            why = next((why for part, why in _REFUSED.items() if part in instruction.opname), None)
            if why is not None:
                raise NotTraceable(f"{name} {why}")
            # fx records `h += 1` as `h = h + 1`, which leaves h's other names as they were.
            if instruction.opname.startswith("INPLACE") or instruction.argrepr in _AUGMENTED:
                raise NotTraceable(f"{name} has an assignment like +=")
    for instructions in codes:
        for at, instruction in enumerate(instructions):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                _check_global(function, name, instructions[at:], seen)


def _compares_identity(instruction: dis.Instruction) -> bool:
    return instruction.opname == "IS_OP" or ("JUMP" in instruction.opname and "NONE" in instruction.opname)


def _of_argument(instructions: list[dis.Instruction], at: int, code: CodeType) -> bool:
    """Whether the comparison is `argument is None` (or `is not`) of an argument that is never assigned to."""
    if instructions[at].opname == "IS_OP":
        at -= 1
        if instructions[at].opname != "LOAD_CONST" or instructions[at].argval is not None:
            return False
    before = instructions[at - 1]
    assigned = str([i.argval for i in instructions if "STORE_FAST" in i.opname])  # names, or pairs of them
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return "LOAD_FAST" in before.opname and before.argval in arguments and repr(before.argval) not in assigned


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _check_global(function: FunctionType, name: str, instructions: list[dis.Instruction], seen: set[Any]) -> None:
    spelled = str(instructions[0].argval)
    if spelled not in function.__globals__:
        if spelled not in _BUILTINS or not hasattr(builtins, spelled):
            raise NotTraceable(f"{name} calls {spelled}")
        return
    value: Any = function.__globals__[spelled]
    of_math = value is math
    for attribute in instructions[1:]:  # torch.nn.functional.relu
        if not isinstance(value, ModuleType) or attribute.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        spelled = f"{spelled}.{attribute.argval}"
        value = getattr(value, str(attribute.argval), None)
    defined = getattr(value, "__module__", None) or ""
    if isinstance(value, FunctionType) and not _is_torch(value) and not defined.startswith(("torch.", "fastae")):
        check_code(value, seen)
    elif not (isinstance(value, (torch.dtype, torch.layout)) or _is_torch(value) or (of_math and value is not math)):
        raise NotTraceable(f"{name} {'calls' if callable(value) else 'reads the global'} {spelled}")


def _is_torch(value: Any) -> bool:
    try:
        return value in _torch_functions()
    except TypeError:  # not hashable
        return False


# ---------------------------------------------------------------- what it reads

_OWN = frozenset(nn.Module().__dict__) - {"training"}
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_STRUCTURE = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _is_constant(value: object) -> bool:
    return isinstance(value, _CONSTANTS) or (isinstance(value, tuple) and all(map(_is_constant, value)))


class Reads:
    """Notes what is read of modules while a forward runs."""

    def __init__(self, root: nn.Module) -> None:
        self.paths = {module: path for path, module in root.named_modules()}
        self.values: dict[tuple[nn.Module, str], object] = {}
        self.containers: set[nn.Module] = set()

    def note(self, module: nn.Module, name: str, value: object) -> None:
        if name.startswith("__") or module not in self.paths:
            return
        reader = sys._getframe(2).f_code.co_filename
        if name == "_modules" and reader == _CONTAINERS:
            self.containers.add(module)
        if reader.startswith(_TORCH) or name in _OWN or isinstance(value, (Tensor, nn.Module)):
            return
        if _is_constant(value) or _is_torch(value):  # self.p = 0.1, self.act = F.relu
            self.values[module, name] = value
        elif isinstance(value, (FunctionType, MethodType)):
            defined = getattr(value, "__module__", "") or ""
            if not defined.startswith("torch."):
                check_code(value)
            elif not (isinstance(module, _STRUCTURE) and name in ("keys", "values", "items")):
                raise NotTraceable(f"it calls {name} of a {type(module).__name__}")
        else:
            raise NotTraceable(f"it reads {name}, a {type(value).__name__}")


# fx and `_noting` replace methods of nn.Module for the whole process, and put back what they found
_ONE_AT_A_TIME = threading.Lock()

_TORCH = torch.__file__.removesuffix("__init__.py")
_CONTAINERS = nn.modules.container.__file__


@contextmanager
def _noting(reads: Reads) -> Iterator[None]:
    """While it lasts, what this thread reads of the root's modules is noted, and it can assign to no module."""
    here = threading.get_ident()

    def read(module: nn.Module, name: str) -> Any:
        if threading.get_ident() != here:
            return object.__getattribute__(module, name)
        if isinstance(getattr(type(module), name, None), property) and module in reads.paths:
            check_code(getattr(type(module), name).fget)
        value = object.__getattribute__(module, name)
        reads.note(module, name, value)
        return value

    def write(module: nn.Module, name: str, value: object) -> None:
        if threading.get_ident() == here:
            raise NotTraceable(f"it sets {name}")
        assign(module, name, value)  # type: ignore[arg-type]

    assign = nn.Module.__setattr__
    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = write  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = assign  # type: ignore[method-assign]


class _NothingFrozen(TorchFunctionMode):
    """Refuses results that no argument of the forward has gone into: a recording would keep the first one for ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        if not any(isinstance(a, fx.Proxy) for a in flat):
            raise NotTraceable(f"it calls {getattr(func, '__name__', func)} without its input")
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- the recording


class _Tracer(fx.Tracer):
    """Records what one thread does; fx wraps the calls and attributes of every module, other threads' too."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True  # each module's own forward is a recording of its own: its hooks are called, its class is asked


@dataclass
class Recording:
    """The graph of a forward, other modules as single nodes; what it read; its arguments without and with defaults."""

    graph: fx.Graph
    reads: Reads
    arguments: tuple[str, ...]
    defaults: dict[str, object]
    positions: int  # how many of them may be given without their names


def trace(module: nn.Module) -> Recording:
    """The forward as it is with all defaults, for tensors. Raises NotTraceable."""
    forward = type(module).forward
    check_code(forward, entry=True)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if odd := [p for p in parameters if p.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]:
        raise NotTraceable(f"{forward.__qualname__} takes any arguments, as {odd[0]}")
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if any(isinstance(value, (tuple, torch.dtype, torch.device)) for value in defaults.values()):
        raise NotTraceable(f"{forward.__qualname__} has a default that torch.fx does not take")
    reads = Reads(module)
    try:
        with _ONE_AT_A_TIME, _noting(reads), _NothingFrozen():
            graph = _Tracer().trace(module, concrete_args=dict(defaults))
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node in placeholders[len(parameters) - len(defaults) :]:
            _erase(graph, node)  # fx would assert the default; whoever uses the recording does
    except NotTraceable:
        raise
    except Exception as error:  # whatever the user's code raises when it is handed fx's stand-ins for tensors
        raise NotTraceable(f"torch.fx: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    arguments = tuple(p.name for p in parameters if p.name not in defaults)
    positions = sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters)
    return Recording(graph, reads, arguments, defaults, positions)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)
