"""Program of a training step, which a model provides: stages from input to output, and the loss that ends them."""

from __future__ import annotations

from typing import NamedTuple

from fastae_kernels.elementwise import LossKind
from torch import nn


class Dense(NamedTuple):
    """f(x wT + b) of a plain layer: weight [out, in], or [in, out] where it is a tied one's, transposed in use."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    activation: str
    transposed: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """in_features, out_features."""
        out, inside = self.weight.shape
        return (out, inside) if self.transposed else (inside, out)


class Module(NamedTuple):
    """Any `nn.Module` as an island of autograd: it is called, hooks and all, and its parameters get their gradients."""

    name: str
    module: nn.Module


Stage = Dense | Module


class Program(NamedTuple):
    """Stages, first to last, and the loss of what comes out against the target, in the mean over all values.

    parameters: all of the model's, where there are islands: they may use more than they own, a tied weight say.
    own_loss: why the model's own `loss` has to be called instead of the only stage, the model.
    loss_parameter: what the loss has to be trained: one number for each output column, or one for all.
    """

    stages: tuple[Stage, ...]
    kind: LossKind
    in_features: int
    out_features: int
    parameters: tuple[nn.Parameter, ...] = ()
    own_loss: str | None = None
    loss_parameter: nn.Parameter | None = None
