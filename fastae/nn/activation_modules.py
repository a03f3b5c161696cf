"""PyTorch's modules of the activations, for layers that are not the kernels' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastae.nn.arguments import nearest

# In place where the derivative is taken from the output: no second map of the layer's size, whose first touch costs as
# much as the activation
MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "elu": nn.ELU,  # in place its derivative would come from y, which loses the tail
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}


def check_activation_module(name: str, argument: str) -> str:
    """`name` if PyTorch has a module of that activation, else a ValueError that lists them."""
    if name not in MODULES:
        raise ValueError(f"{argument} must be one of {', '.join(MODULES)}; got {name!r}{nearest(str(name), MODULES)}")
    return name


def activation_module(name: str) -> nn.Module:
    """A new module of the activation of that name."""
    return MODULES[name]()


def name_of(module: nn.Module) -> str | None:
    """The activation that a module of these is, or None."""
    return next((name for name, make in MODULES.items() if repr(make()) == repr(module)), None)
