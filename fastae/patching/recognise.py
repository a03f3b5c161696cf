"""The activations of PyTorch that `linear_act` computes, recognised as modules and as nodes of an fx graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastae_kernels.elementwise import ACTIVATIONS, LEAKY_RELU_SLOPE
from torch import fx, nn

# ---------------------------------------------------------------- modules


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)


_MODULES: dict[Any, Callable[[Any], str | None]] = {
    nn.LeakyReLU: lambda m: "leaky_relu" if m.negative_slope == LEAKY_RELU_SLOPE else None,
    nn.ELU: lambda m: "elu" if m.alpha == 1 else None,
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Softplus: lambda m: "softplus" if m.beta == 1 and m.threshold == 20 else None,
}


def of_module(module: nn.Module) -> str | None:
    """The name by which `linear_act` knows the activation that this module is now, or None."""
    find = _MODULES.get(type(module))
    return None if find is None else find(module)


def other_settings(module: nn.Module) -> bool:
    """Whether it is one of the activations, but with a slope, alpha, beta or threshold that `linear_act` has not."""
    return type(module) in _MODULES and of_module(module) is None


# ---------------------------------------------------------------- nodes of a graph


def _leaky_relu(negative_slope: Any = 0.01, inplace: Any = False) -> str | None:
    return "leaky_relu" if negative_slope == LEAKY_RELU_SLOPE else None


def _elu(alpha: Any = 1.0, inplace: Any = False) -> str | None:
    return "elu" if alpha == 1 else None


def _softplus(beta: Any = 1, threshold: Any = 20) -> str | None:
    return "softplus" if beta == 1 and threshold == 20 else None


# callable -> its further arguments -> the activation's name
_FUNCTIONS: dict[Any, Callable[..., str | None]] = {
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.elu: _elu,
    F.elu_: _elu,
    F.gelu: lambda approximate="none": _gelu(approximate),
    F.softplus: _softplus,
}
_METHODS: dict[Any, Callable[..., str | None]] = {}


def _always(name: str) -> Callable[..., str | None]:
    def found(inplace: Any = False) -> str | None:
        return name

    return found


for _name, _activation in ACTIVATIONS.items():  # those without settings say themselves how PyTorch spells them
    for _spelling in _activation.spellings:
        if isinstance(_spelling, str):
            _METHODS[_spelling] = _always(_name)
        elif isinstance(_spelling, type):
            _MODULES[_spelling] = lambda m, name=_name: name  # type: ignore[misc]
        else:
            _FUNCTIONS[_spelling] = _always(_name)

# What may be called in a forward beside `torch.overrides`' list, which lacks these: they too look at their argument's
# type, or call one of its methods.
PASS_THROUGH = (
    F.sigmoid, F.tanh, F.relu_, F.leaky_relu_, F.elu_, torch.relu_,
    torch.rand_like, torch.randn_like, torch.randint_like, torch.zeros_like, torch.ones_like, torch.full_like,
    torch.empty_like,
)  # fmt: skip


def of_node(node: fx.Node, of: fx.Node, module: Callable[[str], nn.Module]) -> str | None:
    """The activation that this node of a graph applies to the result of the node `of`, or None."""
    if node.op == "call_module":
        return of_module(module(str(node.target))) if node.args == (of,) and not node.kwargs else None
    table: dict[Any, Callable[..., str | None]] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(
        node.op, {}
    )
    name = table.get(node.target)
    kwargs = dict(node.kwargs)
    args = node.args if node.args else (kwargs.pop("input", None),)
    if name is None or args[0] is not of or any(isinstance(a, fx.Node) for a in (*args[1:], *kwargs.values())):
        return None
    try:
        return name(*args[1:], **kwargs)
    except TypeError:  # arguments that the table does not foresee, such as out=
        return None
