"""`TiedLinearAct`: a decoder layer on its encoder layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastae.nn.arguments import refuse_torchscript
from fastae.nn.linear_act import LinearAct, check_activation, linear_act


class TiedLinearAct(nn.Module):
    """A decoder layer that uses its encoder layer's weight transposed: f(x w + b). Its only own parameter is the bias.

    Args:
        source: the layer whose weight is shared; x is [..., source.out_features], the result [..., source.in_features].
        activation: as in `fastae.linear_act`.
    """

    def __init__(self, source: LinearAct, activation: str) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, so that the weight stays one parameter of one module
        self.in_features, self.out_features = source.out_features, source.in_features
        self.activation = check_activation(activation, "TiedLinearAct: activation")
        self.bias = nn.Parameter(torch.zeros_like(source.weight[0]))

    @property
    def source(self) -> LinearAct:
        """The encoder layer."""
        return self._source[0]

    def forward(self, input: Tensor) -> Tensor:
        return linear_act(input, self.source.weight.t(), self.bias, self.activation)

    def reset_parameters(self) -> None:
        """The bias as the constructor makes it, for models made on the meta device."""
        nn.init.zeros_(self.bias)

    def __prepare_scriptable__(self) -> None:
        refuse_torchscript("TiedLinearAct")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation={self.activation!r}, tied"
