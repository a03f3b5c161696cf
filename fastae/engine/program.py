"""Program of a training step, which a model provides: stages from input to output, and the loss that ends them."""

from __future__ import annotations

from typing import NamedTuple

from fastae_kernels.elementwise import LossKind
from torch import nn

from fastae.bottlenecks import CodePenalty, Contractive, Variational
from fastae.noise import Noise


class Dense(NamedTuple):
    """f(x wT + b) of a plain layer: weight [out, in], or [in, out] where it is a tied one's, transposed in use.

    dropout: the share of its outputs that are 0 in this step.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    activation: str
    transposed: bool = False
    dropout: float = 0.0

    @property
    def widths(self) -> tuple[int, int]:
        """in_features, out_features."""
        out, inside = self.weight.shape
        return (out, inside) if self.transposed else (inside, out)


class Sample(NamedTuple):
    """A variational code of `width` latents: sampled from [mu | log sigma^2], which `dense` gives or, without one, the
    island before."""

    name: str
    dense: Dense | None
    width: int
    part: Variational


class Module(NamedTuple):
    """Any `nn.Module` as an island of autograd: it is called, hooks and all, and its parameters get their gradients."""

    name: str
    module: nn.Module


class Penalise(NamedTuple):
    """A code of `width` latents that is left as it is and raises the loss."""

    name: str
    width: int
    part: CodePenalty


class Contraction(NamedTuple):
    """Layers, the first ones of the program, whose Jacobian raises the loss."""

    part: Contractive
    layers: tuple[Dense, ...]


Stage = Dense | Sample | Penalise | Module


def layer_of(stage: Stage) -> Dense | None:
    """The stage's layer of the kernels' own, if it has one."""
    if isinstance(stage, Sample):
        return stage.dense
    return stage if isinstance(stage, Dense) else None


class Program(NamedTuple):
    """Stages, first to last, and the loss of what comes out against the target, in the mean over all values.

    parameters: all of the model's, where there are islands: they may use more than they own, a tied weight say.
    own_loss: why the model's own `loss` has to be called instead of the only stage, the model.
    corrupt: the noise that rows get on their way in; the target is what they were.
    loss_parameter: what the loss has to be trained: one number for each output column, or one for all.
    contraction: what raises the loss by the Jacobian of the code.
    """

    stages: tuple[Stage, ...]
    kind: LossKind
    in_features: int
    out_features: int
    parameters: tuple[nn.Parameter, ...] = ()
    own_loss: str | None = None
    corrupt: Noise | None = None
    loss_parameter: nn.Parameter | None = None
    contraction: Contraction | None = None

    @property
    def variational(self) -> Variational | None:
        """What is asked of the code, if it is sampled."""
        return next((stage.part for stage in self.stages if isinstance(stage, Sample)), None)

    @property
    def penalised(self) -> CodePenalty | Contractive | None:
        """What raises the loss, but for a sampled code."""
        if self.contraction is not None:
            return self.contraction.part
        return next((stage.part for stage in self.stages if isinstance(stage, Penalise)), None)

    @property
    def share(self) -> float:
        """The share of values that the loss is taken of."""
        return self.corrupt.q if getattr(self.corrupt, "loss_on", "all") == "masked" else 1.0  # type: ignore[union-attr]

    @property
    def random(self) -> bool:
        """Whether the step draws random numbers of its own."""
        dropout = any(layer is not None and layer.dropout for layer in map(layer_of, self.stages))
        return self.corrupt is not None or self.variational is not None or dropout
