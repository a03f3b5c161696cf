"""`patch`: a model's linear layers and the activations after them computed in one, in place; `unpatch` undoes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import nn

from fastae.nn.linear_act import LinearAct
from fastae.patching.fused_modules import (
    PatchedForward,
    PatchedLinear,
    PatchedMSELoss,
    PatchedSequential,
    has_hooks,
    patched_class,
)
from fastae.patching.recognise import of_module, other_settings
from fastae.patching.rewriting import rewrite
from fastae.patching.tracing import NotTraceable

# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Replaced:
    """One layer that computes more than it did: its name, the activation, and where that stood in the model."""

    name: str
    activation: str | None  # None for a loss
    where: str
    now: str


@dataclass
class PatchReport:
    """Report of the layers that `patch` replaced, and of those that it left and why; `print` it."""

    replaced: list[Replaced] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # name -> reason

    def __str__(self) -> str:
        rows = [(f"{r.name} + {r.where}" if r.activation else r.name, r.now) for r in self.replaced]
        lines = [f"replaced {len(rows)}", *_table(rows), f"left {len(self.left)}", *_table(list(self.left.items()))]
        return "\n".join(lines)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    wide = max((len(name or "(the model)") for name, _ in rows), default=0)
    return [f"  {name or '(the model)':{wide}}  {text}" for name, text in rows]


# ---------------------------------------------------------------- functions


def patch(model: nn.Module) -> PatchReport:
    """Let each `nn.Linear` of the model compute the activation after it as well, in place.

    Pairs are found in every `nn.Sequential`, and in every module whose `forward` can be recorded by `torch.fx` without
    losing anything (activations as modules, functions and methods). `nn.MSELoss` computes on `fastae.mse_loss`.

    No object is replaced: the layers become `LinearAct`s and get their own class back from `unpatch`. Parameters,
    hooks, names, `state_dict`, dtype, device and mode are untouched, an optimizer made before trains on, and a layer
    called by itself computes what it did. A pair is computed as two again while either has a hook, and a rewritten
    forward gives way to the model's own when a value it has read, a module in it or the kind of its arguments has
    changed. Calling it again brings a model up to date that has been changed since; a layer that was parametrized or
    sharded since stays what that made of it, and computes its activation apart. What looks layers up by their class
    (`type(m) is nn.Linear`, `torch.ao.quantization.quantize_dynamic`) does not find the fused ones: `unpatch` first.

    Args:
        model: changed in place; it stays picklable, where it was (unpickling then needs fastae).

    Returns a `PatchReport`: what was replaced, what was left and why.
    Raises TypeError if the model is not an `nn.Module` or belongs to TorchScript.
    """
    _check(model, "patch")
    _restore(_patched(model)[0])
    names = {module: name for name, module in model.named_modules()}
    found = _PairSearch()
    for module in names:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _in_sequential(module, names, found)
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Linear)):
            _in_forward(module, found)
    report = PatchReport()
    for module, name in names.items():
        if type(module) is nn.MSELoss:
            module.__class__ = PatchedMSELoss
            report.replaced.append(Replaced(name, None, "", repr(module)))
        elif module in found.pairs:
            module.__class__ = PatchedLinear
            module.activation = found.pairs[module][0][0]
            where = ", ".join(dict.fromkeys(where for _, where in found.pairs[module]))
            report.replaced.append(Replaced(name, module.activation, where, repr(module)))
        elif isinstance(module, nn.Linear) and (isinstance(module, PatchedLinear) or not isinstance(module, LinearAct)):
            why = _unsupported_reason(module)
            report.left[name] = why or found.why.get(module, "no forward that calls it was found")
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every module of the model is of its own class again.

    Raises TypeError if the model is not an `nn.Module`, RuntimeError if a patched module's class has been changed since
    (by `fully_shard`, say, or a parametrization).
    """
    _check(model, "unpatch")
    found, changed = _patched(model)
    if changed:
        raise RuntimeError(
            f"unpatch: model must be of the classes that patch gave it; got a {type(changed[0]).__name__}, made since"
        )
    _restore(found)


