"""A DenseAutoencoder and the plain PyTorch module that it has to behave as."""

import torch
import torch.nn.functional as F
from cases import EAGER, normal
from torch import Tensor, nn

from fastae import DenseAutoencoder

x = normal(6, 12)


class Twin(nn.Module):
    """The plain PyTorch autoencoder whose parameters have a DenseAutoencoder's names."""

    def __init__(self, activation: str = "tanh") -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        act = EAGER[self.activation]
        return self.decoder[1](act(self.decoder[0](self.encoder[1](act(self.encoder[0](x))))))

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x).float(), x.float())


def pair(activation: str = "tanh", **options: object) -> tuple[DenseAutoencoder, Twin]:
    torch.manual_seed(0)
    model, twin = DenseAutoencoder([12, 8, 4], activation=activation, **options), Twin(activation)
    if not options:
        twin.load_state_dict(model.state_dict())
    return model, twin


def close(mine: object, theirs: object, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def plain(ae: DenseAutoencoder, x: Tensor) -> Tensor:
    """The reconstruction in PyTorch's own words."""
    for layer in (*ae.encoder, *ae.decoder):
        weight = layer.source.weight.t() if ae.tied and layer in list(ae.decoder) else layer.weight
        x = EAGER[layer.activation](torch.nn.functional.linear(x, weight, layer.bias))
    return x


def plain_loss(ae: DenseAutoencoder, x: Tensor, target: Tensor) -> Tensor:
    y = plain(ae, x)
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) - target.to(wide)).square().mean()
