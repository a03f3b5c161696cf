"""The stages that a model's modules make: plain layers as they are, runs of other modules as islands of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from fastae.bottlenecks import Variational
from fastae.engine.program import Dense, Module, Sample, Stage, layer_of
from fastae.engine.signature import HOOKS
from fastae.nn.dropout import HiddenDropout
from fastae.nn.linear_act import LinearAct
from fastae.nn.tied_linear_act import TiedLinearAct


def stages_of(layers: Sequence[tuple[str, nn.Module]]) -> list[Stage]:
    """Plain layers as stages of the kernels, with the dropout that follows them; runs of other modules as islands."""
    stages = list[Stage]()
    islands = list[tuple[str, nn.Module]]()
    for name, layer in layers:
        before = stages[-1] if stages and not islands else None
        if layer_reason(layer) is None:
            stages += [*_island(islands), dense_stage(name, layer)]
            islands = []
        elif type(layer) is HiddenDropout and isinstance(before, Dense) and not hooked(layer):
            stages[-1] = before._replace(dropout=layer.p if layer.training else 0.0)
        else:
            islands.append((name, layer))
    return stages + _island(islands)


def sample_stage(stages: list[Stage], width: int, part: Variational) -> Sample:
    """The stage of a code that the last of the stages gives, which it takes over if that is a plain layer."""
    last = stages[-1]
    if isinstance(last, Dense) and not last.dropout and last.activation == "identity":
        stages.pop()
        return Sample(last.name, last, width, part)
    return Sample("code", None, width, part)


def rows_of(layer: Dense, width: int) -> Dense:
    """A layer's first outputs."""
    weight, bias = layer.weight[:width], None if layer.bias is None else layer.bias[:width]
    return layer._replace(weight=cast(nn.Parameter, weight), bias=cast("nn.Parameter | None", bias))


def hooked(layer: nn.Module) -> bool:
    own = vars(layer)
    return any(own[hooks] for hooks in HOOKS) or "forward" in own


def dense_stage(name: str, layer: nn.Module) -> Dense:
    """A plain layer as a stage of the kernels."""
    own: Any = layer
    if type(layer) is TiedLinearAct:
        return Dense(name, own.source.weight, own.bias, own.activation, True)
    table = own._parameters
    return Dense(name, table["weight"], table["bias"], own.activation)


def layer_reason(layer: nn.Module) -> str | None:
    """Why a layer is not as its constructor made it, or None."""
    kind = type(layer)
    if kind is not LinearAct and kind is not TiedLinearAct:
        return f"a layer is a {kind.__name__}"
    own = vars(layer)
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return f"a {kind.__name__} has a hook"
    if "forward" in own:
        return f"a {kind.__name__} has a forward of its own"
    parameters = own["_parameters"].values()
    if kind is TiedLinearAct:
        source: Any = layer.source
        if type(source) is not LinearAct or "weight" not in vars(source)["_parameters"]:
            return f"a {kind.__name__} is tied to a {type(source).__name__} with a weight that is not its own"
        parameters = (source.weight, *parameters)
    for p in parameters:
        if p is None:
            continue
        if type(p) is not nn.Parameter or type(p.data) is not Tensor:
            return f"a parameter of a {kind.__name__} is a {type(p).__name__} of {type(p.data).__name__}"
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return f"a parameter of a {kind.__name__} has a hook"
    return None


def _island(modules: Sequence[tuple[str, nn.Module]]) -> list[Stage]:
    """Modules that follow each other, as one island."""
    if not modules:
        return []
    (first, module), (last, _) = modules[0], modules[-1]
    if len(modules) == 1:
        return [Module(first, module)]
    together = nn.Sequential(*(m for _, m in modules))
    together.training = module.training  # its own flag: `train` would set those of the modules, which may differ
    return [Module(f"{first} to {last}", together)]


def each_hook_once(stages: Sequence[Stage]) -> bool:
    """Whether every parameter with a hook is used by one stage alone: the hook wants the sum of its gradients."""
    seen: set[int] = set()
    for stage in stages:
        layer, used = layer_of(stage), list[nn.Parameter | None]()
        if layer is not None:
            used = [layer.weight, layer.bias]
        elif isinstance(stage, Module):
            used = [*stage.module.parameters()]
            tied = [m.source for m in stage.module.modules() if isinstance(m, TiedLinearAct)]
            used += [p for source in tied for p in source.parameters()]  # not .weight, which a parametrization computes
        for p in used:
            if p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks) and id(p) in seen:
                return False
        seen |= {id(p) for p in used if p is not None}
    return True
