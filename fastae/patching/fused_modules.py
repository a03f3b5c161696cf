"""Classes of a patched model: they take the place of its own, and give way again.

Only classes change, no object does: parameters, names, hooks and references from elsewhere stay what they were. A layer
called by itself computes what it did before; it takes in the activation only where its caller hands it over, which
`nn.Sequential` and a rewritten forward do when both are, at that moment, what they were: no hook, no other module.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from fastae_kernels.elementwise import ACTIVATIONS
from torch import Tensor, nn

from fastae.nn.linear_act import LinearAct, linear_act
from fastae.nn.losses import MSELoss
from fastae.patching.recognise import of_module

# ---------------------------------------------------------------- layers


class PatchedLinear(LinearAct):
    """An `nn.Linear` that computes the activation after it as well, where its caller asks for one.

    `activation` names the one it is followed by. Called as an `nn.Linear` it computes what `nn.Linear` does.
    """

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        if activation is None:
            return F.linear(input, self.weight, self.bias)
        if input.is_complex():  # which has no kernel
            return ACTIVATIONS[activation].differentiable(F.linear(input, self.weight, self.bias))
        return linear_act(input, self.weight, self.bias, activation)

    def _get_name(self) -> str:
        return "LinearAct"


class PatchedMSELoss(MSELoss):
    """An `nn.MSELoss` on `fastae.mse_loss`, which becomes one again."""

    def _get_name(self) -> str:
        return "MSELoss"


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has a hook on its output, or a forward of its own."""
    of = module.__dict__
    return bool(of["_forward_hooks"] or of["_backward_hooks"] or of["_backward_pre_hooks"]) or "forward" in of


def can_take(linear: nn.Module | None) -> bool:
    """Whether the layer, as it is now, may be handed an activation."""
    # A pre-hook sees the same x, but one that takes keywords would see the activation too.
    return (
        isinstance(linear, PatchedLinear)
        and not has_hooks(linear)
        and not linear.__dict__["_forward_pre_hooks_with_kwargs"]
    )


def fuses(linear: nn.Module | None, activation: nn.Module | None) -> str | None:
    """The activation's name if the two may be computed in one as they are now, else None."""
    if activation is None or not can_take(linear):
        return None
    name = of_module(activation)
    watched = name is None or has_hooks(activation) or activation.__dict__["_forward_pre_hooks"]
    return None if watched else name


# ---------------------------------------------------------------- modules that call them


class _Patched(nn.Module):
    """Base of every class made by `patched_class`."""

    _fastae_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        make, args, *state = reduced
        if make is not vars(copyreg)["__newobj__"] or args[0] is not type(self):
            return reduced  # the model's own way: its copies are not patched
        kind = PatchedSequential if isinstance(self, PatchedSequential) else PatchedForward
        return _new, (self._fastae_original, kind, *args[1:]), *state


class PatchedSequential(_Patched):
    """An `nn.Sequential` that lets each layer compute the activation after it."""

    def forward(self, input: Any) -> Any:
        modules = [*self._modules.values(), None]
        listened = nn.modules.module._has_any_global_hook()
        at = 0
        while (module := modules[at]) is not None:
            name = None if listened else fuses(module, modules[at + 1])
            if name is None:
                input, at = module(input), at + 1
            else:
                input, at = module(input, activation=name), at + 2
        return input


class PatchedForward(_Patched):
    """A module with a rewritten forward, which gives way to its own where what was seen in writing it has changed."""

    _fastae_forwards: tuple[Rewritten, ...]


def patched_class(original: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of class `original` gets: it looks the same but for its forward."""
    if (original, kind) in _made:
        return _made[original, kind]
    members: dict[str, Any] = {
        name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__") if hasattr(original, name)
    }
    if kind is PatchedForward:
        members["forward"] = _forward_of(original)
    members["_fastae_original"] = original
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (kind, original), members)
    _made[original, kind] = made
    return made


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _forward_of(original: type[nn.Module]) -> Callable[..., Any]:
    own = original.forward

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not nn.modules.module._has_any_global_hook():
            for rewritten in self._fastae_forwards:
                given = rewritten.positional(args, kwargs)
                if given is not None and rewritten.holds(self):
                    return rewritten.function(self, *given)
        return own(self, *args, **kwargs)

    return forward


def _new(original: type[nn.Module], kind: type[nn.Module], *args: Any) -> nn.Module:
    made: Any = patched_class(original, kind)
    return made.__new__(made, *args)


# ---------------------------------------------------------------- a rewritten forward


@dataclass
class Rewritten:
    """A module's forward with its pairs in one, and what must hold for it to be what the module's own would do.

    `arguments`: those that must be tensors; `defaults`: the others, which must be this; `positions`: how many may come
    without their names. `reads`: (path, attribute, value) of every plain value that was read. `containers`: (path,
    names) of every list of modules that was walked. `pairs`: (path of the layer, path of the activation's module or
    None, the activation's name).
    """

    source: str
    arguments: tuple[str, ...]
    defaults: dict[str, object]
    positions: int
    reads: tuple[tuple[str, str, Any], ...]
    containers: tuple[tuple[str, tuple[str, ...]], ...]
    pairs: tuple[tuple[str, str | None, str], ...]
    names: Mapping[str, object]

    def __post_init__(self) -> None:
        self._build()

    def _build(self) -> None:
        found = dict(self.names)
        exec(compile(self.source, "<fastae.patch>", "exec"), found)
        self.function: Callable[..., Any] = found["forward"]  # type: ignore[assignment]

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments in order if they are the tensors that the forward was rewritten for, else None."""
        if kwargs or len(args) != len(self.arguments):
            names = (*self.arguments, *self.defaults)
            bound = dict(zip(names, args, strict=False))
            if len(args) > self.positions or bound.keys() & kwargs.keys() or not kwargs.keys() <= set(names):
                return None
            bound.update(kwargs)
            for name, value in self.defaults.items():
                given = bound.pop(name, value)
                if type(given) is not type(value) or given != value:
                    return None
            if len(bound) != len(self.arguments):
                return None
            args = tuple(bound[name] for name in self.arguments)
        return args if all(isinstance(a, Tensor) for a in args) else None

    def holds(self, module: nn.Module) -> bool:
        """Whether all that was seen in writing it is still so."""
        for path, attribute, value in self.reads:
            now = getattr(_at(module, path), attribute, None)
            if type(now) is not type(value) or now != value:
                return False
        for path, names in self.containers:
            container = _at(module, path)
            if container is None or tuple(container._modules) != names:
                return False
        for path, activation, name in self.pairs:
            linear = _at(module, path)
            if not (can_take(linear) if activation is None else fuses(linear, _at(module, activation)) == name):
                return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key != "function"}
        names = {k: _Import(v.__name__) if isinstance(v, ModuleType) else v for k, v in self.names.items()}
        return {**state, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {k: import_module(v.name) if isinstance(v, _Import) else v for k, v in state["names"].items()}
        self.__dict__.update(state, names=names)
        self._build()


@dataclass(frozen=True)
class _Import:
    """A module of Python, which does not pickle, by its name."""

    name: str


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found