def _patched(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that `patch` gave a class, and those of them that got another one since."""
    kinds = PatchedLinear, PatchedMSELoss, PatchedSequential, PatchedForward
    found: list[nn.Module] = []
    changed: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, kinds):
            own = type(module) in kinds[:2] or "_fastae_original" in vars(type(module))
            (found if own else changed).append(module)
    return found, changed


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, (PatchedSequential, PatchedForward)):
            module.__dict__.pop("_fastae_forwards", None)
            module.__class__ = module._fastae_original  # type: ignore[assignment]
        elif isinstance(module, PatchedLinear):
            del module.activation
            module.__class__ = nn.Linear  # type: ignore[assignment]
        else:
            module.__class__ = nn.MSELoss


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{function}: model must be a torch.nn.Module outside TorchScript; got {type(model).__name__}")


# ---------------------------------------------------------------- what can be replaced


def _unsupported_reason(linear: nn.Module) -> str | None:
    """Why this layer can be in no pair, if so."""
    if nn.utils.parametrize.is_parametrized(linear):
        return "it is parametrized"
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not an nn.Linear"
    kept = vars(linear)
    if any(kept[hooks] for hooks in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")):
        return "it has a hook"
    if kept["_forward_pre_hooks_with_kwargs"]:
        return "it has a hook that takes keyword arguments"
    return "it has a forward of its own" if "forward" in kept else None


@dataclass
class _PairSearch:
    """Per layer: the activations that it is to compute, and where they stand; or why none was found."""

    pairs: dict[nn.Module, list[tuple[str, str]]] = field(default_factory=dict)
    why: dict[nn.Module, str] = field(default_factory=dict)


def _in_sequential(module: nn.Sequential, names: dict[nn.Module, str], found: _PairSearch) -> None:
    children = list(module)
    pairs: list[tuple[nn.Module, str, str]] = []
    for linear, after in zip(children, [*children[1:], None], strict=False):
        if not isinstance(linear, nn.Linear):
            continue
        if after is None:
            found.why.setdefault(linear, "it is the last of its Sequential")
            continue
        name, why = of_module(after), None
        if name is None:
            why = f"a {type(after).__name__} follows it"
            if other_settings(after):
                why = f"{after} follows it, with settings LinearAct does not support"
        elif has_hooks(after) or vars(after)["_forward_pre_hooks"]:
            why = f"the {type(after).__name__} after it has a hook"
        if name is None or why is not None or _unsupported_reason(linear) is not None:
            found.why.setdefault(linear, why or "")
        else:
            pairs.append((linear, name, names[after]))
    _use(module, PatchedSequential, pairs, found)


def _in_forward(module: nn.Module, found: _PairSearch) -> None:
    linears = list(_called_directly(module))
    if not linears:
        return
    try:
        if type(module).forward.__module__.startswith(("torch.", "fastae.")):
            raise NotTraceable("its forward is PyTorch's own")
        result = rewrite(module, _unsupported_reason)
    except NotTraceable as reason:
        for linear in linears:
            found.why.setdefault(linear, f"{type(module).__name__}: {reason}")
        return
    for linear in linears:
        found.why.setdefault(linear, result.why.get(linear, f"{type(module).__name__}.forward does not call it"))
    if result.forwards and _use(module, PatchedForward, result.pairs, found):
        vars(module)["_fastae_forwards"] = tuple(result.forwards)


def _called_directly(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that the module's own forward may call: its own, and those in its lists."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_directly(child)
        elif isinstance(child, nn.Linear):
            yield child


def _use(module: nn.Module, kind: type[nn.Module], pairs: list[tuple[nn.Module, str, str]], found: _PairSearch) -> bool:
    """Give the module its class, so that the pairs are computed in one; or note why that cannot be."""
    original = type(module)
    why = None
    if "forward" in vars(module):
        why = f"{original.__name__} has a forward of its own"
    elif any("__init_subclass__" in vars(base) for base in original.__mro__ if base not in (object, Generic)):
        why = f"{original.__name__} defines `__init_subclass__`"
    elif pairs:
        try:
            module.__class__ = patched_class(original, kind)
        except TypeError as error:  # a metaclass or a memory layout of its own
            why = f"{original.__name__} takes no other class: {error}"
    for linear, name, where in pairs:
        if why is None:
            found.pairs.setdefault(linear, []).append((name, where))
        else:
            found.why[linear] = why
    return why is None
