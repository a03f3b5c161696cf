"""Plain PyTorch baseline: the same network from `torch.nn`'s own layers, with fastae's weights."""

from __future__ import annotations

from torch import Tensor, nn

from fastae.models.dense import DenseAutoencoder
from fastae.nn.linear_act import LinearAct


class PlainAutoencoder(nn.Module):
    """A `DenseAutoencoder` as it is written in PyTorch: `nn.Linear` and `nn.ReLU` in an encoder and a decoder.

    `tuned` overwrites pre-activations instead of allocating activations.
    """

    def __init__(self, like: DenseAutoencoder, tuned: bool = False) -> None:
        super().__init__()
        self.encoder = _stack(like.encoder, tuned)
        self.decoder = _stack(like.decoder, tuned)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


def _stack(layers: nn.Module, tuned: bool) -> nn.Sequential:
    made: list[nn.Module] = []
    for source in layers.children():
        assert isinstance(source, LinearAct)
        weight = source.weight
        layer = nn.Linear(source.in_features, source.out_features, device=weight.device, dtype=weight.dtype)
        layer.load_state_dict(source.state_dict())
        made.append(layer)
        if source.activation == "relu":
            made.append(nn.ReLU(inplace=tuned))
        elif source.activation != "identity":
            raise ValueError(f"PlainAutoencoder: activations must be relu or identity; got {source.activation!r}")
    return nn.Sequential(*made)
